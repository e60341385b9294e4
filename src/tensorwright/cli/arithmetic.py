"""How fast this machine multiplies and adds with an engine's own instructions: the limit of steps with many tokens.

It knows the native probe (`native/arithmetic.h`) and no model. Engines built before there was one have no such limit.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Collection

from tensorwright.kernels.cpu.load import thread_pool

PROBE = "tw_compute"
ROUNDS, REPEATS = 1_000_000, 7  # about 10 ms each on a core that finishes two vectors a cycle


def arithmetic_rates(library: ctypes.CDLL, num_threads: int, widths: Collection[int], *,
                     rounds: int = ROUNDS) -> dict[int, float] | None:
    """Operations per second of all threads for weights of so many bits, a product and its sum counting two.

    4 and 8: dot products with int8 activations; 16: of pairs; 32: float32. The best of some tries.
    None if the engine has no probe.
    """
    compute = getattr(library, PROBE, None)
    if compute is None:
        return None
    compute.restype = ctypes.c_int64
    pool = thread_pool(library, num_threads)
    rates = dict.fromkeys(sorted(widths), 0.0)
    for _ in range(REPEATS):
        for bits in rates:
            started = time.perf_counter()
            operations = compute(pool.pointer, ctypes.c_int32(bits), ctypes.c_int64(rounds))
            rates[bits] = max(rates[bits], operations / (time.perf_counter() - started))
    return rates
