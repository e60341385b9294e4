"""The binary interface of a CPU engine's shared object, as the runtime knows it: `kernels/cpu/abi.py`."""

from __future__ import annotations

from tensorwright.kernels.cpu.abi import ABI_VERSION, Run, Sampling, Step, addresses, aligned

__all__ = ["ABI_VERSION", "Run", "Sampling", "Step", "addresses", "aligned"]
