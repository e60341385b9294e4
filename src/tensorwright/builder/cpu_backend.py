"""The builder's side of CPU targets: C++ through the machine's compiler into one shared object."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorwright.builder.backends import Compiled, Report
from tensorwright.builder.passes import PASSES, Pass
from tensorwright.builder.plan import Plan
from tensorwright.builder.tune import CacheFiles, Tuning, can_measure, tune
from tensorwright.errors import BuildError
from tensorwright.kernels.cpu.compile import compile_shared, engine_source
from tensorwright.kernels.cpu.elf import required_glibc
from tensorwright.kernels.cpu.processors import processor_name
from tensorwright.kernels.cpu.registry import KERNELS
from tensorwright.kernels.cpu.targets import resolve_target
from tensorwright.kernels.interface import Kernel, Target
from tensorwright.program.program import Program


class CpuBackend:
    """`builder.backends.Backend` for CPUs."""

    kernels: Sequence[Kernel] = KERNELS
    passes: Sequence[tuple[str, Pass]] = PASSES
    rounds_activations = True

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
        return tune(programs, target, KERNELS, measure=measure, files=files, report=report)
