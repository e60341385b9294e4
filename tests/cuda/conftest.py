"""Tests of GPU kernels that need no GPU: packing, plans, and compiling for every target."""
