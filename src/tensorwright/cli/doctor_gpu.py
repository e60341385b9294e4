"""The doctor's part for NVIDIA GPUs: what nvidia-smi and the installed packages say, and what does not go together.

It loads no driver and no torch: a machine whose packages contradict each other must still get its answer.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from tensorwright.cli import machine

FIELDS = "name,driver_version,compute_cap,memory.total,memory.free"
NEEDED = ("torch", "cuda-bindings", "nvidia-cuda-nvrtc")
MINIMUM_DRIVER = {12: 525, 13: 580}  # of each CUDA major: NVIDIA's table of minor version compatibility
INSTALL = 'pip install "tensorwright[cuda]"'


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi describes it; memory in MiB."""

    name: str
    driver: str
    capability: str
    total_mib: int
    free_mib: int


def find_gpu() -> Gpu | None:
    """The first GPU; None: there is no driver, or it finds none."""
    answer = machine.first_line("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits")
    words = [word.strip() for word in (answer or "").split(",")]
    if len(words) != 5 or not words[3].isdecimal() or not words[4].isdecimal():
        return None
    return Gpu(words[0], words[1], words[2], int(words[3]), int(words[4]))


def package_version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def problems(gpu: Gpu, version: Callable[[str], str | None] = package_version) -> list[tuple[str, str]]:
    """(What is wrong, what mends it), the first cause first; none: engines can be built and run on this GPU."""
    from tensorwright.kernels.cuda.targets import TARGET_NAMES

    missing = [name for name in NEEDED if version(name) is None]
    found = [(f"no {' and no '.join(missing)}", INSTALL)] if missing else []
    target = f"sm_{gpu.capability.replace('.', '')}"
    if target not in TARGET_NAMES:
        found.append((f"no engines for its compute capability {gpu.capability}",
                      f"a GPU of one of {', '.join(TARGET_NAMES)}"))
    driver, nvrtc = _major(gpu.driver), version("nvidia-cuda-nvrtc")
    for what, cuda in (("torch", torch_cuda(version("torch"))), ("nvidia-cuda-nvrtc", nvrtc)):
        least = MINIMUM_DRIVER.get(_major(cuda)) if cuda else None
        if least is not None and driver < least:
            found.append((f"{what} is of CUDA {cuda}, whose drivers begin at {least}; this one is {gpu.driver}",
                          f"a driver {least} or newer"))
    for name, parts in (("cuda-bindings", 1), ("nvidia-cuda-runtime", 2)):  # calls by major, headers by minor
        other = version(name)
        if nvrtc and other and nvrtc.split(".")[:parts] != other.split(".")[:parts]:
            found.append((f"nvidia-cuda-nvrtc {nvrtc} and {name} {other} are of different toolkits",
                          f"{INSTALL} --force-reinstall"))
    if version("torch") and torch_cuda(version("torch")) is None:
        found.append((f"torch {version('torch')} is without CUDA", f"pip uninstall torch, then {INSTALL}"))
    return found


def torch_cuda(version: str | None) -> str | None:
    """The CUDA that a build of torch is for, such as "13.0" of "2.11.0+cu130"; None: without CUDA, or not told.

    A version without a suffix comes from PyPI, whose builds for Linux have CUDA; which one, only torch itself knows.
    """
    _, plus, build = (version or "").partition("+")
    if not plus:
        return "" if version else None
    digits = build.removeprefix("cu")
    return f"{digits[:-1]}.{digits[-1]}" if build.startswith("cu") and digits.isdecimal() else None


def packages(version: Callable[[str], str | None] = package_version) -> str:
    """The installed ones with their versions."""
    return ", ".join(f"{name} {found}" for name in NEEDED if (found := version(name)) is not None)


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else 0
