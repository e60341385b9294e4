"""The runtime executes programs. It knows no models, no checkpoints and no builder."""
