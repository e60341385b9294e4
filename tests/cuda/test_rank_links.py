"""What ranks on GPUs agree on before any kernel runs: NCCL's C interface, and whose memory can be reached.

Ranks are threads here. NCCL is a few functions in C++, the CUDA driver a few in Python.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorwright.errors import EngineError, RanksError

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.driver", reason="needs the package cuda-bindings")
RANKS, NUM_BYTES = 3, 4096

NCCL = """
#include <cstring>
#include <cstddef>
struct Id { char bytes[128]; };
struct Comm { int ranks, rank, sum; };
static bool aborted = false;
extern "C" {
int ncclGetUniqueId(Id* id) { for (int i = 0; i < 128; i++) id->bytes[i] = i; return 0; }
int ncclCommInitRank(Comm** comm, int ranks, Id id, int rank) {
  for (int i = 0; i < 128; i++) if (id.bytes[i] != i) return 4;
  *comm = new Comm{ranks, rank, 0};
  return 0;
}
int ncclAllReduce(const float* x, float* y, size_t count, int type, int op, Comm* comm, void* stream) {
  if (type != 7 || op != 0 || stream != (void*)64) return 5;
  for (size_t i = 0; i < count; i++) y[i] = x[i] * comm->ranks + comm->rank;
  return 0;
}
int ncclAllGather(const float* x, float* y, size_t count, int type, Comm* comm, void* stream) {
  if (type != 7 || stream != (void*)64) return 5;
  for (int r = 0; r < comm->ranks; r++) memcpy(y + r * count, x, 4 * count);
  return 0;
}
int ncclCommAbort(Comm* comm) { comm->ranks = 0; return 0; }
const char* ncclGetErrorString(int result) { return result == 5 ? "invalid usage" : "invalid argument"; }
}
"""


@dataclass
class Meeting:
    """What threads exchange."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(RANKS))
    data: list[bytes] = field(default_factory=lambda: [b""] * RANKS)


@dataclass
class ThreadCommunicator:
    """`runtime.communicator.Communicator` of a thread."""

    rank: int
    meeting: Meeting
    size: int = RANKS

    def gather(self, data: bytes) -> list[bytes]:
        self.meeting.data[self.rank] = data
        self.meeting.barrier.wait(10)
        found = list(self.meeting.data)
        self.meeting.barrier.wait(10)
        return found

    def broadcast(self, data: bytes = b"") -> bytes:
        return self.gather(data)[0]

    def barrier(self) -> None:
        self.gather(b"")


def on_ranks(run: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """What each rank's thread gives."""
    meeting = Meeting()
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(lambda rank: run(ThreadCommunicator(rank, meeting)), range(RANKS)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("nccl")
    (folder / "nccl.cpp").write_text(NCCL)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "nccl.so", folder / "nccl.cpp"], check=True)
    return str(folder / "nccl.so")


def test_nccl_gets_its_arguments_as_its_header_says(library: str) -> None:
    from tensorwright.runtime.cuda.nccl import Nccl

    x, y = np.arange(5, dtype=np.float32), np.zeros((RANKS, RANKS * 5), np.float32)
    for rank, each in enumerate(on_ranks(lambda communicator: Nccl(communicator, library))):
        each.all_reduce(x.ctypes.data, y[rank].ctypes.data, 5, 64)
        np.testing.assert_array_equal(y[rank, :5], x * RANKS + rank)
        each.all_gather(x.ctypes.data, y[rank].ctypes.data, 5, 64)
        np.testing.assert_array_equal(y[rank], np.tile(x, RANKS))
        with pytest.raises(RanksError, match="invalid usage"):
            each.all_reduce(x.ctypes.data, y[rank].ctypes.data, 5, 0)
        each.abort()


def test_missing_nccl_is_said() -> None:
    from tensorwright.runtime.cuda.nccl import Nccl

    with pytest.raises(RanksError, match="no-nccl"):
        Nccl(ThreadCommunicator(0, Meeting()), "libno-nccl.so")


class FakeDriver:
    """Ranks' memory in one table, by addresses that are each rank's own: the top digits say who has it mapped."""

    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=1)
    CUipcMemHandle = SimpleNamespace

    def __init__(self, *, unreachable: str = "", wrong: int = -1) -> None:
        """`unreachable`: the bus of a GPU without peer access; `wrong`: the rank whose handle leads elsewhere."""
        self.memory: dict[int, bytearray] = {}
        self.open: list[tuple[int, int]] = []
        self._unreachable, self._wrong, self._local = unreachable, wrong, threading.local()

    def enter(self, rank: int) -> None:
        """The calling thread is this rank's."""
        self._local.rank = rank

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return 0, self._local.rank

    def cuDeviceGetUuid(self, device: int) -> tuple[int, SimpleNamespace]:
        return 0, SimpleNamespace(bytes=bytes([device]) * 16)

    def cuDeviceGetPCIBusId(self, length: int, device: int) -> tuple[int, bytes]:
        return 0, f"bus {device}".encode().ljust(length, b"\0")

    def cuDeviceGetByPCIBusId(self, name: bytes) -> tuple[int, int]:
        return 0, int(name.split()[1])

    def cuDeviceCanAccessPeer(self, own: int, other: int) -> tuple[int, int]:
        return 0, int(f"bus {other}" != self._unreachable)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        address = (self._local.rank + 1 << 20) + len(self.memory)
        self.memory[address] = bytearray(b"\xff" * size)
        return 0, address

    def cuMemFree(self, address: int) -> tuple[int]:
        assert all(opened != address for _, opened in self.open), "freed while another rank has it mapped"
        del self.memory[address]
        return (0,)

    def cuMemcpyHtoD(self, address: int, data: bytes, size: int) -> tuple[int]:
        self.memory[address][:size] = data[:size]
        return (0,)

    def cuMemcpyDtoH(self, into: bytearray, address: int, size: int) -> tuple[int]:
        into[:size] = self.memory[address][:size]
        return (0,)

    def cuMemcpyDtoD(self, into: int, address: int, size: int) -> tuple[int]:
        self.memory[into][:size] = self.memory[address % (1 << 30)][:size]
        return (0,)

    def cuMemsetD8(self, address: int, value: int, size: int) -> tuple[int]:
        self.memory[address][:size] = bytes([value]) * size
        return (0,)

    def cuIpcGetMemHandle(self, address: int) -> tuple[int, SimpleNamespace]:
        return 0, SimpleNamespace(reserved=address.to_bytes(64, "little"))

    def cuIpcOpenMemHandle(self, handle: SimpleNamespace, flags: int) -> tuple[int, int]:
        address = int.from_bytes(handle.reserved, "little")
        if (address >> 20) - 1 == self._wrong:
            address = next(each for each in self.memory if each >> 20 == self._local.rank + 1)
        self.open.append((self._local.rank, address))
        return 0, (self._local.rank + 1 << 30) + address

    def cuIpcCloseMemHandle(self, mapped: int) -> tuple[int]:
        self.open.remove((self._local.rank, mapped % (1 << 30)))
        return (0,)

    def cuCtxSynchronize(self) -> tuple[int]:
        return (0,)


def shared(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from tensorwright.runtime.cuda import peers

    def checked(result: tuple[Any, ...]) -> Any:
        if result[0]:
            raise EngineError("the driver failed")
        return result[1] if len(result) == 2 else None

    monkeypatch.setattr(peers, "driver", driver)
    monkeypatch.setattr(peers, "checked", checked)

    def run(communicator: ThreadCommunicator) -> Any:
        driver.enter(communicator.rank)
        return peers.share_memory(communicator, NUM_BYTES)

    return on_ranks(run)


def test_every_rank_reaches_every_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    found = shared(driver, monkeypatch)
    assert all(not memory.obstacle and len(memory.addresses) == RANKS for memory in found)
    for rank, memory in enumerate(found):
        owners = [(address % (1 << 30) >> 20) - 1 for address in memory.addresses]
        assert owners == list(range(RANKS))
        assert [address >> 30 == 0 for address in memory.addresses] == [each == rank for each in range(RANKS)]
    assert len(driver.memory) == RANKS and not any(map(any, driver.memory.values()))


@pytest.mark.parametrize(("broken", "said"), [({"unreachable": "bus 1"}, "no peer access to rank 1"),
                                              ({"wrong": 2}, "rank 2's GPU bus 2 reads wrong")])
def test_what_one_rank_cannot_reach_none_uses(broken: dict[str, Any], said: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(**broken)
    found = shared(driver, monkeypatch)
    assert [memory.addresses for memory in found] == [()] * RANKS
    assert all(said in memory.obstacle for memory in found)
    assert not driver.memory and not driver.open
