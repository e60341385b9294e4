"""The engine file: what was written is read back in place, every safetensors reader opens it, damage is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tensorwright.engine.format import PAGE, Reader, Writer
from tensorwright.errors import EngineError, TensorwrightError

NAMES = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
SECTIONS = st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), st.binary(max_size=3 * PAGE),
                           min_size=1, max_size=5)


def write(path: Path, sections: dict[str, bytes], **metadata: str) -> dict[str, int]:
    with Writer(path, len(sections)) as writer:
        for name, content in sections.items():
            writer.add(name, content)
        writer.finish(metadata)
        return writer.checksums


@settings(max_examples=50, deadline=None)
@given(sections=SECTIONS)
def test_sections_come_back_in_place(tmp_path_factory: pytest.TempPathFactory, sections: dict[str, bytes]) -> None:
    path = tmp_path_factory.mktemp("engine") / "rank0.engine"
    checksums = write(path, sections, builder="test")
    reader = Reader(path)
    assert reader.metadata["builder"] == "test"
    assert reader.names == list(sections)
    for name, content in sections.items():
        section = reader.section(name)
        assert section[:len(content)].tobytes() == content
        assert not section[len(content):].any()
        assert section.size % PAGE == 0
        assert section.size == 0 or section.ctypes.data % PAGE == 0
    assert reader.damaged_sections(checksums) == []
    assert set(load_file(path)) == set(sections)
    assert list(path.parent.iterdir()) == [path]


def engine(path: Path) -> dict[str, int]:
    code = bytes(range(256)) * 20
    padded = code + b"\0" * (-len(code) % PAGE)
    return write(path, {"weights/a": b"w" * 5000, "kernels.so": code},
                 **{"kernels.so.sha256": hashlib.sha256(padded).hexdigest()})


@settings(max_examples=60, deadline=None)
@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("engine") / "rank0.engine"
    checksums = engine(path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        reader = Reader(path)
        reader.checked("kernels.so")
    except TensorwrightError as error:
        assert str(path) in str(error)
        return
    assert reader.damaged_sections(checksums) == ["weights/a"]


@pytest.mark.parametrize("size", [0, 7, 100, 4096, 10_000])
def test_a_cut_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rank0.engine"
    engine(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(EngineError):
        Reader(path)


def section(name: str, start: float, stop: int) -> str:
    return json.dumps({name: {"dtype": "U8", "shape": [PAGE], "data_offsets": [start, stop]}})[1:-1]


@pytest.mark.parametrize("sections", [
    section("a", -100, PAGE), section("a", -10**30, PAGE), f"{section('a', PAGE, 0)}, {section('b', 0, PAGE)}",
    f"{section('a', 0, PAGE)}, {section('b', 0, PAGE)}", section("a", 8, PAGE), section("a", float("inf"), PAGE),
    '"a": {}', '"__metadata__": 5', '"a": ' + "[" * 100_000 + "]" * 100_000,
])
def test_a_senseless_header_with_the_right_hash_is_refused(tmp_path: Path, sections: str) -> None:
    zeros = "0" * 64
    header = f'{{"__metadata__": {{"header_sha256": "{zeros}"}}, {sections}}}'.encode()
    header = header.replace(zeros.encode(), hashlib.sha256(header).hexdigest().encode(), 1)
    path = tmp_path / "rank0.engine"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(PAGE))
    with pytest.raises(EngineError, match="damaged"):
        Reader(path)


def test_a_missing_file_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="tensorwright build"):
        Reader(tmp_path / "rank0.engine")


def test_another_safetensors_file_is_no_engine(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(EngineError, match="not an engine"):
        Reader(path)


def test_a_stopped_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "rank0.engine", 1) as writer:
        writer.add("weights/a", b"1234")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
