"""Times of tactics as a JSON file, so that a shape is measured once on a machine.

A file holds a table for each machine (processor, threads, compiler). A name in it is a hash of what else a time
depends on: flags, the C++ itself, op, tactic, rows. It knows no op and measures nothing. A file that cannot be read,
or an entry that makes no sense, is never fatal.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorwright.errors import BuildError
from tensorwright.kernels.cpu.compile import cache_folder

FORMAT = "tensorwright-timings-1"


@dataclass(frozen=True)
class Entry:
    """A measured number, and a line about it for people who open the file."""

    value: float
    what: str


Table = dict[str, Entry]


def default_path() -> Path:
    """The file beside the compiled kernels; deleting it is always safe."""
    return cache_folder() / "timings.json"


def entry_name(*parts: str) -> str:
    """The name under which a number of these circumstances is kept."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def load(path: Path) -> tuple[dict[str, Table], list[str]]:
    """The sensible entries of a file by machine, none if there is no file; and notes about what was ignored."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"the timing cache {path} is ignored: {error}"]
    machines = content.get("machines") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(machines, dict) or not all(isinstance(table, dict) for table in machines.values()):
        return {}, [f"the timing cache {path} is ignored: it is not of format {FORMAT}"]
    tables = {machine: {name: entry for name, value in table.items() if (entry := _entry(value)) is not None}
              for machine, table in machines.items()}
    bad = sum(len(machines[machine]) - len(table) for machine, table in tables.items())
    return tables, [f"the timing cache {path} has {bad} entries that make no sense; they are ignored"] if bad else []


def save(path: Path, machine: str, table: Mapping[str, Entry]) -> None:
    """Add a machine's entries to a file, which appears whole or not at all.

    Raises:
        BuildError: it cannot be written.
    """
    tables = load(path)[0]
    tables[machine] = {**tables.get(machine, {}), **table}
    content = {"format": FORMAT, "machines": {name: {key: [entry.value, entry.what] for key, entry in entries.items()}
                                              for name, entries in tables.items()}}
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, indent=0), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise BuildError(f"the timing cache {path} cannot be written: {error.strerror}",
                         mend="give another --output_timing_cache") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def table_for(tables: Mapping[str, Table], names: Collection[str], machine: str | None) -> tuple[str, Table]:
    """A machine and its table: the one asked for or, where any will do (None), the one that knows most of `names`."""
    if machine is None:
        machine = max(tables, key=lambda name: sum(known in tables[name] for known in names), default="")
    return machine, tables.get(machine, {})


@contextlib.contextmanager
def measuring_alone() -> Iterator[None]:
    """Inside the `with`, no other build of this user measures: two would spoil each other's times."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written keeps nobody from building
            cache_folder().mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((cache_folder() / "measuring.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _entry(value: Any) -> Entry | None:
    if not isinstance(value, list) or len(value) != 2 or type(value[0]) not in (int, float):
        return None
    return Entry(float(value[0]), str(value[1])) if math.isfinite(value[0]) and value[0] > 0 else None
