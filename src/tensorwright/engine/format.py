"""The engine file: a safetensors file of U8 sections, each padded to pages so that it is used in place when mapped.

Layout: 8 bytes of header length, a JSON header padded with spaces to a page, then the sections back to back. Every
safetensors reader opens it (format: https://github.com/huggingface/safetensors). `__metadata__` holds what is checked
before anything else is read. This file knows bytes and checksums; `engine.py` knows what the sections mean.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.errors import EngineError

PAGE = 4096
FORMAT_VERSION = 2  # 1: a step had one tactic for every number of rows
MANIFEST, KERNELS = "manifest.json", "kernels.so"
_ZEROS = "0" * 64
Bytes = NDArray[np.uint8]


class Writer:
    """Writes an engine file section by section, beside its place; `finish` puts it there whole."""

    def __init__(self, path: Path, num_sections: int) -> None:
        self._path = path
        self._aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._reserved = _padded(8 + 4096 + 256 * num_sections)
        self._sections: dict[str, tuple[int, int]] = {}
        self._end = 0
        self.checksums: dict[str, int] = {}
        self._file = self._aside.open("wb")
        self._file.seek(self._reserved)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._file.close()  # may fail too, where a full disk stopped the write before it
        finally:
            self._aside.unlink(missing_ok=True)

    def add(self, name: str, content: Bytes | bytes) -> None:
        """Append a section. Its zero padding belongs to it, and to its checksum."""
        view = memoryview(content) if isinstance(content, bytes) else content.data
        size = view.nbytes
        padding = b"\0" * (_padded(size) - size)
        self._file.write(view)
        self._file.write(padding)
        self.checksums[name] = zlib.crc32(padding, zlib.crc32(view))
        self._sections[name] = (self._end, self._end + size + len(padding))
        self._end += size + len(padding)

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write the header and move the file to its place. Gives its size in bytes."""
        header = _header(self._sections, {**metadata, "header_sha256": _ZEROS}, self._reserved - 8)
        digest = hashlib.sha256(header).hexdigest()
        header = header.replace(_ZEROS.encode(), digest.encode(), 1)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little"))
        self._file.write(header)
        self._file.close()
        self._aside.replace(self._path)
        return self._reserved + self._end


def _padded(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _header(sections: Mapping[str, tuple[int, int]], metadata: Mapping[str, str], size: int) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, (start, end) in sections.items():
        table[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    if len(text) > size:
        raise EngineError(f"the engine's header needs {len(text)} bytes, {size} were kept for it")
    return text.ljust(size)


class Reader:
    """A mapped engine file. Opening it checks the header's own hash and the file's length, and reads no section."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise EngineError(f"there is no engine file {path}", mend="tensorwright build --checkpoint_dir C "
                              f"--output_dir {path.parent}") from None
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be mapped: {error}",
                              mend="copy the engine again, or rebuild it with tensorwright build") from None
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self.metadata, self._sections, self._start = _read_header(path, self._bytes)

    @property
    def names(self) -> list[str]:
        """Names of all sections, in file order."""
        return list(self._sections)

    def section(self, name: str) -> Bytes:
        """A section's bytes, padding included, in the mapped file: never copied."""
        if name not in self._sections:
            raise EngineError(f"{self.path} has no section {name}", mend="rebuild the engine with tensorwright build")
        start, end = self._sections[name]
        return self._bytes[self._start + start:self._start + end]

    def offset(self, name: str) -> int:
        """Where a section begins in the file, for those who read instead of mapping."""
        return self._start + self._sections[name][0]

    def checked(self, name: str) -> bytes:
        """A small section after checking the SHA-256 that the header holds for it."""
        content = self.section(name).tobytes()
        expected = self.metadata.get(f"{name}.sha256", "")
        if hashlib.sha256(content).hexdigest() != expected:
            raise EngineError(f"{self.path}: section {name} is damaged (its SHA-256 is not the one in the header)",
                              mend="rebuild the engine with tensorwright build, or copy it again")
        return content

    def damaged_sections(self, checksums: Mapping[str, int]) -> list[str]:
        """Names of sections whose CRC-32 is not the given one. Reads the whole file."""
        return [name for name, expected in checksums.items() if zlib.crc32(self.section(name).data) != expected]


def _read_header(path: Path, content: Bytes) -> tuple[dict[str, str], dict[str, tuple[int, int]], int]:
    damaged = EngineError(f"{path} is not an engine file or its header is damaged",
                          mend="rebuild the engine with tensorwright build, or copy it again")
    size = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or size > len(content) - 8 or size > 1 << 30:
        raise damaged
    header = content[8:8 + size].tobytes()
    try:
        table = json.loads(header)
        metadata = {str(key): str(value) for key, value in table.pop("__metadata__").items()}
        sections = {name: (int(s["data_offsets"][0]), int(s["data_offsets"][1])) for name, s in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise damaged from None
    digest = metadata.get("header_sha256", "")
    plain = header.replace(digest.encode(), _ZEROS.encode(), 1)
    if len(digest) != 64 or hashlib.sha256(plain).hexdigest() != digest:
        raise damaged
    end = 0
    for start, stop in sorted(sections.values()):  # back to back, as the format asks: none reaches outside the file
        if start != end or stop < start:
            raise damaged
        end = stop
    if 8 + size + end != len(content):
        raise EngineError(f"{path} has {len(content)} bytes, its header says {8 + size + end}: it was cut or not "
                          "copied whole", mend="copy the engine again, or rebuild it with tensorwright build")
    return metadata, sections, 8 + size
