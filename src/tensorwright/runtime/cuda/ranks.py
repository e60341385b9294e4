"""The ranks of a GPU engine: whose GPU is which, what their collectives need (native/ranks.cuh), and NCCL.

It knows no op and no step. A rank that ends is noticed here, so that the others stop waiting for it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass
from functools import cached_property

import torch

from tensorwright.engine.engine import Engine
from tensorwright.errors import RanksError
from tensorwright.kernels.cuda.ranks import ONE_SHOT_BYTES, ONE_SHOT_ROWS
from tensorwright.runtime.communicator import Communicator
from tensorwright.runtime.cuda.nccl import Nccl
from tensorwright.runtime.cuda.peers import PeerMemory, current_gpu, share_memory

MAX_RANKS = 8  # of native/ranks.cuh
LOST, GAVE_UP = 0, 1  # words of the host: another rank has ended; this one has stopped waiting
WATCH_S, GRACE_S = 0.2, 5.0
START_AGAIN = "look at that rank's messages, then start all ranks again"


class State(ctypes.Structure):
    """tw::Ranks of native/ranks.cuh."""

    _fields_ = [
        ("memory", ctypes.c_uint64 * MAX_RANKS), ("flags_at", ctypes.c_uint64), ("parcels_at", ctypes.c_uint64),
        ("capacity", ctypes.c_uint64), ("rows", ctypes.c_uint64), ("parcel_bytes", ctypes.c_uint64),
        ("host", ctypes.c_uint64), ("timeout_ns", ctypes.c_uint64), ("rank", ctypes.c_int32),
        ("ranks", ctypes.c_int32), ("epoch", ctypes.c_uint32)]


@dataclass(frozen=True)
class Shape:
    """What each rank keeps for the others to write into; see native/ranks.cuh."""

    ranks: int
    capacity: int  # words of 8 bytes from one rank
    rows: int  # flags from one rank
    parcel_bytes: int  # from one rank

    @property
    def flags_at(self) -> int:
        """Where flags begin, behind the words."""
        return 2 * self.ranks * self.capacity * 8

    @property
    def parcels_at(self) -> int:
        """Where parcels begin."""
        return _aligned(self.flags_at + self.ranks * self.rows * 4)

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.parcels_at + 2 * self.ranks * self.parcel_bytes


def shape_of(engine: Engine, max_tokens: int) -> Shape:
    """What steps of so many tokens need."""
    def widest(kind: str) -> int:
        ops = [op for op in engine.program.ops if op.kind == kind]
        return max((int(engine.program.buffers[op.inputs[0]].shape[1]) for op in ops), default=0)

    capacity = max(ONE_SHOT_BYTES // 4, ONE_SHOT_ROWS * widest("all_reduce"))
    return Shape(engine.world_size, _aligned(capacity), max_tokens, _aligned(2 * max_tokens * widest("all_reduce")))


def use_own_gpu(communicator: Communicator | None, *, shared: bool = False) -> None:
    """Make this rank's GPU the current one: that of its number among the ranks of its host.

    Raises:
        RanksError: two ranks have the same GPU, unless `shared` allows it.
    """
    if communicator is None:
        return
    torch.cuda.set_device(communicator.local_rank % torch.cuda.device_count())
    torch.zeros(1, device="cuda")  # makes the context
    found = [each.decode() for each in communicator.gather(current_gpu().uuid.encode())]
    for rank, uuid in enumerate(found):
        if uuid in found[:rank] and not shared:
            raise RanksError(f"ranks {found.index(uuid)} and {rank} have the same GPU: {communicator.size} ranks need "
                             f"{communicator.size} GPUs, and each process sees {torch.cuda.device_count()}",
                             mend="nvidia-smi -L; then tensorwright convert --tp_size N for as many as there are")


class Ranks:
    """What launches of one rank need of the others."""

    def __init__(self, engine: Engine, communicator: Communicator, device: torch.device, max_tokens: int) -> None:
        """Share memory with all ranks, if their GPUs reach each other's; every rank does it at the same time."""
        shape = shape_of(engine, max_tokens)
        memory = (share_memory(communicator, shape.bytes) if communicator.size <= MAX_RANKS
                  else PeerMemory((), f"more than {MAX_RANKS} ranks"))
        self.has_peers, self._communicator = not memory.obstacle, communicator
        self._host = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        state = State(host=self._host.data_ptr(), timeout_ns=int(communicator.timeout_s * 1e9),
                      flags_at=shape.flags_at, parcels_at=shape.parcels_at, capacity=shape.capacity, rows=shape.rows,
                      parcel_bytes=shape.parcel_bytes, rank=communicator.rank, ranks=communicator.size)
        for rank, address in enumerate(memory.addresses):
            state.memory[rank] = address
        self._state = torch.frombuffer(bytearray(bytes(state)), dtype=torch.uint8).to(device)
        communicator.transport = f"NCCL: {memory.obstacle}" if memory.obstacle else (
            f"peer memory in one shot up to {ONE_SHOT_BYTES >> 10} KiB, by NCCL beyond")
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    @property
    def state(self) -> int:
        """Address of tw::Ranks on the device."""
        return int(self._state.data_ptr())

    @cached_property
    def nccl(self) -> Nccl:
        """Connected when the first op needs it, which is at the same time on all ranks."""
        return Nccl(self._communicator)

    def check(self) -> None:
        """Raise RanksError if a collective of the last step gave up waiting: its results, and all since, are void."""
        if self._host[GAVE_UP]:
            raise RanksError(f"rank {self._communicator.rank} of {self._communicator.size}: another rank did not "
                             "answer in time; it may have died", mend=START_AGAIN)

    def _watch(self) -> None:
        """Until another rank ends: one-shot kernels look at the host's word, NCCL's have to be aborted."""
        while not self._communicator.has_lost():
            time.sleep(WATCH_S)
        self._host[LOST] = 1
        time.sleep(GRACE_S)  # a rank that has ended in peace may leave others a step to finish
        if "nccl" in self.__dict__:
            self._host[GAVE_UP] = 1
            self.nccl.abort()


def _aligned(size: int) -> int:
    return -(-size // 256) * 256
