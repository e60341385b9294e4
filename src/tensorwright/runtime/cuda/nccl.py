"""NCCL's sums and gathers, by its C interface from the library that torch has loaded. It knows no engine."""

from __future__ import annotations

import ctypes
from typing import Any

from tensorwright.errors import RanksError
from tensorwright.runtime.communicator import Communicator

FLOAT32, SUM = 7, 0  # ncclFloat32, ncclSum of nccl.h
UNIQUE_ID_BYTES = 128


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


class Nccl:
    """A communicator of all ranks, over the current GPU of each."""

    def __init__(self, communicator: Communicator, library: str = "libnccl.so.2") -> None:
        """Every rank makes one at the same time. `library`: its name, which the loader knows once torch is there.

        Raises:
            RanksError: there is no NCCL, or it cannot connect the GPUs.
        """
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise RanksError(f"the ranks' GPUs need NCCL to talk to each other: {error}",
                             mend="pip install 'tensorwright[cuda]'") from None
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        unique_id = _UniqueId()
        if communicator.rank == 0:
            self._check(self._library.ncclGetUniqueId(ctypes.byref(unique_id)))
        name = communicator.broadcast(bytes(unique_id))
        self._handle = ctypes.c_void_p()
        self._check(self._library.ncclCommInitRank(
            ctypes.byref(self._handle), ctypes.c_int(communicator.size), _UniqueId.from_buffer_copy(name),
            ctypes.c_int(communicator.rank)))

    def all_reduce(self, x: int, y: int, count: int, stream: int) -> None:
        """Sums of float32 numbers at address x into y; the same bits on every rank."""
        self._check(self._library.ncclAllReduce(
            ctypes.c_void_p(x), ctypes.c_void_p(y), ctypes.c_size_t(count), FLOAT32, SUM, self._handle,
            ctypes.c_void_p(stream)))

    def all_gather(self, x: int, y: int, count: int, stream: int) -> None:
        """`count` float32 numbers of each rank from x, one rank after the other, into y."""
        self._check(self._library.ncclAllGather(
            ctypes.c_void_p(x), ctypes.c_void_p(y), ctypes.c_size_t(count), FLOAT32, self._handle,
            ctypes.c_void_p(stream)))

    def abort(self) -> None:
        """End what waits for another rank; nothing can be asked of it afterwards."""
        self._library.ncclCommAbort(self._handle)

    def _check(self, result: Any) -> None:
        if result:
            what = self._library.ncclGetErrorString(result).decode()
            raise RanksError(f"NCCL answered {what!r}", mend="NCCL_DEBUG=WARN says more; then start all ranks again")
