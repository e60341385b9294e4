"""The machines that CPU engines are built for: compiler flags, and what a CPU must have to run the code.

It knows instruction sets and how /proc/cpuinfo names them. It does not run the kernels or read engine files.
Compilers may only emit instructions whose features stand in `Target.features`: that is why "native" is spelled out
as a base level and extensions instead of -march=native.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from tensorwright.errors import BuildError, IncompatibleEngineError, UsageError
from tensorwright.kernels.interface import Target

X86_64_V2 = ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3")
X86_64_V3 = (*X86_64_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
X86_64_V4 = (*X86_64_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
ARMV8_2 = ("asimd", "asimddp", "asimdhp", "fphp")

# Compiler macro -> (flag, feature): what kernels use beyond the base level.
X86_EXTENSIONS = {
    "__AVX512VNNI__": ("-mavx512vnni", "avx512_vnni"),
    "__AVX512BF16__": ("-mavx512bf16", "avx512_bf16"),
    "__AVXVNNI__": ("-mavxvnni", "avx_vnni"),
}

TARGETS: Mapping[str, Target] = {
    "x86-64-v4": Target("x86-64-v4", "x86_64", ("-march=x86-64-v4", "-mprefer-vector-width=512"), X86_64_V4),
    "x86-64-v3": Target("x86-64-v3", "x86_64", ("-march=x86-64-v3",), X86_64_V3),
    "aarch64": Target("aarch64", "aarch64", ("-march=armv8.2-a+dotprod+fp16",), ARMV8_2),
}
PORTABLE: Mapping[str, Target] = {
    "x86_64": Target("portable", "x86_64", ("-march=x86-64-v2",), X86_64_V2),
    "aarch64": Target("portable", "aarch64", ("-march=armv8-a",), ("asimd",)),
}
TARGET_NAMES = ("native", "x86-64-v4", "x86-64-v3", "aarch64", "portable")


def resolve_target(name: str) -> Target:
    """The target of that name; "native" and "portable" depend on the machine that asks.

    Raises:
        UsageError: no such target, or a machine that is neither x86-64 nor aarch64 Linux.
    """
    if name in TARGETS:
        return TARGETS[name]
    machine = _machine()
    if name == "portable":
        return PORTABLE[machine]
    if name == "native":
        return _native(machine)
    raise UsageError(f"unknown target {name!r}; expected one of {', '.join(TARGET_NAMES)}")


def machine_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What this machine's CPU has, by the names of /proc/cpuinfo."""
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def check_target(target: Target, *, engine: str = "ENGINE_DIR", machine: str | None = None,
                 features: Collection[str] | None = None) -> None:
    """Refuse a target whose code this machine cannot run, before any of it is loaded.

    Raises:
        IncompatibleEngineError: another architecture, or missing CPU features, named in the message.
    """
    here = machine or platform.machine()
    mend = f"tensorwright build --rebuild_kernels {engine} --target native"
    if here != target.architecture or platform.system() != "Linux":
        raise IncompatibleEngineError(
            f"the engine was built for target {target.name} ({target.architecture} Linux); "
            f"this machine is {here} {platform.system()}", mend=mend)
    missing = sorted(set(target.features) - set(machine_features() if features is None else features))
    if missing:
        raise IncompatibleEngineError(
            f"the engine was built for target {target.name}; this CPU lacks {', '.join(missing)}", mend=mend)


def _machine() -> str:
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in PORTABLE:
        raise UsageError(f"CPU engines run on x86-64 and aarch64 Linux; this is {machine} {platform.system()}")
    return machine


@functools.lru_cache(maxsize=4)
def _native(machine: str) -> Target:
    macros = _native_macros()
    if machine == "aarch64":
        has_base = {"__ARM_FEATURE_DOTPROD", "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC"} <= macros
        base = TARGETS["aarch64"] if has_base else PORTABLE["aarch64"]
        return Target("native", machine, (*base.flags, "-mtune=native"), base.features)
    level = next((TARGETS[name] for name, macro in (("x86-64-v4", "__AVX512VL__"), ("x86-64-v3", "__AVX2__"))
                  if macro in macros and set(TARGETS[name].features) <= machine_features()), PORTABLE[machine])
    wide = level.name == "x86-64-v4"
    extensions = [names for macro, names in X86_EXTENSIONS.items()
                  if macro in macros and names[1] in machine_features() and (wide or macro == "__AVXVNNI__")]
    flags = (*level.flags, *(flag for flag, _ in extensions), "-mtune=native")
    return Target("native", machine, flags, (*level.features, *(feature for _, feature in extensions)))


def _native_macros() -> frozenset[str]:
    from tensorwright.kernels.cpu.compile import find_compiler

    command = [*find_compiler(), "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"the compiler does not know this CPU: {' '.join(command)}\n{result.stderr[:500]}",
                         mend="tensorwright build --target x86-64-v3 ...")
    return frozenset(line.split()[1] for line in result.stdout.splitlines() if line.startswith("#define"))
