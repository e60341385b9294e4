"""One-op programs over a batch, compiled together and run natively or by the reference. For the tests of CPU kernels.

It binds buffers as `runtime.executor` does. It knows no engine file and no plan of many ops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.kernels.cpu.abi import Run, Step, addresses, aligned
from tensorwright.kernels.cpu.compile import compile_shared, engine_source
from tensorwright.kernels.cpu.load import load_library, thread_pool
from tensorwright.kernels.cpu.registry import find_kernel
from tensorwright.kernels.interface import Target, Tensor, symbols
from tensorwright.program.ops import ATTRIBUTE_DEFAULTS, BATCH_INPUTS, OPS
from tensorwright.program.program import Buffer, Op, Program, Weight
from tensorwright.runtime.batch import Batch

Arrays = Mapping[str, NDArray[Any]]


def one_op(kind: str, buffers: Mapping[str, Buffer], weights: Mapping[str, Weight] | None = None,
           **attributes: Any) -> Program:
    """A program of a single op; `buffers` (without the batch inputs) and `weights` by their names in `program.ops`."""
    spec, held = OPS[kind], dict(weights or {})
    table = {**{name: Buffer(name, ("tokens",), "int32", "input") for name in BATCH_INPUTS}, **buffers}
    inputs, outputs = ([name.rstrip("?") for name in names if name.rstrip("?") in table]
                       for names in (spec.inputs, spec.outputs))
    given = {name: ATTRIBUTE_DEFAULTS.get(name) for name in spec.attributes} | attributes
    op = Op(kind, kind, tuple(inputs), tuple(outputs), {role: role for role in held}, given)
    return Program({name: table[name] for name in {*inputs, *outputs}}, held, (op,))


class NativeOps:
    """Several one-op programs in one shared object."""

    def __init__(self, programs: Sequence[Program], target: Target) -> None:
        self.programs = tuple(programs)
        self._kernels = [find_kernel(p.ops[0], p, target) for p in programs]
        self._tactics = [k.tactics(p.ops[0], p, target)[0] for k, p in zip(self._kernels, programs, strict=True)]
        sources = [k.source(p.ops[0], p, t)
                   for k, p, t in zip(self._kernels, programs, self._tactics, strict=True)]
        self.data = compile_shared(engine_source(sources), target)
        self.library = load_library(self.data)
        self._symbols = symbols(sources)

    def run(self, index: int, arrays: Arrays, weights: Mapping[str, Tensor], batch: Batch, *, workers: int = 1,
            comm: int | None = None) -> None:
        """Run program `index` over arrays named by its operands; outputs are changed in place."""
        program, kernel, tactic = self.programs[index], self._kernels[index], self._tactics[index]
        op = program.ops[0]
        names = [name for name in dict.fromkeys((*op.inputs, *op.outputs)) if name not in BATCH_INPUTS]
        scratch = aligned(kernel.scratch_bytes(op, program, tactic, batch.token_ids.shape[0]) or 64)
        packed = {role: kernel.pack(op, program, role, tensor, tactic) for role, tensor in weights.items()}
        roles = [role.rstrip("?") for role in OPS[op.kind].weights]
        buffers = addresses([arrays[name].ctypes.data for name in names])
        held = addresses([packed[role].ctypes.data if role in packed else 0 for role in roles])
        rows = int(program.buffers[op.outputs[0]].shape[0] == "outputs")
        step = Step(ctypes.cast(self.library[self._symbols[index]], ctypes.c_void_p), ctypes.addressof(buffers),
                    ctypes.addressof(held), rows, 0)
        run = Run(batch.token_ids.shape[0], batch.query_starts.shape[0], batch.output_rows.shape[0],
                  batch.block_tables.shape[1])
        for name in BATCH_INPUTS:
            setattr(run, name, getattr(batch, name).ctypes.data)
        run.scratch, run.comm = scratch.ctypes.data, comm
        pool = thread_pool(self.library, workers)
        self.library.tw_execute(pool.pointer, ctypes.byref(step), ctypes.c_int32(1), ctypes.byref(run), None)

    def reference(self, index: int, arrays: Arrays, weights: Mapping[str, Tensor], batch: Batch) -> Arrays:
        """What the kernel's own reference gives, by operand names; caches among `arrays` are changed in place."""
        program, kernel = self.programs[index], self._kernels[index]
        inputs = {**{name: getattr(batch, name) for name in BATCH_INPUTS}, **arrays}
        return kernel.reference(program.ops[0], program, inputs, weights)


def make_batch(lengths: Sequence[tuple[int, int]], block_size: int, *, num_outputs: int = 0,
               seed: int = 0) -> tuple[Batch, int]:
    """A batch of sequences (query_length, kv_length) over shuffled blocks, and the number of blocks it needs."""
    random = np.random.default_rng(seed)
    needed = [-(-kv // block_size) for _, kv in lengths]
    blocks = random.permutation(sum(needed)).astype(np.int32)
    tables = np.zeros((len(lengths), max(needed)), np.int32)
    positions: list[int] = []
    slots: list[int] = []
    start = 0
    for row, ((query, kv), count) in enumerate(zip(lengths, needed, strict=True)):
        tables[row, :count] = blocks[start:start + count]
        start += count
        own = np.arange(kv - query, kv)
        positions += own.tolist()
        slots += (tables[row, own // block_size] * block_size + own % block_size).tolist()
    queries = np.array([query for query, _ in lengths], np.int32)
    starts = np.concatenate(([0], np.cumsum(queries)[:-1])).astype(np.int32)
    rows = random.integers(0, len(positions), num_outputs).astype(np.int32)
    tokens = random.integers(0, 7, len(positions)).astype(np.int32)
    return Batch(tokens, np.array(positions, np.int32), np.array(slots, np.int32), starts, queries,
                 np.array([kv for _, kv in lengths], np.int32), tables, rows), sum(needed)
