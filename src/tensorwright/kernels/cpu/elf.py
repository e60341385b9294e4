"""What a shared object asks of the system: the libraries it needs and the newest glibc symbol version.

It knows just enough of the 64-bit little-endian ELF format (System V ABI, and the LSB's symbol versioning).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from tensorwright.errors import EngineError

_DYNAMIC, _VERSION_NEEDS = 6, 0x6FFFFFFE  # section types
_NEEDED = 1  # dynamic tag


def needed_libraries(data: bytes) -> tuple[str, ...]:
    """Names of the libraries that must be present, such as ("libm.so.6", "libc.so.6")."""
    found = []
    for kind, offset, size, strings in _sections(data):
        if kind == _DYNAMIC:
            for tag, value in struct.iter_unpack("<qQ", data[offset:offset + size]):
                if tag == _NEEDED:
                    found.append(_text(data, strings + value))
    return tuple(found)


def required_glibc(data: bytes) -> str:
    """The highest GLIBC_x.y version among the needed symbols, such as "2.34"; "0" if there is none."""
    versions = [match for name in _needed_versions(data) if (match := re.fullmatch(r"GLIBC_([\d.]+)", name))]
    return max((m.group(1) for m in versions), key=version_key, default="0")


def version_key(version: str) -> tuple[int, ...]:
    """A version for comparing: "2.34" -> (2, 34)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _needed_versions(data: bytes) -> Iterator[str]:
    for kind, offset, size, strings in _sections(data):
        if kind != _VERSION_NEEDS or not size:
            continue
        while True:
            _, count, _, first, following = struct.unpack_from("<HHIII", data, offset)
            entry = offset + first
            for _ in range(count):
                _, _, _, name, step = struct.unpack_from("<IHHII", data, entry)
                yield _text(data, strings + name)
                entry += step
            if not following:
                break
            offset += following


def _sections(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(type, offset, size, offset of the linked string table) of every section."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise EngineError("the compiled kernels are no 64-bit little-endian ELF file")
    try:
        start, = struct.unpack_from("<Q", data, 0x28)
        width, count = struct.unpack_from("<HH", data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, start + width * index) for index in range(count)]
        for header in headers:
            strings = headers[header[6]][4] if header[6] < count else 0
            yield header[1], header[4], header[5], strings
    except struct.error as error:
        raise EngineError("the compiled kernels are a cut-off ELF file") from error


def _text(data: bytes, offset: int) -> str:
    return data[offset:data.index(b"\0", offset)].decode("ascii", errors="replace")
