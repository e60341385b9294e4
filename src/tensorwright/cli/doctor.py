"""`tensorwright doctor`: what this machine can build and run, and how to get what is missing.

Each check is a function that gives one `Finding`; what is needed, and for what, stands in the finding. Only a missing
thing that the CPU path needs makes the verb fail.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import json
import platform
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tensorwright.cli import doctor_gpu, machine
from tensorwright.cli.options import Parser
from tensorwright.cli.tables import format_bytes, print_table
from tensorwright.errors import TensorwrightError

State = Literal["ok", "missing", "note"]
OLDEST_PYTHON, NEWEST_TRITON_PYTHON = (3, 10), (3, 12)
LITTLE_MEMORY_BYTES = 4 << 30
DISTRIBUTIONS = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "tqdm")


@dataclass(frozen=True)
class Finding:
    """One line. `needed` marks what the CPU path cannot do without; `mend` is a command or a sentence."""

    what: str
    state: State
    found: str
    mend: str = ""
    needed: bool = False


def configure(parser: Parser) -> None:
    """Only the form of the answer can be chosen."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(arguments: argparse.Namespace) -> int:
    """Print every finding. Status 0 when models can be converted, built and run on this CPU."""
    findings = [check() for check in CHECKS]
    works = all(finding.state != "missing" or not finding.needed for finding in findings)
    if arguments.json:
        print(json.dumps({"works": works, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0 if works else 1
    print_table("This machine", [(finding.state, finding.what, finding.found) for finding in findings])
    mends = [(finding.what, finding.mend) for finding in findings if finding.mend]
    if mends:
        print_table("\nTo get more", mends)
    print("\nModels can be converted, built and run on this machine." if works else
          "\nThis machine cannot build and run engines yet: see what is missing above.")
    return 0 if works else 1


def system() -> Finding:
    """Operating system and architecture."""
    name = f"{platform.system()} {platform.machine()}"
    fits = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    return Finding("system", "ok" if fits else "missing", name, needed=True,
                   mend="" if fits else "use Linux on x86-64 or aarch64: nothing else is supported")


def python() -> Finding:
    """Python's version."""
    fits = sys.version_info >= OLDEST_PYTHON
    return Finding("Python", "ok" if fits else "missing", platform.python_version(), needed=True,
                   mend="" if fits else "make a virtual environment with Python 3.10 or later")


def packages() -> Finding:
    """The packages that everything needs."""
    missing = [name for name in DISTRIBUTIONS if importlib.util.find_spec(name) is None]
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in DISTRIBUTIONS if name not in missing)
    return Finding("packages", "missing" if missing else "ok", found or "none", needed=True,
                   mend=f"pip install {' '.join(missing)}" if missing else "")


def compiler() -> Finding:
    """A C++ compiler: to build engines, never to run them."""
    from tensorwright.kernels.cpu.compile import find_compiler

    try:
        command = find_compiler()
    except TensorwrightError as error:
        return Finding("C++ compiler", "missing", "none (needed to build, not to run)", error.mend or "", needed=True)
    return Finding("C++ compiler", "ok", machine.first_line(*command, "--version") or command[0])


def processor() -> Finding:
    """The CPU and the best target for it."""
    found = f"{machine.processor_name()}, {machine.num_processors()} processors"
    try:
        return Finding("processor", "ok", f"{found}, target {best_target()}")
    except TensorwrightError as error:
        return Finding("processor", "missing", found, error.message, needed=True)


def best_target() -> str:
    """The named target that fits this CPU best, with what `native` adds to it."""
    from tensorwright.kernels.cpu.targets import TARGETS, machine_features, resolve_target

    features = machine_features()
    named = next((name for name, target in TARGETS.items()
                  if target.architecture == platform.machine() and set(target.features) <= features), "portable")
    beyond = [name for name in ("avx512_vnni", "avx512_bf16", "avx_vnni") if name in features]
    resolve_target(named)
    return " + ".join([named, *beyond])


def memory() -> Finding:
    """Memory; weights need to fit with KV cache and activations."""
    available, total = machine.available_bytes(), machine.total_bytes()
    found = f"{format_bytes(available)} free of {format_bytes(total)}"
    little = available < LITTLE_MEMORY_BYTES
    return Finding("memory", "note" if little else "ok", found,
                   mend="free memory, or quantise to int4: converting streams, but running needs the weights"
                   if little else "")


def disk() -> Finding:
    """Room in this folder."""
    return Finding("disk", "ok", f"{format_bytes(machine.free_disk_bytes(Path()))} free in {Path.cwd()}")


def launcher() -> Finding:
    """MPI, for more than one rank."""
    missing = [name for name, there in (("mpirun", machine.program("mpirun") is not None),
                                        ("mpi4py", importlib.util.find_spec("mpi4py") is not None)) if not there]
    if missing:
        return Finding("MPI", "note", f"no {' and no '.join(missing)} (only for several ranks)",
                       'pip install "tensorwright[mpi]"')
    return Finding("MPI", "ok", machine.first_line("mpirun", "--version") or "mpirun does not start")


def server() -> Finding:
    """The Triton server that `deploy --start` runs."""
    if importlib.util.find_spec("pytriton") is None:
        return Finding("Triton server", "note", "not installed (only for deploy --start)", _triton_mend())
    problems = []
    if int(importlib.metadata.version("numpy").split(".")[0]) >= 2:
        problems.append(("numpy 2", 'pip install "numpy<2"'))
    if not _has_python_library():
        problems.append(("no libpython", "apt-get install libpython3-dev, or use a Python with its shared library"))
    version = f"nvidia-pytriton {importlib.metadata.version('nvidia-pytriton')}"
    if problems:
        return Finding("Triton server", "note", f"{version}, but {', '.join(what for what, _ in problems)}",
                       "; ".join(mend for _, mend in problems))
    return Finding("Triton server", "ok", version)


def gpu() -> Finding:
    """An NVIDIA GPU with its driver and free memory, and whether driver and packages go together."""
    found = doctor_gpu.find_gpu()
    if found is None:
        able = "built, not run" if doctor_gpu.package_version("nvidia-cuda-nvrtc") else "neither built nor run"
        return Finding("GPU", "note", f"none: GPU engines can be {able} here")
    text = (f"{found.name}, sm_{found.capability.replace('.', '')}, driver {found.driver}, "
            f"{format_bytes(found.free_mib << 20)} free of {format_bytes(found.total_mib << 20)}")
    problems = doctor_gpu.problems(found)
    if problems:
        return Finding("GPU", "note", f"{text}; {'; '.join(what for what, _ in problems)}",
                       "; ".join(dict.fromkeys(mend for _, mend in problems)))
    return Finding("GPU", "ok", f"{text}; {doctor_gpu.packages()}")


CHECKS: tuple[Callable[[], Finding], ...] = (system, python, packages, compiler, processor, memory, disk, launcher,
                                             server, gpu)


def _triton_mend() -> str:
    if sys.version_info[:2] > NEWEST_TRITON_PYTHON or sys.version_info[:2] < (3, 11):
        return 'in an environment with Python 3.11 or 3.12: pip install "tensorwright[triton]"'
    return 'pip install "tensorwright[triton]"'


def _has_python_library() -> bool:
    """Whether libpython exists as a shared library, which Triton's Python backend loads."""
    name = sysconfig.get_config_var("LDLIBRARY") or ""
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/nonexistent")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return (name.endswith(".so") and (folder / name).exists()) or ctypes.util.find_library(version) is not None
