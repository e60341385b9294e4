"""Under what conditions figures were taken: the machine, how busy it is, and how commands read elsewhere."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tensorwright
from tensorwright.cli.machine import num_processors, processor_name, total_bytes

ROOT = Path(__file__).resolve().parent.parent.parent


def conditions(work: Path) -> dict[str, Any]:
    """What a section's figures hold for: when, by which command, on which machine, of which version."""
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": plain(shlex.join(["python", *sys.argv]), work),
            "machine": {"processor": processor_name(), "processors": num_processors(), "memory_bytes": total_bytes(),
                        "kernel": platform.release(), "load_average_before": os.getloadavg()},
            "versions": {"tensorwright": tensorwright.__version__, "commit": _commit(),
                         "python": platform.python_version()}}


def plain(command: str, work: Path) -> str:
    """A command for others to read: without the folders of this machine."""
    for path, name in ((sys.executable, "python"), (str(work), "WORK"), (f"{ROOT}/", "")):
        command = command.replace(path, name)
    return command


def busy_processors(seconds: float = 0.5) -> float:
    """How many processors others keep busy while this program waits; more than a few hundredths spoil a sample."""
    def idle_s() -> float:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for the disk

    before, started = idle_s(), time.monotonic()
    time.sleep(seconds)
    return max(0.0, (os.cpu_count() or 1) - (idle_s() - before) / (time.monotonic() - started))


def fill_page_cache(model: Path) -> None:
    """Read the model's files once, so that no measurement waits for the disk."""
    for file in [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def _commit() -> str:
    """The commit that is checked out, with a mark when files differ from it."""
    answer = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True,
                            check=False)
    return answer.stdout.strip() or "unknown"
