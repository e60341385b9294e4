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
import shlex
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tensorwright.errors import RanksError

SLOT_BYTES = 1 << 20
LINE_BYTES = 128  # COMM_LINE of native/comm.h
MEET_TIMEOUT_S = 120.0
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


class _Links(Protocol):
    """How ranks pass bytes about: sockets on one host, MPI between hosts."""

    native: NativeCommunicator

    def broadcast(self, data: bytes) -> bytes: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class Communicator:
    """Ranks that run the same plan. `from_environment` gives None where there is one."""

    def __init__(self, rank: int, size: int, links: _Links) -> None:
        self.rank, self.size = rank, size
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
            return cls(launch.rank, launch.size, _meet_by_mpi(launch, across_hosts, timeout_s))
        return cls(launch.rank, launch.size, _SharedLinks(launch.rank, launch.size, launch.job, timeout_s))

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
                        number("OMPI_COMM_WORLD_LOCAL_SIZE", 0), environment.get("PMIX_NAMESPACE", ""), True)
    elif "PMI_SIZE" in environment:
        launch = Launch(number("PMI_RANK", 0), number("PMI_SIZE", 1), number("MPI_LOCALNRANKS", 0), "", True)
    elif "SLURM_STEP_NUM_TASKS" in environment:
        tasks = number("SLURM_STEP_NUM_TASKS", 1)
        one_host = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
        job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
        launch = Launch(number("SLURM_PROCID", 0), tasks, tasks if one_host else 1, job, True)
    elif "WORLD_SIZE" in environment and "RANK" in environment:
        size = number("WORLD_SIZE", 1)
        job = ":".join(environment.get(n, "") for n in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
        launch = Launch(number("RANK", 0), size, number("LOCAL_WORLD_SIZE", size), job, False)
    else:
        launch = Launch(0, 1, 1, "", False)
    if launch.rank >= launch.size:
        raise RanksError(f"the environment says rank {launch.rank} of {launch.size}; ranks count from 0")
    return launch


def _counted(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


class _SharedLinks:
    """Ranks of one host: a star of Unix sockets around rank 0, and memory whose descriptor travels over them."""

    def __init__(self, rank: int, size: int, job: str, timeout_s: float) -> None:
        name = "\0tensorwright-" + hashlib.sha256(f"{os.getuid()} {job}".encode()).hexdigest()[:32]
        num_bytes = size * LINE_BYTES + 2 * size * SLOT_BYTES
        if rank == 0:
            self._sockets, descriptor = _gather_ranks(name, size, num_bytes)
        else:
            self._sockets, descriptor = _join_rank_0(name, rank)
        self._rank = rank
        self._memory = mmap.mmap(descriptor, num_bytes)
        os.close(descriptor)
        anchor = ctypes.c_char.from_buffer(self._memory)
        self.native = NativeCommunicator(rank, size, 0, 0, timeout_s, ctypes.addressof(anchor), SLOT_BYTES // 4)
        del anchor  # the map stays until `close`

    def broadcast(self, data: bytes) -> bytes:
        if self._rank > 0:
            length, = struct.unpack("<Q", _receive(self._sockets[0], 8))
            return _receive(self._sockets[0], length)
        for connection in self._sockets:
            _send(connection, struct.pack("<Q", len(data)) + data)
        return data

    def barrier(self) -> None:
        if self._rank > 0:
            _send(self._sockets[0], b"b")
            _receive(self._sockets[0], 1)
            return
        for connection in self._sockets:
            _receive(connection, 1)
        for connection in self._sockets:
            _send(connection, b"b")

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._memory.close()


class _MpiLinks:
    """Ranks on several hosts. The kernels call MPI_Allreduce and MPI_Allgather by address, from worker 0 alone."""

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


def _gather_ranks(name: str, size: int, num_bytes: int) -> tuple[list[socket.socket], int]:
    """Rank 0: accept every other rank and give it the memory. Sockets in rank order."""
    descriptor = os.memfd_create("tensorwright-ranks", os.MFD_CLOEXEC)
    os.truncate(descriptor, num_bytes)
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + MEET_TIMEOUT_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(name)
        except OSError as error:
            raise RanksError(f"another rank 0 of this job is running: {error}") from error
        listener.listen(size)
        while len(found) < size - 1:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(found))
                raise RanksError(f"{size} ranks were launched; ranks {missing} did not come within "
                                 f"{MEET_TIMEOUT_S:.0f} s") from None
            if _peer_user(connection) != os.getuid():
                connection.close()
                continue
            rank, = struct.unpack("<I", _receive(connection, 4))
            found[rank] = connection
            socket.send_fds(connection, [b"m"], [descriptor])
    return [found[rank] for rank in sorted(found)], descriptor


def _join_rank_0(name: str, rank: int) -> tuple[list[socket.socket], int]:
    """Another rank: connect as soon as rank 0 listens, and take the memory."""
    end = time.monotonic() + MEET_TIMEOUT_S
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            connection.connect(name)
            break
        except (ConnectionRefusedError, FileNotFoundError):
            if time.monotonic() > end:
                connection.close()
                raise RanksError(f"rank {rank} found no rank 0 within {MEET_TIMEOUT_S:.0f} s") from None
            time.sleep(0.02)
    if _peer_user(connection) != os.getuid():
        connection.close()
        raise RanksError("the process that answers as rank 0 belongs to another user")
    _send(connection, struct.pack("<I", rank))
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        connection.close()
        raise RanksError("rank 0 ended while the ranks were meeting")
    return [connection], descriptors[0]


def _peer_user(connection: socket.socket) -> int:
    """User id of the process at the other end: abstract sockets have no permissions of their own."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError as error:
        raise RanksError(f"another rank has ended: {error}") from error


def _receive(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        try:
            part = connection.recv(min(size, 1 << 20))
        except OSError as error:
            raise RanksError(f"another rank has ended: {error}") from error
        if not part:
            raise RanksError("another rank has ended", mend="look at that rank's messages, then start all ranks again")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
