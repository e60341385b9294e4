"""Times tactics and decode steps on this GPU: recorded as a graph over cold weights, between events.

It knows how launches are timed. What they work on is `gpu_memory.py`'s matter, what follows from times `tactics.py`'s.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from cuda.bindings import driver

from tensorwright.builder.clock import Case, Limits
from tensorwright.builder.gpu_memory import Memory
from tensorwright.builder.tactics import TimingKey
from tensorwright.errors import BuildError
from tensorwright.kernels.cuda.compile import compile_modules, nvrtc_version
from tensorwright.kernels.cuda.driver import Call, Function, checked, load_module
from tensorwright.kernels.cuda.launch import GpuSource, Launch, flat, is_library_call, parameter_kinds
from tensorwright.kernels.cuda.targets import can_overlap
from tensorwright.kernels.interface import Target

ROUNDS, WARM_ROUNDS = 7, 2
READ_BYTES, PRODUCT = 1 << 30, 8192  # for the GPU's limits: memory to read, rows and columns to multiply


def gpu_name() -> str:
    """GPU, driver and compiler: what all times of one table have in common."""
    version = checked(driver.cuDriverGetVersion())
    number = f"{version // 1000}.{version % 1000 // 10}"
    return f"{torch.cuda.get_device_name()}, CUDA driver {number}, NVRTC {nvrtc_version()}"


def num_processors() -> int:
    """Of the current GPU: its multiprocessors."""
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


class GpuStopwatch:
    """The compiled ways of some cases on the current GPU."""

    def __init__(self, cases: Sequence[Case], target: Target) -> None:
        sources = [source for case in cases for source in case.ways.values() if isinstance(source, GpuSource)]
        torch.zeros(1, device="cuda")  # makes the context, which modules are loaded into
        self._overlap = can_overlap(target)
        self._modules = [(load_module(module.cubin), module.functions) for module in compile_modules(sources, target)]
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch: no types
        self._pool = torch.empty(0, dtype=torch.uint8, device="cuda")
        self._processors = num_processors()
        self._functions: dict[tuple[str, int], Function] = {}

    def times(self, case: Case) -> Iterator[tuple[TimingKey, float]]:
        """Seconds of every way: medians of some replays of a graph that goes through all copies of the weights."""
        for of, source in case.ways.items():
            if not isinstance(source, GpuSource):
                raise BuildError(f"{case.title}: not for GPUs")
            memory = Memory(case, of.rows, source, self._processors, self._random_bytes)
            yield of, self._timed(partial(self._start, source, memory), memory.copies)

    def limits(self) -> Limits:
        """A sum over memory, and a library's product of 16-bit matrices."""
        numbers = torch.zeros(READ_BYTES // 4, dtype=torch.float32, device="cuda")
        matrix = torch.zeros((PRODUCT, PRODUCT), dtype=torch.float16, device="cuda").normal_()
        into = torch.empty_like(matrix)
        read_s = self._timed(lambda: numbers.sum(), 1)
        product_s = self._timed(lambda: torch.mm(matrix, matrix, out=into), 1)
        return Limits(READ_BYTES / read_s, {32: 2.0 * PRODUCT**3 / product_s})

    def _timed(self, start: Callable[[], object], copies: int) -> float:
        """Seconds of one start, where each takes the next copy."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            start()  # a library chooses its kernels, and takes memory, when it is called for the first time
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                for _ in range(copies):
                    start()
            events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]  # torch: no types
            seconds: list[float] = []
            for _ in range(WARM_ROUNDS + ROUNDS):
                events[0].record(self._stream)
                graph.replay()
                events[1].record(self._stream)
                events[1].synchronize()
                seconds.append(events[0].elapsed_time(events[1]) / 1e3 / copies)
        return max(statistics.median(seconds[WARM_ROUNDS:]), 1e-9)

    def _start(self, source: GpuSource, memory: Memory) -> None:
        memory.next_copy()
        for launch in source.launches:
            if is_library_call(launch.function):
                memory.multiply(launch)
                continue
            call = Call(self._function(launch), launch.threads, launch.shared_bytes, self._overlap,
                        parameter_kinds(launch), cooperative=launch.cooperative)
            for index, argument in enumerate(flat(launch.arguments)):
                call.set(index, memory.value(argument))
            call.launch([size.at(memory.symbols) for size in launch.grid], self._stream.cuda_stream)

    def _function(self, launch: Launch) -> Function:
        key = (launch.function, launch.shared_bytes)
        if key not in self._functions:
            module, functions = next(each for each in self._modules if launch.function in each[1])
            self._functions[key] = Function(module, functions[launch.function].symbol, launch.shared_bytes)
        return self._functions[key]

    def _random_bytes(self, count: int) -> torch.Tensor:
        """Memory that is kept; as 16-bit numbers of any type its bytes are finite and small."""
        if self._pool.shape[0] < count:
            self._pool = torch.empty(0, dtype=torch.uint8, device="cuda")
            self._pool = torch.randint(0, 0x3b, (count,), dtype=torch.uint8, device="cuda")
        return self._pool
