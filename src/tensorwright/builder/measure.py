"""Times tactics on this CPU, with the thread pool and the compiled code that an engine would use.

It knows how to run one op on random numbers. Which tactic is taken, and what is already known, is not its matter.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from tensorwright.builder.clock import Case, Limits
from tensorwright.builder.tactics import BUCKETS, Candidates, TimingKey, key
from tensorwright.kernels.cpu.abi import Run, Step, addresses, aligned
from tensorwright.kernels.cpu.compile import compile_shared, engine_source
from tensorwright.kernels.cpu.layouts import DTYPES
from tensorwright.kernels.cpu.load import load_library, thread_pool
from tensorwright.kernels.interface import Array, Source, Tactic, Target, Tensor, symbols
from tensorwright.program.ops import OPS
from tensorwright.program.program import Weight
from tensorwright.program.reference import to_float8

ROTATED_BYTES = 128 << 20  # weights are read in turn from so much memory: more than caches hold, as in a whole step
BUDGET_S = 0.08  # for all tactics of one op at one number of rows
MIN_ROUNDS, MAX_ROUNDS = 3, 50
LONG_S = 0.5  # one round of this length is as good as many
MAX_COPIES = 128  # of small weights, which tests have
READ_BYTES, READS = 256 << 20, 5
ARITHMETIC_BITS, ROUNDS = (4, 8, 32), 200_000
Floats = NDArray[np.float64]


class Stopwatch:
    """The compiled tactics of some cases, and the pool that runs them."""

    def __init__(self, cases: Sequence[Case], target: Target, threads: int) -> None:
        self._pointers = _compiled(cases, target, threads)
        self._library = load_library(compile_shared(engine_source(()), target))
        self._pool = thread_pool(self._library, threads).pointer

    def times(self, case: Case) -> Iterator[tuple[TimingKey, float]]:
        """Seconds of every tactic at every bucket: medians over rounds in which all take turns."""
        found = _candidates(case)
        bench = _Bench(case, [self._pointers[_source(case, tactic).function] for tactic in found.tactics])
        for bucket in BUCKETS:
            first = self._run(bench, bucket.max_rows, 1)
            more = self._run(bench, bucket.max_rows, _num_rounds(float(first.sum())) - 1)
            medians = np.median(np.concatenate((first, more)), axis=0)
            for tactic, seconds in zip(found.tactics, medians.tolist(), strict=True):
                yield key(found, tactic, bucket.max_rows), max(seconds, 1e-9)

    def limits(self) -> Limits:
        """Memory and arithmetic with nothing in their way; the best of some tries."""
        memory = np.ones(READ_BYTES, np.uint8)
        read_s = min(self._timed(lambda: self._library.tw_read(
            self._pool, ctypes.c_void_p(memory.ctypes.data), ctypes.c_int64(memory.nbytes))) for _ in range(READS))
        self._library.tw_compute.restype = ctypes.c_int64
        return Limits(memory.nbytes / read_s, {bits: self._rate(bits) for bits in ARITHMETIC_BITS})

    def _rate(self, bits: int) -> float:
        done = [0]

        def compute() -> None:
            done[0] = self._library.tw_compute(self._pool, ctypes.c_int32(bits), ctypes.c_int64(ROUNDS))

        best_s = min(self._timed(compute) for _ in range(READS))
        return done[0] / best_s

    def _run(self, bench: _Bench, rows: int, rounds: int) -> Floats:
        """Seconds [rounds, tactics]."""
        steps, order = bench.steps(rounds)
        seconds = np.zeros(len(order), np.float64)
        run = Run(num_tokens=rows, num_outputs=rows, scratch=bench.scratch.ctypes.data)
        self._library.tw_execute(self._pool, steps, ctypes.c_int32(len(order)), ctypes.byref(run),
                                 ctypes.c_void_p(seconds.ctypes.data))
        sorted_seconds = np.empty(len(order), np.float64)
        sorted_seconds[order] = seconds
        return sorted_seconds.reshape(rounds, bench.num_tactics)

    @staticmethod
    def _timed(function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin


def _num_rounds(first_s: float) -> int:
    """How often all tactics take their turn, when the first time took so long."""
    if first_s > LONG_S:
        return 1
    return int(min(max(BUDGET_S / max(first_s, 1e-9), MIN_ROUNDS), MAX_ROUNDS))


class _Bench:
    """Memory of one op: activations for the largest bucket, and each layout's packed weights many times over."""

    def __init__(self, case: Case, pointers: Sequence[int]) -> None:
        found = _candidates(case)
        self._tactics, self._pointers, self.num_tactics = found.tactics, pointers, len(pointers)
        random, most_rows = np.random.default_rng(0), BUCKETS[-1].max_rows
        op, program = found.op, case.program
        self._activations = []
        for name in dict.fromkeys((*op.inputs, *op.outputs)):
            array = aligned(most_rows * int(program.buffers[name].shape[1]) * 4).view(np.float32)
            if name in op.inputs:
                random.standard_normal(dtype=np.float32, out=array)
            else:
                array.fill(0)  # takes its pages from the system now, not while the first tactic is timed
            self._activations.append(array)
        self._buffers = addresses([array.ctypes.data for array in self._activations])
        self.scratch = aligned(64 + max(found.kernel.scratch_bytes(op, program, tactic, most_rows)
                                        for tactic in self._tactics))
        first_of = {tactic.layout: tactic for tactic in reversed(self._tactics)}
        self._copies = {layout: _Copies(case, tactic, random) for layout, tactic in first_of.items()}

    def steps(self, rounds: int) -> tuple[ctypes.Array[Step], NDArray[np.int64]]:
        """Every tactic once a round, each time on other weights; and where in [rounds, tactics] each step belongs.

        Every other round goes backwards, so that no tactic always follows the same one.
        """
        order = np.arange(rounds * self.num_tactics).reshape(rounds, self.num_tactics)
        order[1::2] = order[1::2, ::-1]
        steps = (Step * order.size)()
        for step, tactic in zip(steps, (order % self.num_tactics).reshape(-1).tolist(), strict=True):
            weights = self._copies[self._tactics[tactic].layout].next()
            step.kernel, step.buffers = self._pointers[tactic], ctypes.addressof(self._buffers)
            step.weights = ctypes.addressof(weights)
        return steps, order.reshape(-1)


class _Copies:
    """One op's packed weights, over and over."""

    def __init__(self, case: Case, tactic: Tactic, random: np.random.Generator) -> None:
        found = _candidates(case)
        op, kernel, weights = found.op, found.kernel, case.program.weights
        packed = {role: kernel.pack(op, case.program, role, random_tensor(weights[name], random), tactic)
                  for role, name in op.weights.items()}
        count = max(1, -(-ROTATED_BYTES // max(1, sum(array.nbytes for array in packed.values()))))
        self._memory = [{role: _aligned_copy(array) for role, array in packed.items()}
                        for _ in range(min(count, MAX_COPIES))]
        roles = [role.rstrip("?") for role in OPS[op.kind].weights]
        self._addresses = [addresses([copy[role].ctypes.data if role in copy else 0 for role in roles])
                           for copy in self._memory]
        self._taken = 0

    def next(self) -> ctypes.Array[ctypes.c_void_p]:
        """The addresses of the copy that was used longest ago."""
        self._taken += 1
        return self._addresses[self._taken % len(self._addresses)]


def _compiled(cases: Sequence[Case], target: Target, threads: int) -> dict[str, int]:
    """The address of each distinct function: as many shared objects as there are cores to compile them on."""
    sources = list({source.function: source for case in cases for tactic in _candidates(case).tactics
                    for source in [_source(case, tactic)]}.values())
    parts = [part for part in (sources[index::threads] for index in range(threads)) if part]
    with ThreadPoolExecutor(threads) as pool:
        objects = list(pool.map(lambda part: compile_shared(engine_source(part), target), parts))
    pointers = {}
    for part, shared in zip(parts, objects, strict=True):
        library = load_library(shared)
        for source, symbol in zip(part, symbols(part), strict=True):
            pointers[source.function] = ctypes.cast(library[symbol], ctypes.c_void_p).value or 0
    return pointers


def _candidates(case: Case) -> Candidates:
    """On CPUs every case is of an op."""
    if case.candidates is None:
        raise ValueError(f"{case.title} is no op")
    return case.candidates


def _source(case: Case, tactic: Tactic) -> Source:
    found = _candidates(case)
    return found.kernel.source(found.op, case.program, tactic)


def random_tensor(weight: Weight, random: np.random.Generator) -> Tensor:
    """Any codes with small positive scales, or any numbers, in the neutral layout."""
    if not weight.is_quantized:
        return Tensor(random.standard_normal(weight.shape, np.float32).astype(DTYPES[weight.dtype]))
    rows, inputs = weight.shape
    groups = inputs // weight.group_size if weight.group_size > 0 else 1
    scales = random.uniform(0.001, 0.01, (rows, groups)).astype(DTYPES[weight.scale_dtype])
    if weight.dtype == "float8_e4m3":  # not any codes: two of them are no numbers
        return Tensor(to_float8(random.standard_normal(weight.shape, np.float32) * np.float32(100)), scales)
    codes = random.integers(0, 256, (rows, inputs // 2 if weight.dtype == "int4" else inputs), np.uint8)
    return Tensor(codes if weight.dtype == "int4" else codes.view(np.int8), scales)


def _aligned_copy(array: Array) -> Array:
    copy = aligned(array.nbytes)
    copy[:] = array
    return copy
