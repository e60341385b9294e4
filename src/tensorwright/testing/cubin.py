"""Reads what a cubin says of its kernels' parameters, so that launches can be checked without a GPU.

A cubin is an ELF file; `.nv.info.<kernel>` holds attributes: a format byte, a number, and a value or a length. In it,
number 0x17 describes one parameter: its place among them, its offset and its size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

PARAMETER, HAS_PAYLOAD = 0x17, 4


def parameter_sizes(cubin: bytes) -> dict[str, list[int]]:
    """Bytes of each parameter, by the kernels' symbols."""
    prefix = ".nv.info."
    return {name.removeprefix(prefix): _sizes(data) for name, data in _sections(cubin) if name.startswith(prefix)}


def argument_sizes(arguments: Sequence[str | float | tuple[str | float, ...]]) -> list[int]:
    """What a launch hands over for each of its arguments (`kernels.cuda.launch`)."""
    return [_structure(argument if isinstance(argument, tuple) else (argument,)) for argument in arguments]


def _structure(fields: tuple[str | float, ...]) -> int:
    sizes = [8 if isinstance(field, str) and not field.startswith("sizes.") else 4 for field in fields]
    end = 0
    for size in sizes:
        end = -(-end // size) * size + size
    return -(-end // max(sizes)) * max(sizes)


def _sizes(info: bytes) -> list[int]:
    sizes, at = {}, 0
    while at + 4 <= len(info):
        form, number, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == HAS_PAYLOAD:
            if number == PARAMETER:
                _, ordinal, _, bits = struct.unpack_from("<IHHI", info, at)
                sizes[ordinal] = bits >> 18
            at += value
    return [sizes[ordinal] for ordinal in sorted(sizes)]


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    table, = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    names = elf[headers[names_at][4]:headers[names_at][4] + headers[names_at][5]]
    for name, _, _, _, start, length in headers:
        yield names[name:names.index(b"\0", name)].decode(), elf[start:start + length]
