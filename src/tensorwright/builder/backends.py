"""What a target brings to the builder: its kernels, passes, compiler and clock. One dispatch by target, and it is here.

A backend is an object of functions; the rest of the builder never asks which one it has. The modules of a backend are
imported when a target of it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tensorwright.builder.passes import Pass
from tensorwright.builder.plan import Plan
from tensorwright.builder.tune import CacheFiles, Tuning
from tensorwright.kernels.cuda.targets import ARCHITECTURE as CUDA
from tensorwright.kernels.cuda.targets import TARGET_NAMES as GPU_TARGETS
from tensorwright.kernels.cuda.targets import has_gpu
from tensorwright.kernels.interface import Kernel, Target
from tensorwright.program.program import Program

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class Compiled:
    """The kernels' machine code, what the manifest says of it (its "kernels"), and of what else there was a choice
    (as `tuning_facts` has groups).
    """

    code: bytes
    facts: Mapping[str, Any]
    choices: Sequence[Mapping[str, Any]] = ()


class Backend(Protocol):
    """Everything the builder needs to know of a kind of machine."""

    kernels: Sequence[Kernel]
    passes: Sequence[tuple[str, Pass]]
    rounds_activations: bool  # to int8, where weights are quantised and nobody asked for exact ones

    def float8_rows(self, target: Target) -> int:
        """From how many rows on inputs of float8 weights are rounded too, unless exact ones are asked for; 0: never."""

    def resolve_target(self, name: str) -> Target:
        """The target of that name."""

    def facts(self, target: Target) -> Mapping[str, Any]:
        """What decides an engine's bytes beside package, checkpoint and target, such as the compiler."""

    def compile(self, plan: Plan) -> Compiled:
        """Machine code of all entry points of a plan."""

    def can_measure(self, target: Target) -> bool:
        """Whether this machine runs the target's code."""

    def tune(self, programs: Iterable[Program], target: Target, *, measure: bool, files: CacheFiles,
             report: Report) -> Tuning:
        """Times that tactics are chosen by."""


def backend_for(target_name: str) -> Backend:
    """The backend of a target's name. "native" is the machine's GPU where it has one."""
    is_gpu = target_name in GPU_TARGETS or (target_name == "native" and has_gpu())
    return _cuda() if is_gpu or target_name.startswith("sm_") else _cpu()


def backend_of(architecture: str) -> Backend:
    """The backend of an engine or a resolved target."""
    return _cuda() if architecture == CUDA else _cpu()


def _cpu() -> Backend:
    from tensorwright.builder.cpu_backend import CpuBackend

    return CpuBackend()


def _cuda() -> Backend:
    from tensorwright.builder.cuda_backend import CudaBackend

    return CudaBackend()
