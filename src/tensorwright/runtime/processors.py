"""How many threads are worth starting, as the runtime knows it: `kernels/cpu/processors.py`."""

from __future__ import annotations

from tensorwright.kernels.cpu.processors import usable_cores

__all__ = ["usable_cores"]
