"""Ranks whose GPUs the simulator is: threads that see each other's memory. Sums of a library are NumPy's.

It stands where `runtime.cuda.ranks.Ranks` does. Ranks run at the same time, as their kernels wait for each other.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tensorwright.runtime.cuda.ranks import Shape, State

WAIT_S = 60
T = TypeVar("T")


class SimulatedRanks:
    """One of several ranks; `together` makes them and runs them."""

    def __init__(self, rank: int, shape: Shape, memory: Sequence[NDArray[np.uint8]], meeting: _Meeting, *,
                 has_peers: bool = True) -> None:
        """`memory`: of every rank, `shape.bytes` each."""
        self.rank, self.size, self.has_peers, self.memory = rank, len(memory), has_peers, list(memory)
        self.host = np.zeros(2, np.int32)
        state = State(flags_at=shape.flags_at, parcels_at=shape.parcels_at, capacity=shape.capacity, rows=shape.rows,
                      parcel_bytes=shape.parcel_bytes, host=self.host.ctypes.data, timeout_ns=1, rank=rank,
                      ranks=self.size)
        for each, its_memory in enumerate(memory):
            state.memory[each] = its_memory.ctypes.data
        self._state = np.frombuffer(bytes(state), np.uint8).copy()
        self.nccl: Any = SimpleNamespace(all_reduce=self._all_reduce, all_gather=self._all_gather)
        self._meeting = meeting

    @property
    def state(self) -> int:
        """Address of tw::Ranks."""
        return int(self._state.ctypes.data)

    def ranges(self) -> list[tuple[int, int]]:
        """(address, bytes) of what its kernels may touch."""
        arrays: list[NDArray[Any]] = [*self.memory, self._state, self.host]
        return [(array.ctypes.data, array.nbytes) for array in arrays]

    def _all_reduce(self, x: int, y: int, count: int, stream: int) -> None:
        parts = self._meeting.gather(self.rank, _floats(x, count).copy())
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        _floats(y, count)[:] = total

    def _all_gather(self, x: int, y: int, count: int, stream: int) -> None:
        _floats(y, count * self.size)[:] = np.concatenate(self._meeting.gather(self.rank, _floats(x, count).copy()))


class _Meeting:
    """Where threads exchange arrays."""

    def __init__(self, size: int) -> None:
        self._barrier, self._parts = threading.Barrier(size, timeout=WAIT_S), [np.zeros(0, np.float32)] * size

    def gather(self, rank: int, part: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Of every rank."""
        self._parts[rank] = part
        self._barrier.wait()
        found = list(self._parts)
        self._barrier.wait()
        return found

    def leave(self) -> None:
        """Nobody waits for a rank that has failed."""
        self._barrier.abort()


def together(size: int, shape: Shape, run: Callable[[SimulatedRanks], T], *, has_peers: bool = True) -> list[T]:
    """What `run` gives on each rank; a rank that fails ends the others' waiting.

    Raises:
        Exception: that of the first rank that failed.
    """
    memory = [np.zeros(shape.bytes + 16, np.uint8) for _ in range(size)]
    memory = [each[-each.ctypes.data % 16:][:shape.bytes] for each in memory]
    meeting = _Meeting(size)
    ranks = [SimulatedRanks(rank, shape, memory, meeting, has_peers=has_peers) for rank in range(size)]

    def guarded(rank: SimulatedRanks) -> T:
        try:
            return run(rank)
        except BaseException:
            meeting.leave()
            for each in ranks:
                each.host[:] = 1
            raise

    with ThreadPoolExecutor(size) as pool:
        return [each.result() for each in [pool.submit(guarded, rank) for rank in ranks]]


def _floats(address: int, count: int) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
    return numbers
