"""Facts of this machine: memory, disk, processors and programs. It reads /proc and PATH, and judges nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

CGROUP_FILES = (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
                 "/sys/fs/cgroup/memory/memory.stat"))


def available_bytes() -> int:
    """Memory that a new process can use without swapping, inside this container's limit."""
    return min([_meminfo("MemAvailable"), *_container_room()])


def total_bytes() -> int:
    """Memory of the machine."""
    return _meminfo("MemTotal")


def num_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def processor_name() -> str:
    """The model name that the kernel gives, or the architecture."""
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def peak_memory_bytes() -> int:
    """The most memory this process has had resident."""
    return _own_memory("VmHWM")


def resident_bytes() -> int:
    """The memory this process has resident now."""
    return _own_memory("VmRSS")


def free_disk_bytes(directory: Path) -> int:
    """Room on the file system of a directory."""
    return shutil.disk_usage(directory).free


def program(name: str) -> str | None:
    """Where a program is: beside this Python first, as a package installs it, then on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def first_line(*command: str) -> str | None:
    """The first line that a program prints, or None when it is missing or fails."""
    try:
        result = subprocess.run([program(command[0]) or command[0], *command[1:]], capture_output=True, text=True,
                                timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (result.stdout or result.stderr).strip().splitlines()
    return lines[0] if lines else ""


def _own_memory(name: str) -> int:
    for line in _text("/proc/self/status").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _meminfo(name: str) -> int:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _container_room() -> list[int]:
    """Bytes left under the cgroup's limit, counting file pages, which can be dropped, as free."""
    for limit_file, used_file, stat_file in CGROUP_FILES:
        limit, used = _text(limit_file).strip(), _text(used_file).strip()
        if limit.isdigit() and used.isdigit():
            stat = dict(line.split() for line in _text(stat_file).splitlines())
            return [max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))]
    return []


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def free_gpu_bytes() -> int | None:
    """Memory of the first GPU that nobody has taken; None: there is no GPU."""
    answer = first_line("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
    return int(answer) << 20 if answer and answer.isdecimal() else None
