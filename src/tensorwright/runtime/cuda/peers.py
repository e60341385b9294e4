"""Memory of this rank's GPU that the other ranks have mapped, and theirs mapped here. It knows no protocol over it."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from cuda.bindings import driver

from tensorwright.errors import EngineError
from tensorwright.kernels.cuda.driver import checked
from tensorwright.runtime.communicator import Communicator

PROBE_BYTES, BUS_ID_BYTES = 32, 32


@dataclass(frozen=True)
class Gpu:
    """A rank's GPU: what tells it from others, and its name on the bus."""

    uuid: str
    bus_id: str


@dataclass(frozen=True)
class PeerMemory:
    """Addresses of every rank's memory as this rank has it mapped; none where `obstacle` says why not."""

    addresses: tuple[int, ...]
    obstacle: str = ""


def current_gpu() -> Gpu:
    """The calling thread's."""
    device = checked(driver.cuCtxGetDevice())
    uuid = bytes(checked(driver.cuDeviceGetUuid(device)).bytes).hex()
    bus_id = bytes(checked(driver.cuDeviceGetPCIBusId(BUS_ID_BYTES, device))).split(b"\0")[0].decode()
    return Gpu(uuid, bus_id)


def share_memory(communicator: Communicator, num_bytes: int) -> PeerMemory:
    """Zeroed memory of this rank that all others can write, and theirs; every rank calls it at the same time.

    Peer access counts as real when every rank has read, through its mapping, a word that the owner has just chosen.
    """
    own = int(checked(driver.cuMemAlloc(num_bytes)))
    word = secrets.token_bytes(PROBE_BYTES)
    checked(driver.cuMemcpyHtoD(own, word, PROBE_BYTES))
    offer = {"bus_id": current_gpu().bus_id, "uuid": current_gpu().uuid, "word": word.hex(), "handle": _handle(own)}
    offers = [json.loads(each) for each in communicator.gather(json.dumps(offer).encode())]
    addresses, obstacle = [own] * communicator.size, ""
    for rank, theirs in enumerate(offers):
        if rank != communicator.rank and not obstacle:
            addresses[rank], obstacle = _map(theirs, offer["uuid"], rank)
    obstacles = [each.decode() for each in communicator.gather(obstacle.encode())]
    found = next((each for each in obstacles if each), "")
    if found:
        for address in {*addresses} - {own, 0}:
            checked(driver.cuIpcCloseMemHandle(address))
        communicator.barrier()  # memory goes after its mappings
        checked(driver.cuMemFree(own))
        return PeerMemory((), found)
    checked(driver.cuMemsetD8(own, 0, num_bytes))
    checked(driver.cuCtxSynchronize())
    communicator.barrier()  # nobody writes before all is zero
    return PeerMemory(tuple(addresses))


def _handle(address: int) -> str:
    """What another process opens the memory by; "": this driver shares none."""
    error, handle = driver.cuIpcGetMemHandle(address)
    return bytes(handle.reserved).hex() if int(error) == 0 else ""


def _map(offer: dict[str, Any], own_uuid: str, rank: int) -> tuple[int, str]:
    """Another rank's memory here; or what is in the way."""
    if not offer["handle"]:
        return 0, f"rank {rank}'s driver shares no memory between processes"
    if offer["uuid"] != own_uuid and not _can_reach(offer["bus_id"]):
        return 0, f"no peer access to rank {rank}'s GPU {offer['bus_id']}"
    handle = driver.CUipcMemHandle()
    handle.reserved = bytes.fromhex(offer["handle"])
    flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    address = 0
    try:
        address = int(checked(driver.cuIpcOpenMemHandle(handle, flag)))
        is_real = _read(address) == bytes.fromhex(offer["word"])
    except EngineError as error:
        return address, f"rank {rank}'s GPU {offer['bus_id']}: {error.message}"
    return address, "" if is_real else f"the memory of rank {rank}'s GPU {offer['bus_id']} reads wrong"


def _can_reach(bus_id: str) -> bool:
    error, device = driver.cuDeviceGetByPCIBusId(bus_id.encode())
    if int(error) != 0:  # this process does not see that GPU
        return False
    own = checked(driver.cuCtxGetDevice())
    return bool(checked(driver.cuDeviceCanAccessPeer(own, device)))


def _read(address: int) -> bytes:
    """The probe's bytes, by way of this GPU's own memory: a copy to the host might take another way."""
    into, word = checked(driver.cuMemAlloc(PROBE_BYTES)), bytearray(PROBE_BYTES)
    try:
        checked(driver.cuMemcpyDtoD(into, address, PROBE_BYTES))
        checked(driver.cuMemcpyDtoH(word, into, PROBE_BYTES))
    finally:
        driver.cuMemFree(into)
    return bytes(word)
