"""The engine folder and file. Nothing here knows models, kernels' meaning or the scheduler."""
