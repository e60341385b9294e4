"""What a GPU reaches with nothing in its way: bytes read and 16-bit operations per second. Measured with torch."""

from __future__ import annotations

from collections.abc import Callable

READ_BYTES, TRIES = 2 << 30, 5
SHAPE = (4096, 5120, 28672)  # of a matrix product that keeps every multiprocessor busy


def read_rate() -> float:
    """Bytes per second of a streaming read."""
    import torch

    memory = torch.ones(READ_BYTES // 4, dtype=torch.float32, device="cuda")
    return READ_BYTES / _best(memory.sum)


def multiply_rate() -> float:
    """Operations per second of a float16 matrix product."""
    import torch

    rows, inner, columns = SHAPE
    a, b = (torch.randn(shape, dtype=torch.float16, device="cuda") for shape in ((rows, inner), (columns, inner)))
    return 2.0 * rows * inner * columns / _best(lambda: a @ b.t())


def device_name() -> str:
    """Of the current GPU, such as "NVIDIA H200"."""
    import torch

    return str(torch.cuda.get_device_name())


def device_bytes() -> int:
    """What this process's tensors take of its memory: all that an open engine needs."""
    import torch

    return int(torch.cuda.memory_allocated())


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some tries, by the GPU's own clock."""
    import torch

    run()
    times: list[float] = []
    for _ in range(TRIES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch: no types
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)
