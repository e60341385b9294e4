"""Kernels compiled to PTX and run by the simulator (native/simulator.h). It knows no engine and no op.

Addresses of global memory are the host's: a kernel works on NumPy arrays where they lie. An access outside the arrays
that a launch names, one that is not aligned, a read of shared memory that nobody wrote (it is NaN), a barrier that not
all reach and a wait that never ends are errors.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.kernels.cpu.compile import compile_shared
from tensorwright.kernels.cpu.targets import resolve_target
from tensorwright.kernels.headers import inlined
from tensorwright.testing.simulator.instructions import Lowering
from tensorwright.testing.simulator.ptx import Body, parse

NATIVE_FOLDER = Path(__file__).parent / "native"
MESSAGE_BYTES = 1 << 12
RESIDENT = 256  # blocks that run side by side, as on a GPU of so many places
LIMIT = 2_000_000_000  # instructions of warps; more is taken for a kernel that does not end


class SimulationError(Exception):
    """A kernel did what it must not, or something that the simulator does not know."""


@dataclass(frozen=True)
class SimulatedKernel:
    """A kernel and its handle."""

    name: str
    handle: int
    parameter_bytes: int

    def launch(self, grid: Sequence[int], block: Sequence[int], shared_bytes: int, parameters: bytes, *,
               ranges: Iterable[tuple[int, int]] = (), resident: int = RESIDENT, seed: int = 0,
               races: bool = False, limit: int = LIMIT) -> int:
        """Run it to its end; gives the number of instructions. `ranges`: (address, bytes) of memory that it may touch;
        none: anywhere. Another `seed` is another order of warps and copies.
        `races`: look for them in shared memory, which takes some times longer.

        Raises:
            SimulationError: what went wrong first, with the instruction.
        """
        ends = sorted((start, start + size) for start, size in ranges)
        flat = np.array(ends, np.uint64).reshape(-1)
        shapes = np.array([*_three(grid), *_three(block)], np.int32)
        given = np.frombuffer(parameters.ljust(max(self.parameter_bytes, 1), b"\0"), np.uint8)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        count = _library().sim_launch(
            ctypes.c_void_p(self.handle), _pointer(shapes), ctypes.c_int32(shared_bytes), _pointer(given),
            ctypes.c_int64(len(given)), _pointer(flat), ctypes.c_int64(len(ends)), ctypes.c_int64(resident),
            ctypes.c_uint64(seed), ctypes.c_uint64(limit), ctypes.c_int32(races), message, MESSAGE_BYTES)
        if message.value:
            raise SimulationError(f"{self.name}: {message.value.decode(errors='replace')}")
        return int(count)


def load(ptx: str) -> dict[str, SimulatedKernel]:
    """The kernels of a PTX module, by symbol.

    Raises:
        SimulationError: PTX that the simulator does not know.
    """
    return {body.name: _kernel(body) for body in parse(ptx)}


def _kernel(body: Body) -> SimulatedKernel:
    lowering = Lowering(body, {})
    codes: list[tuple[int, ...]] = []
    operands: list[int] = []
    names: dict[str, int] = {}
    try:
        lowered = [lowering.lower(statement) for statement in body.statements]
    except ValueError as error:
        raise SimulationError(f"{body.name}: {error}") from None
    for i, guard, is_negated in lowered:
        codes.append((names.setdefault(i.name, len(names)), i.flow, guard, is_negated, len(operands), len(i.operands),
                      i.space, i.vector, i.mode, i.width, *_halves(i.immediate)))
        operands += i.operands
    table, flat, rows = np.array(codes, np.int32), np.array(operands or [0], np.int32), lowering.rows.first_rows()
    sizes = np.array((0, lowering.rows.num_predicates, body.shared_bytes, body.local_bytes), np.int32)
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    handle = _library().sim_kernel(
        _strings(list(names)), _strings([statement.text for statement in body.statements]), _pointer(table),
        ctypes.c_int64(len(codes)), _pointer(flat), ctypes.c_int64(len(operands)),
        _pointer(rows), ctypes.c_int64(len(rows)), _pointer(sizes), message, MESSAGE_BYTES)
    if not handle:
        raise SimulationError(f"{body.name}: {message.value.decode(errors='replace')}")
    return SimulatedKernel(body.name, int(handle), body.parameter_bytes)


def _halves(number: int) -> tuple[int, int]:
    """An int64 as two int32."""
    low, high = np.array([number], np.int64).view(np.int32).tolist()
    return low, high


def _three(sizes: Sequence[int]) -> list[int]:
    return [*sizes, 1, 1][:3]


def _strings(texts: Sequence[str]) -> Any:
    return (ctypes.c_char_p * max(len(texts), 1))(*(text.encode() for text in texts))


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    source = "".join(inlined(NATIVE_FOLDER, "simulator.h", set()))
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(compile_shared(source, resolve_target("native")))
        file.flush()
        library = ctypes.CDLL(file.name)
    library.sim_kernel.restype = ctypes.c_void_p
    library.sim_launch.restype = ctypes.c_uint64
    return library
