"""Result files: checked before the work, whole or not there, and links and pipes stay what they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tensorwright.cli.files import check_place, write_whole
from tensorwright.errors import TensorwrightError


def test_missing_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out.csv"
    check_place(path)
    write_whole(path, lambda file: file.write(b"1,2\n"))
    assert path.read_bytes() == b"1,2\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["out.csv"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(TensorwrightError, match="out.csv cannot be written: No space left"):
        write_whole(path, fail)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("out.csv", "old")]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    for text in (b"one", b"two"):
        write_whole(tmp_path / "link", lambda file, text=text: file.write(text))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"two"


def test_a_pipe_takes_arrays(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    check_place(pipe)
    write_whole(pipe, lambda file: np.save(file, np.arange(3)))
    reader.join(10)
    assert got[0].startswith(b"\x93NUMPY")


def test_places_that_take_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "out"):
        with pytest.raises(TensorwrightError, match="cannot be written") as caught:
            check_place(path)
        assert "ls -ld" in (caught.value.mend or "")
