"""Runs the plan of a CPU engine: binds buffers, weights and kernels once, then one native call per step.

It knows the program and the engine's plan. It knows no requests and no scheduling.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorwright.engine.engine import Engine
from tensorwright.errors import EngineError, UsageError
from tensorwright.kernels.cpu.abi import ABI_VERSION, Run, Sampling, Step, addresses, aligned
from tensorwright.kernels.cpu.load import load_library, thread_pool
from tensorwright.kernels.cpu.processors import usable_cores
from tensorwright.kernels.cpu.registry import KERNELS
from tensorwright.kernels.cpu.targets import check_target
from tensorwright.kernels.interface import Tactic, Target
from tensorwright.program.ops import BATCH_INPUTS, OPS
from tensorwright.program.program import Buffer, Op
from tensorwright.runtime.batch import Batch, Drawn, Floats, SamplingRow
from tensorwright.runtime.communicator import Communicator, check_ranks, read_launch

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
                          "int8": np.int8, "int32": np.int32}


def default_threads() -> int:
    """One per core that this process may use; ranks of this host share the cores that their launcher may use.

    A launcher that binds each rank to cores of its own (a NUMA node's, say) has shared them out already.
    """
    num_ranks = read_launch(os.environ).local_size
    if num_ranks <= 1:
        return usable_cores()
    return max(1, min(usable_cores(), usable_cores(os.sched_getaffinity(os.getppid())) // num_ranks))


class CpuExecutor:
    """`runtime.batch.Executor` over an engine's own machine code."""

    runs_ahead = False  # the same cores prepare a step and run it

    def __init__(self, engine: Engine, *, num_blocks: int, threads: int | None = None,
                 communicator: Communicator | None = None) -> None:
        """Bind everything; caches take memory as their blocks are first written.

        Raises IncompatibleEngineError where this CPU cannot run the engine, RanksError for a wrong number of ranks.
        """
        check_target(Target(engine.target, engine.metadata["architecture"], (), engine.features),
                     engine=str(engine.directory))
        check_ranks(engine.world_size, communicator)
        self.engine, self.program = engine, engine.program
        self.vocab_size, self.num_blocks, self.block_size = engine.vocab_size, num_blocks, engine.tokens_per_block
        self._library = load_library(engine.kernels(), glibc=engine.manifest["kernels"]["glibc"])
        if self._library.tw_abi_version() != ABI_VERSION:
            raise EngineError(f"the engine's kernels have interface {self._library.tw_abi_version()}, this version "
                              f"needs {ABI_VERSION}", mend=f"tensorwright build --rebuild_kernels {engine.directory}")
        self.threads = threads or default_threads()
        self._pool = thread_pool(self._library, self.threads)
        self._communicator = communicator
        self._max_tokens = engine.limits.max_num_tokens
        self._max_outputs = min(engine.limits.max_batch_size * engine.limits.max_beam_width, self._max_tokens)
        self._caches = {buffer.name: self._cache(buffer) for buffer in self.program.buffers.values()
                        if buffer.kind == "cache"}
        self._bind()

    def _cache(self, buffer: Buffer) -> NDArray[Any]:
        shape = tuple(self.num_blocks if dim == "blocks" else int(dim) for dim in buffer.shape)
        dtype = np.dtype(DTYPES[buffer.dtype])
        return aligned(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize).view(dtype).reshape(shape)

    def _bind(self) -> None:
        """Allocate activations for the present row counts and point every step at its memory."""
        memory = self.engine.manifest["memory"]
        rows = {"tokens": self._max_tokens, "outputs": self._max_outputs}
        slots = [aligned(rows[symbol] * columns * 4).view(np.float32) for symbol, columns in memory["slots"]]
        self._activations = {name: slots[index] for name, index in memory["slot_of"].items()}
        self._scratch = aligned(self._scratch_bytes())
        self._keep: list[Any] = []
        self._steps = (Step * len(self.program.ops))()
        for step, op, plan in zip(self._steps, self.program.ops, self.engine.steps, strict=True):
            buffers = addresses([self._address(name) for name in _bound(op)])
            weights = addresses([self._weight(op.weights.get(role.rstrip("?"))) for role in OPS[op.kind].weights])
            self._keep += [buffers, weights]
            step.kernel = self._entry(plan.symbol)
            step.buffers, step.weights = ctypes.addressof(buffers), ctypes.addressof(weights)
            step.rows = int(self.program.buffers[op.outputs[0]].shape[0] == "outputs")
        self._edges = sorted({int(variant.max_rows or 0) for plan in self.engine.steps for variant in plan.few_rows})
        self._steps_of: dict[tuple[int, int], ctypes.Array[Step]] = {}

    def _steps_for(self, num_tokens: int, num_outputs: int) -> ctypes.Array[Step]:
        """The steps with their tactics for so many rows; made when a step of that size first comes."""
        size = (bisect_left(self._edges, num_tokens), bisect_left(self._edges, num_outputs))
        if size not in self._steps_of:
            steps = type(self._steps).from_buffer_copy(self._steps)
            for step, plan in zip(steps, self.engine.steps, strict=True):
                step.kernel = self._entry(plan.at(num_outputs if step.rows else num_tokens).symbol)
            self._steps_of[size] = steps
        return self._steps_of[size]

    def _entry(self, symbol: str) -> int | None:
        return ctypes.cast(self._library[symbol], ctypes.c_void_p).value

    def _address(self, name: str) -> int:
        array = self._caches[name] if name in self._caches else self._activations[name]
        return int(array.ctypes.data)

    def _weight(self, name: str | None) -> int:
        return 0 if name is None else int(self.engine.weight(name).ctypes.data)

    def _scratch_bytes(self) -> int:
        kernels = {kernel.name: kernel for kernel in KERNELS}
        rows = max(self._max_tokens, self._max_outputs)
        return max(kernels[step.kernel].scratch_bytes(op, self.program, Tactic(step.layout, variant.parameters),
                                                      min(rows, variant.max_rows or rows))
                   for op, step in zip(self.program.ops, self.engine.steps, strict=True) for variant in step.variants)

    def execute(self, batch: Batch, *, step_seconds: NDArray[np.float64] | None = None) -> Floats:
        """Logits float32 [R, vocab], overwritten by the next call. `step_seconds` [ops] takes each op's time."""
        self.execute_range(batch, 0, len(self._steps), step_seconds=step_seconds)
        outputs = batch.output_rows.shape[0]
        logits = self.buffer(self.program.ops[-1].outputs[0])
        return np.asarray(logits[:outputs])

    def execute_range(self, batch: Batch, begin: int, end: int, *,
                      step_seconds: NDArray[np.float64] | None = None) -> None:
        """Run the ops begin .. end − 1 only; what earlier ops would have written must be in their buffers."""
        if batch.token_ids.shape[0] > self._max_tokens:
            raise UsageError(f"a step of {batch.token_ids.shape[0]} tokens; the engine holds {self._max_tokens}")
        if batch.output_rows.shape[0] > self._max_outputs:
            self._max_outputs = batch.output_rows.shape[0]
            self._bind()
        run = self._run(batch)
        seconds = None if step_seconds is None else step_seconds.ctypes.data_as(ctypes.c_void_p)
        bound = self._steps_for(run.num_tokens, run.num_outputs)
        steps = ctypes.byref(bound, begin * ctypes.sizeof(Step))
        self._library.tw_execute(self._pool.pointer, steps, ctypes.c_int32(end - begin), ctypes.byref(run), seconds)
        if self._communicator is not None:
            self._communicator.check()

    def _run(self, batch: Batch) -> Run:
        run = Run(batch.token_ids.shape[0], batch.query_starts.shape[0], batch.output_rows.shape[0],
                  batch.block_tables.shape[1])
        for name in BATCH_INPUTS:
            array = getattr(batch, name)
            setattr(run, name, array.ctypes.data)
        run.scratch = self._scratch.ctypes.data
        run.comm = None if self._communicator is None else self._communicator.native()
        return run

    def buffer(self, name: str) -> NDArray[Any]:
        """A buffer's memory: caches whole, activations [rows, columns]. Slots are shared by several activations."""
        if name in self._caches:
            return self._caches[name]
        columns = int(self.program.buffers[name].shape[1])
        flat = self._activations[name]
        return np.asarray(flat[:flat.shape[0] // columns * columns].reshape(-1, columns))

    def sample(self, logits: Floats, rows: Sequence[SamplingRow]) -> Drawn:
        """A token and its log probability for each row of logits (see `runtime.sampling` for the meaning)."""
        keep: list[NDArray[Any]] = []
        requests = (Sampling * max(1, len(rows)))()
        for request, row in zip(requests, rows, strict=False):
            _fill(request, row, keep)
        logits = np.ascontiguousarray(logits, np.float32)
        tokens, log_probs = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.float32)
        self._library.tw_sample(
            self._pool.pointer, ctypes.c_void_p(logits.ctypes.data), ctypes.c_int32(len(rows)),
            ctypes.c_int32(logits.shape[1]), requests, ctypes.c_void_p(tokens.ctypes.data),
            ctypes.c_void_p(log_probs.ctypes.data))
        if (tokens < 0).any():
            raise MemoryError(f"no memory to sample from {logits.shape[1]} logits")
        with np.errstate(all="ignore"):
            is_finite = np.isfinite(logits.sum(axis=1))
        return Drawn(tokens, log_probs, is_finite)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination) in every layer."""
        for cache in self._caches.values():
            for source, destination in pairs:
                cache[destination] = cache[source]


def _bound(op: Op) -> list[str]:
    """Buffers in the order of abi.h: inputs but the batch's own, then outputs that are no inputs."""
    inputs = [name for name in op.inputs if name not in BATCH_INPUTS]
    return inputs + [name for name in op.outputs if name not in inputs]


def _fill(request: Sampling, row: SamplingRow, keep: list[NDArray[Any]]) -> None:
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
                 "uniform"):
        setattr(request, name, getattr(row, name))
    for name, dtype in (("seen", np.int32), ("counts", np.int32), ("biased", np.int32), ("biases", np.float32)):
        values = getattr(row, name)
        if len(values):
            keep.append(np.ascontiguousarray(values, dtype))
            setattr(request, name, keep[-1].ctypes.data)
    request.top_k = min(row.top_k, 2**31 - 1)  # ctypes would keep the low bits of a larger number
    request.num_seen, request.num_biased = len(row.seen), len(row.biased)
