"""Compiles single ops for a target and runs them on given arrays: what the kernels' own tests stand on.

It knows a kernel's interface and the engine's exports. It does not know engines, programs of many ops or caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.kernels.cpu.abi import Run, Step, addresses, aligned
from tensorwright.kernels.cpu.compile import compile_shared, engine_source
from tensorwright.kernels.cpu.load import load_library, thread_pool
from tensorwright.kernels.interface import Array, Kernel, Target, Tensor, symbols
from tensorwright.program.ops import OPS
from tensorwright.program.program import Op, Program

GUARD_BYTES = 64


@dataclass(frozen=True)
class Case:
    """One op with its one-op program and the numbers of its weights, by role."""

    kernel: Kernel
    op: Op
    program: Program
    weights: Mapping[str, Tensor]


class SingleOps:
    """Ops in one shared object, run by the process's pool of that many workers."""

    def __init__(self, cases: Sequence[Case], target: Target, *, workers: int = 1) -> None:
        self.cases = tuple(cases)
        self.tactics = [case.kernel.tactics(case.op, case.program, target)[0] for case in cases]
        sources = [case.kernel.source(case.op, case.program, tactic)
                   for case, tactic in zip(cases, self.tactics, strict=True)]
        self._symbols = symbols(sources)
        self._library = load_library(compile_shared(engine_source(sources), target))
        self._pool = thread_pool(self._library, workers).pointer
        self._weights = [self._packed(index) for index in range(len(cases))]

    def run(self, index: int, inputs: Sequence[NDArray[np.float32]], num_columns: int, *,
            in_place: bool = False, times: int = 1) -> NDArray[np.float32]:
        """The result [rows, num_columns] of a case; `in_place`: y starts as the last input and shares its memory.

        Raises:
            AssertionError: the op wrote behind the end of y or of the scratch memory it had asked for.
        """
        case, tactic = self.cases[index], self.tactics[index]
        rows = inputs[0].shape[0]
        scratch, scratch_guard = _guarded(case.kernel.scratch_bytes(case.op, case.program, tactic, rows))
        y, guard = _guarded(rows * num_columns * 4)
        result = y.view(np.float32).reshape(rows, num_columns)
        result[:] = inputs[-1] if in_place else np.float32(np.nan)
        pointers = [array.ctypes.data for array in inputs[:-1] if in_place]
        pointers += [result.ctypes.data] if in_place else [array.ctypes.data for array in inputs]
        buffers = addresses([*pointers, result.ctypes.data])
        weights = addresses(self._weight_addresses(index))
        step = Step(ctypes.cast(self._library[self._symbols[index]], ctypes.c_void_p), ctypes.addressof(buffers),
                    ctypes.addressof(weights), 0, 0)
        step_run = Run(num_tokens=rows, scratch=scratch.ctypes.data)
        for _ in range(times):
            self._library.tw_execute(self._pool, ctypes.byref(step), 1, ctypes.byref(step_run), None)
        if (guard != 0xA5).any() or (scratch_guard != 0xA5).any():
            raise AssertionError("the op wrote behind its memory")
        return result

    def packed_bytes(self, index: int) -> int:
        """Size of the packed weights of a case."""
        return sum(array.nbytes for array in self._weights[index].values())

    def _packed(self, index: int) -> dict[str, Array]:
        case, tactic = self.cases[index], self.tactics[index]
        return {role: _aligned_copy(case.kernel.pack(case.op, case.program, role, tensor, tactic))
                for role, tensor in case.weights.items()}

    def _weight_addresses(self, index: int) -> list[int]:
        roles = (role.rstrip("?") for role in OPS[self.cases[index].op.kind].weights)
        held = self._weights[index]
        return [held[role].ctypes.data if role in held else 0 for role in roles]


def _aligned_copy(array: NDArray[Any]) -> NDArray[np.uint8]:
    copy = aligned(array.nbytes)
    copy[:] = array.view(np.uint8)
    return copy


def _guarded(num_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Aligned memory, and marked bytes right behind it that nothing may change."""
    memory = aligned(num_bytes + GUARD_BYTES)
    memory[num_bytes:] = 0xA5
    return memory[:num_bytes], memory[num_bytes:]
