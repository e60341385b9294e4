"""Result files: looked at before the work that fills them, then written whole or not at all. It knows no contents."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tensorwright.errors import TensorwrightError


def check_place(path: Path) -> None:
    """Make the parent folders, and raise an error of the tree where no file could be written at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None
    if path.is_dir():
        raise _unwritable(path, "it is a folder")
    if not os.access(path if _is_stream(path) else path.parent, os.W_OK):
        raise _unwritable(path, "no permission")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write aside and rename; into pipes and devices such as /dev/stdout, write what there is to write at once."""
    try:
        if _is_stream(path):
            content = io.BytesIO()  # NumPy wants to seek
            write(content)
            with path.open("ab") as file:  # /dev/stdout may be a file that already holds lines
                file.write(content.getbuffer())
        else:
            _write_aside(path.resolve(), write)  # a link stays a link
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def _write_aside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            write(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    return path.is_relative_to("/dev") or (path.exists() and not path.is_file())


def _unwritable(path: Path, why: str | None) -> TensorwrightError:
    return TensorwrightError(f"{path} cannot be written: {why}", mend=f"df -h {path.parent}; ls -ld {path.parent}")
