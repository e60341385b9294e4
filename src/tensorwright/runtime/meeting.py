"""How ranks of one host meet at an abstract Unix socket and pass bytes over it. It knows no launcher."""

from __future__ import annotations

import os
import socket
import struct
import time

from tensorwright.errors import RanksError

MEET_TIMEOUT_S = 120.0


def gather_ranks(name: str, size: int, num_bytes: int) -> tuple[list[socket.socket], int]:
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
            rank, = struct.unpack("<I", receive(connection, 4))
            found[rank] = connection
            socket.send_fds(connection, [b"m"], [descriptor])
    return [found[rank] for rank in sorted(found)], descriptor


def join_rank_0(name: str, rank: int) -> tuple[list[socket.socket], int]:
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
    send(connection, struct.pack("<I", rank))
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        connection.close()
        raise RanksError("rank 0 ended while the ranks were meeting")
    return [connection], descriptors[0]


def _peer_user(connection: socket.socket) -> int:
    """User id of the process at the other end: abstract sockets have no permissions of their own."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def send(connection: socket.socket, data: bytes) -> None:
    """All of the bytes. Raises RanksError where nobody takes them any more."""
    try:
        connection.sendall(data)
    except OSError as error:
        raise RanksError(f"another rank has ended: {error}") from error


def receive_counted(connection: socket.socket) -> bytes:
    """A length of 8 bytes and so many bytes after it, together."""
    head = receive(connection, 8)
    return head + receive(connection, struct.unpack("<Q", head)[0])


def counted_parts(data: bytes) -> list[bytes]:
    """What stands behind each length, where several such stand one after the other."""
    parts = []
    while data:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        parts.append(data[8:end])
        data = data[end:]
    return parts


def receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises RanksError where the other end closes before."""
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
