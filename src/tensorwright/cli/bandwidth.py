"""How fast this machine reads memory: the limit that decode speed is compared with. It knows no engine.

The native reader takes one sequential stream per worker, prefetched as the linears are. Without a C++ compiler a NumPy
reduction takes its place; it reads 10 to 15 % slower, so that shares of the limit come out above 1.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.errors import BuildError

BUFFER_BYTES = 1 << 29  # several times any cache
REPEATS = 7

Buffer = NDArray[Any]


def read_bandwidth(num_threads: int, *, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes per second that the threads read together from a buffer beyond the caches; the best of some tries."""
    buffer = np.ones(buffer_bytes // 8, np.uint64)
    try:
        read = _native_reader(num_threads)
    except BuildError:
        read = _numpy_reader(num_threads)
    best_s = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        read(buffer)
        best_s = min(best_s, time.perf_counter() - started)
    return buffer.nbytes / best_s


def _native_reader(num_threads: int) -> Callable[[Buffer], None]:
    """Raises BuildError without a compiler."""
    from tensorwright.kernels.cpu.compile import compile_shared, engine_source
    from tensorwright.kernels.cpu.load import load_library, thread_pool
    from tensorwright.kernels.cpu.targets import resolve_target

    library = load_library(compile_shared(engine_source(()), resolve_target("native")))
    pool = thread_pool(library, num_threads)
    return lambda buffer: library.tw_read(pool.pointer, ctypes.c_void_p(buffer.ctypes.data),
                                          ctypes.c_int64(buffer.nbytes))


def _numpy_reader(num_threads: int) -> Callable[[Buffer], None]:
    pool = ThreadPoolExecutor(num_threads)

    def read(buffer: Buffer) -> None:
        for _ in pool.map(np.max, np.array_split(buffer, num_threads)):
            pass

    return read
