"""How fast this machine reads memory: the limit that decode speed is compared with. It knows no engine.

A NumPy reduction reads as fast as hand-written loads do (measured: 34 GB/s for one thread where AVX-512 loads reach 38)
and needs no compiler.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BUFFER_BYTES = 1 << 30  # several times any cache
REPEATS = 5


def read_bandwidth(num_threads: int, *, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes per second that the threads read together from a buffer beyond the caches; the best of some tries."""
    buffer = np.ones(buffer_bytes // 8, np.uint64)
    parts = np.array_split(buffer, num_threads)
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(REPEATS):
            started = time.perf_counter()
            for largest in pool.map(np.max, parts):
                if largest != 1:
                    raise MemoryError("the memory that was just written reads differently")
            best_s = min(best_s, time.perf_counter() - started)
    return buffer.nbytes / best_s
