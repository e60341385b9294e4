"""The safetensors format against the safetensors library, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tensorwright.checkpoint.tensor_file import TensorFile, TensorFileWriter, aside, write_tensors
from tensorwright.errors import ModelError

DTYPES = ["float32", "float16", "int8", "uint8", "int32", "int64"]
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text("abc.", min_size=1), st.tuples(st.sampled_from(DTYPES), shapes), max_size=5))
def test_files_go_both_ways_with_the_library(tmp_path_factory: pytest.TempPathFactory, spec: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("files")
    arrays = {name: (np.arange(np.prod(shape)) % 7).astype(dtype).reshape(shape)
              for name, (dtype, shape) in spec.items()}
    write_tensors(folder / "ours", arrays, {"key": "value"})
    save_file(arrays, folder / "theirs", {"key": "value"})
    file = TensorFile(folder / "theirs", ModelError)
    assert file.metadata == {"key": "value"}
    read = load_file(folder / "ours")
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        np.testing.assert_array_equal(file.map(name), array)
        np.testing.assert_array_equal(file.read_rows(name, 0, array.shape[0]), array)


def test_bfloat16_is_read_by_the_library(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the library reads bfloat16 with torch only (pip install 'tensorwright[dev]')")
    array = np.linspace(-2, 2, 64, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(4, 16)
    write_tensors(tmp_path / "file", {"x": array, "y": np.ones(3, np.int8)})
    with safe_open(tmp_path / "file", "pt") as file:
        np.testing.assert_array_equal(file.get_tensor("x").float().numpy(), array.astype(np.float32))
    np.testing.assert_array_equal(TensorFile(tmp_path / "file", ModelError).read_rows("x", 1, 3), array[1:3])


def test_tensors_are_aligned_for_their_dtype(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"a": np.ones(3, np.int8), "b": np.ones(5, np.float32), "c": np.ones(1, np.float16)}
    write_tensors(tmp_path / "file", arrays)
    entries = TensorFile(tmp_path / "file", ModelError).entries
    assert [entries[name].start % size for name, size in (("b", 4), ("c", 2))] == [0, 0]


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyError), TensorFileWriter(path, {"a": (np.dtype(np.int8), (4,))}, {}) as writer:
        assert aside(path).exists()
        writer.write("b", np.ones(4, np.int8))
    assert not list(tmp_path.iterdir())


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"", b"\x01", b"\xff" * 16, (10).to_bytes(8, "little") + b"not json..", header([]),
    header({"a": ENTRY}, b"1234567"), header({"a": ENTRY}, b"123456789"), header({"a": {"dtype": "F32"}}),
    header({"a": {**ENTRY, "dtype": "F17"}}, b"12345678"), header({"a": {**ENTRY, "shape": [3]}}, b"12345678"),
    header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"123456789012"),
    header({"a": {**ENTRY, "data_offsets": [8, 16]}}, b"1234567890123456"),
])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "file", ModelError)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 300), st.integers(0, 255))
def test_a_changed_header_never_does_anything_but_refuse_or_read(tmp_path_factory: pytest.TempPathFactory, place: int,
                                                                 value: int) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    write_tensors(path, {"a": np.ones((4, 4), np.float32), "b": np.ones(8, np.int8)})
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    try:
        TensorFile(path, ModelError)
    except ModelError as error:
        assert error.mend


def test_a_file_that_is_not_there_is_an_error_of_the_tree(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        TensorFile(tmp_path / "none", ModelError)
