"""The builder's side of CPU targets: C++ through the machine's compiler into one shared object."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorwright.builder.backends import Compiled, Report
from tensorwright.builder.clock import Case, op_cases
from tensorwright.builder.measure import ARITHMETIC_BITS, Stopwatch
from tensorwright.builder.passes import PASSES, Pass
from tensorwright.builder.plan import Plan
from tensorwright.builder.tune import CacheFiles, Tuning, tune
from tensorwright.errors import BuildError, IncompatibleEngineError
from tensorwright.kernels.cpu.compile import compile_shared, compiler_version, engine_source, find_compiler, kernel_text
from tensorwright.kernels.cpu.elf import required_glibc
from tensorwright.kernels.cpu.processors import processor_name, usable_cores
from tensorwright.kernels.cpu.registry import KERNELS
from tensorwright.kernels.cpu.targets import check_target, resolve_target
from tensorwright.kernels.interface import Kernel, Source, Target
from tensorwright.program.program import Program


class CpuClock:
    """`builder.clock.Clock` for this processor."""

    arithmetic_bits: tuple[int, ...] = ARITHMETIC_BITS

    def machine(self) -> str:
        """Processor, threads and compiler."""
        version = compiler_version(find_compiler()).splitlines()
        return f"{processor_name()}, {usable_cores()} threads, {version[0] if version else 'unknown compiler'}"

    def code(self, source: Source) -> str:
        """Headers and function."""
        return kernel_text(source)

    def cases(self, programs: Iterable[Program], target: Target) -> list[Case]:
        """Ops that have a choice."""
        return op_cases(programs, target, KERNELS)

    def start(self, cases: Sequence[Case], target: Target) -> Stopwatch:
        """With all cores."""
        return Stopwatch(cases, target, usable_cores())


def can_measure(target: Target) -> bool:
    """Whether this machine runs the target's code."""
    try:
        check_target(target)
    except IncompatibleEngineError:
        return False
    return True


class CpuBackend:
    """`builder.backends.Backend` for CPUs."""

    kernels: Sequence[Kernel] = KERNELS
    passes: Sequence[tuple[str, Pass]] = PASSES
    rounds_activations = True

    def float8_rows(self, target: Target) -> int:
        """Never: there are no float8 weights."""
        return 0

    def resolve_target(self, name: str) -> Target:
        """See `kernels.cpu.targets`; "cpu" is this machine's, where "native" might be its GPU."""
        return resolve_target("native" if name == "cpu" else name)

    def facts(self, target: Target) -> Mapping[str, Any]:
        """Compiler and processor."""
        return {"compiler": os.environ.get("CXX", ""), "processor": processor_name()}

    def compile(self, plan: Plan) -> Compiled:
        """One shared object for the whole plan."""
        try:
            shared = compile_shared(engine_source(plan.sources), plan.target)
        except OSError as error:
            raise BuildError(f"the kernels could not be compiled: {error.strerror}",
                             mend="make room for temporary files, or set TMPDIR to a folder that has some") from error
        return Compiled(shared, {"glibc": required_glibc(shared), "flags": list(plan.target.flags)})

    def can_measure(self, target: Target) -> bool:
        """Whether this CPU has what the target needs."""
        return can_measure(target)

    def tune(self, programs: Iterable[Program], target: Target, *, measure: bool, files: CacheFiles,
             report: Report) -> Tuning:
        """See `builder.tune`."""
        return tune(programs, target, CpuClock(), measure=measure, files=files, report=report)
