"""Finding an engine file that is already what a build would make, so that other limits take seconds.

A build key is a hash over everything that decides the file's bytes: this package's own sources, the checkpoint, the
target. The cache holds only where files with a key were last written; a stale entry is never trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorwright.engine.engine import verify
from tensorwright.engine.format import Reader
from tensorwright.errors import EngineError

_SOURCES = ("builder", "checkpoint", "engine", "kernels", "models", "program", "quantization")


def build_key(facts: Mapping[str, Any], checkpoint_dir: Path) -> str:
    """64 hexadecimal digits. Files of the checkpoint count with name, size, time and their first 64 KiB."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    package = Path(__file__).parent.parent
    for folder in _SOURCES:
        for path in sorted((package / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cuh"):
                digest.update(path.read_bytes())
    digest.update((checkpoint_dir / "config.json").read_bytes())
    for path in sorted(checkpoint_dir.glob("rank*.safetensors")):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def reuse(key: str, rank: int, output: Path, *, tuned: bool) -> bool:
    """Put an engine file with this key at `output`, if a sound one is known. True when it lies there.

    A key says nothing of times: where none are wanted, a tuned file will do; `tuned` asks for one.
    """
    if _is_sound(output, key, tuned):
        return True
    record = _record(key, rank)
    try:
        known = Path(json.loads(record.read_text())["path"])
    except (OSError, ValueError, KeyError):
        return False
    if known == output.resolve() or not _is_sound(known, key, tuned):
        return False
    aside = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        aside.unlink(missing_ok=True)
        try:
            os.link(known, aside)
        except OSError:  # another file system
            shutil.copyfile(known, aside)
        aside.replace(output)
    except OSError:  # no room: building says so with the numbers
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def remember(key: str, rank: int, output: Path) -> None:
    """Note where an engine file lies. Failing to is no error: the next build only takes longer."""
    record = _record(key, rank)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        aside = record.with_name(f".{record.name}.{os.getpid()}")
        aside.write_text(json.dumps({"path": str(output.resolve())}))
        aside.replace(record)
    except OSError:
        return


def _record(key: str, rank: int) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tensorwright" / "engines" / f"{key[:32]}.rank{rank}.json"


def _is_sound(path: Path, key: str, tuned: bool) -> bool:
    """Every section is checked, at gigabytes a second: building again is how a damaged engine is mended."""
    try:
        if not path.is_file() or (reader := Reader(path)).metadata.get("build_key") != key:
            return False
        if tuned and reader.metadata.get("tuned") != "yes":
            return False
        verify(reader)
    except EngineError:
        return False
    return True
