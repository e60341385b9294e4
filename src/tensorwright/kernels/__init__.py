"""Kernels: how an op is computed on a target. Nothing here knows models, checkpoints or the scheduler."""
