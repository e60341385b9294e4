"""The ranks of one engine: who they are, how they meet, and what the native collectives need (native/comm.h).

It knows launchers' environments, Unix sockets, and as much MPI as hands two function addresses to the kernels. On one
host no MPI is imported: ranks meet at an abstract socket named after the job, share one piece of anonymous memory,
and notice a dead rank by its closed socket. One rank has no communicator at all.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import secrets
import select
import shlex
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tensorwright.errors import RanksError
from tensorwright.runtime.meeting import counted_parts, gather_ranks, join_rank_0, receive, receive_counted, send

SLOT_BYTES = 1 << 20
LINE_BYTES = 128  # COMM_LINE of native/comm.h
STEP_TIMEOUT_S = 60.0


class NativeCommunicator(ctypes.Structure):
    """tw_comm of native/comm.h."""

    _fields_ = [
        ("rank", ctypes.c_int32), ("size", ctypes.c_int32), ("failed", ctypes.c_int32), ("sequence", ctypes.c_int32),
        ("timeout_s", ctypes.c_double), ("shared", ctypes.c_void_p), ("slot_floats", ctypes.c_int64),
        ("mpi_all_reduce", ctypes.c_void_p), ("mpi_all_gather", ctypes.c_void_p), ("mpi_float", ctypes.c_ssize_t),
        ("mpi_sum", ctypes.c_ssize_t), ("mpi_comm", ctypes.c_ssize_t)]


@dataclass(frozen=True)
class Launch:
    """What a launcher's environment says of this process. `job` is one word for all its ranks, empty if unknown."""

    rank: int
    size: int
    local_size: int  # ranks on this host
    job: str
    has_mpi: bool
    local_rank: int = 0  # among the ranks of this host


class _Links(Protocol):
    """How ranks pass bytes about: sockets on one host, MPI between hosts."""

    native: NativeCommunicator
    transport: str

    def broadcast(self, data: bytes) -> bytes: ...

    def gather(self, data: bytes) -> list[bytes]: ...

    def has_lost(self) -> bool: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class Communicator:
    """Ranks that run the same plan. `from_environment` gives None where there is one.

    `transport`: how their sums travel, for people; executors that have another way say so.
    """

    def __init__(self, rank: int, size: int, links: _Links, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.transport = links.transport
        self._links = links

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, *, across_hosts: bool | None = None,
                         timeout_s: float = STEP_TIMEOUT_S) -> Communicator | None:
        """Meet the other ranks that mpirun, srun or torchrun started; None if this is the only one.

        `across_hosts`: use MPI (True) or shared memory (False) whatever the environment says. `timeout_s` is how long
        a collective waits for a rank before it gives up.

        Raises:
            RanksError: the ranks did not all come, or MPI is needed and missing.
        """
        launch = read_launch(os.environ if environment is None else environment)
        if launch.size == 1:
            return None
        if across_hosts or not launch.job or (across_hosts is None and launch.local_size < launch.size):
            return cls(launch.rank, launch.size, _meet_by_mpi(launch, across_hosts, timeout_s), launch.local_rank)
        return cls(launch.rank, launch.size, _SharedLinks(launch.rank, launch.size, launch.job, timeout_s),
                   launch.local_rank)

    @property
    def timeout_s(self) -> float:
        """How long a collective waits for a rank before it gives up."""
        return float(self._links.native.timeout_s)

    def native(self) -> int:
        """Address of the tw_comm that `tw_run.comm` takes; valid until `close`."""
        return ctypes.addressof(self._links.native)

    def check(self) -> None:
        """Raise RanksError if a collective gave up waiting: its results, and all since, are void."""
        if self._links.native.failed:
            raise RanksError(f"rank {self.rank} of {self.size}: another rank did not answer in time; it may have died",
                             mend="look at that rank's messages, then start all ranks again")

    def broadcast(self, data: bytes = b"") -> bytes:
        """Rank 0's bytes, on every rank. Waits as long as it takes; other ranks sleep meanwhile."""
        return self._links.broadcast(data)

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, in rank order, on every rank."""
        return self._links.gather(data)

    def has_lost(self) -> bool:
        """Whether a rank that this one is connected to has ended, as far as its socket tells. Waits for nothing."""
        return self._links.has_lost()

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._links.barrier()

    def close(self) -> None:
        """Leave. Ranks that still wait for this one get a RanksError."""
        self._links.close()


def check_ranks(engine_world_size: int, communicator: Communicator | None) -> None:
    """Raise RanksError, with both numbers and the right command, if the ranks are not the engine's."""
    size = 1 if communicator is None else communicator.size
    if size == engine_world_size:
        return
    program = ["python3", "-m", __package__.split(".")[0]] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
    words = [*program, *sys.argv[1:]]
    words = words if program[0] == "python3" or os.access(program[0], os.X_OK) else ["python3", *words]
    command = shlex.join(words)
    as_root = " --allow-run-as-root" if os.geteuid() == 0 else ""  # Open MPI refuses root without it
    launched = f"mpirun -n {engine_world_size}{as_root} {command}" if engine_world_size > 1 else command
    raise RanksError(f"the engine was built for {_counted(engine_world_size)}; {_counted(size)} running",
                     mend=launched)


def read_launch(environment: Mapping[str, str]) -> Launch:
    """The launch as Open MPI, srun, MPICH-like launchers (PMI) or torchrun describe it; else one rank.

    Raises:
        RanksError: variables that are no numbers, or a rank outside its size.
    """
    def number(name: str, default: int) -> int:
        value = environment.get(name, str(default))
        if not value.isdigit():
            raise RanksError(f"the environment says {name}={value!r}, expected a number")
        return int(value)

    if "OMPI_COMM_WORLD_SIZE" in environment:
        launch = Launch(number("OMPI_COMM_WORLD_RANK", 0), number("OMPI_COMM_WORLD_SIZE", 1),
                        number("OMPI_COMM_WORLD_LOCAL_SIZE", 0), environment.get("PMIX_NAMESPACE", ""), True,
                        number("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    elif "PMI_SIZE" in environment:
        launch = Launch(number("PMI_RANK", 0), number("PMI_SIZE", 1), number("MPI_LOCALNRANKS", 0), "", True,
                        number("MPI_LOCALRANKID", 0))
    elif "SLURM_STEP_NUM_TASKS" in environment:
        tasks = number("SLURM_STEP_NUM_TASKS", 1)
        one_host = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
        job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
        launch = Launch(number("SLURM_PROCID", 0), tasks, tasks if one_host else 1, job, True,
                        number("SLURM_LOCALID", 0))
    elif "WORLD_SIZE" in environment and "RANK" in environment:
        size = number("WORLD_SIZE", 1)
        job = ":".join(environment.get(n, "") for n in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
        launch = Launch(number("RANK", 0), size, number("LOCAL_WORLD_SIZE", size), job, False,
                        number("LOCAL_RANK", number("RANK", 0)))
    else:
        launch = Launch(0, 1, 1, "", False)
    if launch.rank >= launch.size:
        raise RanksError(f"the environment says rank {launch.rank} of {launch.size}; ranks count from 0")
    return launch


def _counted(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


class _SharedLinks:
    """Ranks of one host: a star of Unix sockets around rank 0, and memory whose descriptor travels over them."""

    transport = "shared memory"

    def __init__(self, rank: int, size: int, job: str, timeout_s: float) -> None:
        name = "\0tensorwright-" + hashlib.sha256(f"{os.getuid()} {job}".encode()).hexdigest()[:32]
        num_bytes = size * LINE_BYTES + 2 * size * SLOT_BYTES
        if rank == 0:
            self._sockets, descriptor = gather_ranks(name, size, num_bytes)
        else:
            self._sockets, descriptor = join_rank_0(name, rank)
        self._rank = rank
        self._memory = mmap.mmap(descriptor, num_bytes)
        os.close(descriptor)
        anchor = ctypes.c_char.from_buffer(self._memory)
        self.native = NativeCommunicator(rank, size, 0, 0, timeout_s, ctypes.addressof(anchor), SLOT_BYTES // 4)
        del anchor  # the map stays until `close`

    def broadcast(self, data: bytes) -> bytes:
        if self._rank > 0:
            return receive_counted(self._sockets[0])[8:]
        for connection in self._sockets:
            send(connection, struct.pack("<Q", len(data)) + data)
        return data

    def gather(self, data: bytes) -> list[bytes]:
        own = struct.pack("<Q", len(data)) + data
        if self._rank > 0:
            send(self._sockets[0], own)
        else:
            own += b"".join(receive_counted(connection) for connection in self._sockets)
        return counted_parts(self.broadcast(own))

    def has_lost(self) -> bool:
        poll = select.poll()
        for connection in self._sockets:
            if connection.fileno() >= 0:
                poll.register(connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def barrier(self) -> None:
        if self._rank > 0:
            send(self._sockets[0], b"b")
            receive(self._sockets[0], 1)
            return
        for connection in self._sockets:
            receive(connection, 1)
        for connection in self._sockets:
            send(connection, b"b")

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._memory.close()


class _MpiLinks:
    """Ranks on several hosts. The kernels call MPI_Allreduce and MPI_Allgather by address, from worker 0 alone."""

    transport = "MPI"

    def __init__(self, mpi: Any, timeout_s: float) -> None:
        self._world = mpi.COMM_WORLD
        library = ctypes.CDLL(mpi.__file__)  # symbols of its dependencies, libmpi among them, resolve through it
        functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                     for name in ("MPI_Allreduce", "MPI_Allgather")]
        handles = [_handle(mpi, item) for item in (mpi.FLOAT, mpi.SUM, self._world)]
        self.native = NativeCommunicator(self._world.Get_rank(), self._world.Get_size(), 0, 0, timeout_s, None, 0,
                                         *functions, *handles)

    def broadcast(self, data: bytes) -> bytes:
        return bytes(self._world.bcast(data, root=0))

    def gather(self, data: bytes) -> list[bytes]:
        return list(self._world.allgather(data))

    def has_lost(self) -> bool:
        return False  # MPI ends all ranks of a job when one dies

    def barrier(self) -> None:
        self._world.Barrier()

    def close(self) -> None:
        """mpi4py finalises MPI when the process ends."""


def _meet_by_mpi(launch: Launch, across_hosts: bool | None, timeout_s: float) -> _Links:
    """Let MPI say whether all ranks share a host; if so, only the meeting point goes over it."""
    if not launch.has_mpi:
        raise RanksError("ranks on several hosts talk through MPI, and this launcher brings none",
                         mend="start the ranks with mpirun")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package is there, libmpi is not
        raise RanksError(f"these ranks need mpi4py and an MPI library: {error}",
                         mend="pip install 'tensorwright[mpi]'") from error
    world = MPI.COMM_WORLD
    if world.Get_size() != launch.size:
        raise RanksError(f"the launcher started {launch.size} ranks, mpi4py's MPI library sees {world.Get_size()}: "
                         "they belong to different MPI installations", mend="use the mpirun of 'tensorwright[mpi]'")
    job = world.bcast(secrets.token_hex(16), root=0)
    one_host = len(set(world.allgather(_host()))) == 1
    if across_hosts or (across_hosts is None and not one_host):
        return _MpiLinks(MPI, timeout_s)
    return _SharedLinks(launch.rank, launch.size, job, timeout_s)


def _handle(mpi: Any, item: Any) -> int:
    """An MPI handle as the integer that is passed to C: a pointer or an int, by the MPI library."""
    kind = ctypes.c_int if mpi._sizeof(item) == 4 else ctypes.c_ssize_t
    return int(kind.from_address(mpi._addressof(item)).value)


def _host() -> str:
    """A word that ranks share when they share a kernel and its network namespace."""
    return f"{socket.gethostname()} {os.stat('/proc/self/ns/net').st_ino}"  # noqa: PTH116
