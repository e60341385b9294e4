"""The safetensors format: one file's header in and out, and its tensors in place. It knows no models and no names.

A file is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes without gaps, as described at
https://github.com/huggingface/safetensors. Files are written aside and renamed when they are whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorwright.errors import TensorwrightError

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_ITEM_BYTES = {"BOOL": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "U32": 4, "U64": 8,
               **{name: dtype.itemsize for name, dtype in DTYPES.items()}}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def dtype_code(dtype: np.dtype[Any]) -> str:
    """The format's name of a NumPy dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: the format's dtype name, shape, and first byte, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def row_start(self, row: int) -> int:
        """First byte of a row of the first dimension, counted from the file's start."""
        return self.start + row * (self.num_bytes // max(self.shape[0], 1))


class TensorFile:
    """A safetensors file opened for reading; the header is checked against the file's size at once."""

    def __init__(self, path: Path, error: type[TensorwrightError]) -> None:
        """Raises `error` when the file cannot be read, is no safetensors file, or is shorter than its header says."""
        self.path = path
        self._error = error
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._descriptor).st_size
            header, data_start = self._header(size)
        except OSError as cause:
            raise error(f"{path} cannot be read: {cause.strerror}", mend=f"ls -l {path}") from cause
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = self._entries(header, data_start, size)

    def _damaged(self, what: str) -> TensorwrightError:
        return self._error(f"{self.path} is not a whole safetensors file: {what}",
                           mend=f"fetch the file again, then compare: ls -l {self.path}; sha256sum {self.path}")

    def _header(self, size: int) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise self._damaged(f"its {size} bytes do not hold a header of {length} bytes")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
        except ValueError as cause:
            raise self._damaged(f"the header is not JSON ({cause})") from cause
        if not isinstance(header, dict):
            raise self._damaged("the header is not a JSON object")
        return header, 8 + length

    def _entries(self, header: Mapping[str, Any], data_start: int, size: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        expected = 0
        try:
            spans = sorted((value["data_offsets"][0], value["data_offsets"][1], name) for name, value in header.items())
            for start, stop, name in spans:
                entry = Entry(header[name]["dtype"], tuple(header[name]["shape"]), data_start + start)
                if start != expected or stop - start != entry.num_bytes:
                    raise self._damaged(f"tensor {name} claims bytes {start} to {stop}, expected {expected} to "
                                        f"{expected + entry.num_bytes} for {entry.dtype} {list(entry.shape)}")
                entries[name] = entry
                expected = stop
        except (KeyError, TypeError, IndexError) as cause:
            raise self._damaged(f"the header does not describe tensors as the format does ({cause!r})") from cause
        if size != data_start + expected:
            raise self._damaged(f"the header describes {data_start + expected} bytes, the file has {size}"
                                + (": it was cut short" if size < data_start + expected else ""))
        return entries

    def map(self, name: str) -> Array:
        """A tensor as a read-only view of a memory map of its own, unmapped when the last view is gone."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if not entry.num_bytes:
            return np.empty(entry.shape, dtype)
        raw = np.memmap(self.path, np.uint8, "r", entry.start, (entry.num_bytes,))
        return np.asarray(raw).view(dtype).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor's first dimension, read into memory of their own."""
        entry = self.entries[name]
        rows = np.empty((stop - start, *entry.shape[1:]), DTYPES[entry.dtype])
        buffer = rows.reshape(-1).view(np.uint8).data
        offset = entry.row_start(start)
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if not count:
                raise self._damaged(f"it ended while {name} was read")
            done += count
        return rows

    def prefetch_rows(self, name: str, start: int, stop: int) -> None:
        """Lets the system begin to read rows into its page cache; gives back at once."""
        entry = self.entries[name]
        offset = entry.row_start(start)
        os.posix_fadvise(self._descriptor, offset, entry.row_start(stop) - offset, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the file; maps already given out stay valid."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def layout(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
           metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Entry], int]:
    """Header bytes, entries and total size of a file. Wider dtypes come first, so that every tensor is aligned."""
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    entries: dict[str, Entry] = {}
    end = 0
    for name in order:
        entries[name] = Entry(dtype_code(tensors[name][0]), tensors[name][1], end)
        end += entries[name].num_bytes
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    header |= {name: {"dtype": entry.dtype, "shape": list(entry.shape),
                      "data_offsets": [entry.start, entry.start + entry.num_bytes]} for name, entry in entries.items()}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    start = 8 + len(text)
    shifted = {name: Entry(entry.dtype, entry.shape, start + entry.start) for name, entry in entries.items()}
    return len(text).to_bytes(8, "little") + text, shifted, start + end


def aside(path: Path) -> Path:
    """The name under which a file is written before it is whole."""
    return path.with_name(f".{path.name}.partial")


class TensorFileWriter:
    """A safetensors file being written: header first, then tensors' bytes in any order and from any thread.

    As a context manager it deletes the unfinished file on the way out unless `commit` was called. OSErrors pass.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
                 metadata: Mapping[str, str]) -> None:
        self.path = path
        header, self.entries, self.num_bytes = layout(tensors, metadata)
        self._descriptor = os.open(aside(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._write_at(0, memoryview(header))

    def write(self, name: str, rows: Array, start_row: int = 0) -> None:
        """Writes rows of a tensor, in C order, from `start_row` of its first dimension on."""
        entry = self.entries[name]
        row_bytes = entry.num_bytes // max(entry.shape[0], 1)
        self.write_bytes(name, start_row * row_bytes, np.ascontiguousarray(rows).reshape(-1).view(np.uint8))

    def write_bytes(self, name: str, offset: int, data: Array) -> None:
        """Writes uint8 data into a tensor, from its byte `offset` on."""
        self._write_at(self.entries[name].start + offset, data.data)

    def _write_at(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def commit(self) -> None:
        """Gives the file its name. Call it when every tensor has been written."""
        os.ftruncate(self._descriptor, self.num_bytes)
        self._close()
        aside(self.path).replace(self.path)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._descriptor >= 0:
            self._close()
            aside(self.path).unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a small file whose tensors are all in memory."""
    shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with TensorFileWriter(path, shapes, metadata or {}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
        writer.commit()
