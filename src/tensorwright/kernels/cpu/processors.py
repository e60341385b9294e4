"""The processor's name, and how many threads are worth starting: the physical cores that this process may use.

Two hardware threads of one core share its arithmetic and its memory port, so a second worker there only gets in the way
of the first. A container's quota counts like cores that are not there.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection
from pathlib import Path

SYSTEM = Path("/sys")


def usable_cores(processors: Collection[int] | None = None, system: Path = SYSTEM) -> int:
    """Physical cores among the processors that this process may run on, at most the cgroup's quota; 1 or more."""
    usable = os.sched_getaffinity(0) if processors is None else processors
    cores = {_siblings(processor, system) for processor in usable}
    return max(1, math.ceil(min(len(cores), _quota(system))))


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name or, where the kernel gives none, its numbers; the architecture at least."""
    facts = dict(line.replace("\t", "").split(":", 1) for line in _read(cpuinfo).splitlines() if ":" in line)
    numbers = " ".join(facts[name].strip() for name in ("CPU implementer", "CPU part") if name in facts)
    return facts.get("model name", "").strip() or f"{platform.machine()} {numbers}".strip()


def _siblings(processor: int, system: Path) -> str:
    """What names a processor's core: the list of its hardware threads, or the processor where that is not told."""
    told = _read(system / f"devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    return told or str(processor)


def _quota(system: Path) -> float:
    """Processors' worth of time that the cgroup may use, version 2 or 1."""
    limit, _, period = _read(system / "fs/cgroup/cpu.max").partition(" ")
    if not limit:
        limit = _read(system / "fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _read(system / "fs/cgroup/cpu/cpu.cfs_period_us")
    if not limit.isdigit() or not period.isdigit() or int(period) == 0:  # "max", "-1", or no such file
        return math.inf
    return int(limit) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
