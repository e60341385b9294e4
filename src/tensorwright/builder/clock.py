"""What tuning needs of a kind of machine: its name, what a time of code depends on, and a way to take times.

It takes none. `measure.py` does on CPUs, `measure_gpu.py` on GPUs; `tune.py` knows neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tensorwright.builder.tactics import (
    BUCKETS,
    Candidates,
    TimingKey,
    can_be_timed,
    can_run,
    candidates,
    key,
)
from tensorwright.kernels.interface import Kernel, Source, Target
from tensorwright.program.program import Program


@dataclass(frozen=True)
class Case:
    """Ways to do the same, which are timed in turns. `candidates`: of an op; None: of what is no op."""

    title: str  # for people who wait
    what: str  # for people who open the timing cache
    program: Program
    ways: Mapping[TimingKey, Source]
    candidates: Candidates | None = None


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best: bytes read a second, operations a second by bits of the weights."""

    bytes_per_s: float
    operations_per_s: dict[int, float]

    def best(self, other: Limits) -> Limits:
        """The larger of each: a shared host is not always at its best."""
        rates = {bits: max(rate, other.operations_per_s[bits]) for bits, rate in self.operations_per_s.items()}
        return Limits(max(self.bytes_per_s, other.bytes_per_s), rates)


class Stopwatch(Protocol):
    """Some cases, compiled and ready to run."""

    def times(self, case: Case) -> Iterator[tuple[TimingKey, float]]:
        """Seconds of every way."""

    def limits(self) -> Limits:
        """The machine's, now."""


class Clock(Protocol):
    """A kind of machine, as far as times are concerned."""

    arithmetic_bits: tuple[int, ...]  # of the weights, for each rate of `Limits`; 32: products of no integers

    def machine(self) -> str:
        """What all times of one table have in common, such as processor and compiler."""

    def code(self, source: Source) -> str:
        """All text that decides a source's machine code and how it is started."""

    def cases(self, programs: Iterable[Program], target: Target) -> list[Case]:
        """All that has a choice."""

    def start(self, cases: Sequence[Case], target: Target) -> Stopwatch:
        """Compile every way of some cases."""


def op_cases(programs: Iterable[Program], target: Target, kernels: Sequence[Kernel]) -> list[Case]:
    """Ops that can be timed and have a choice, one of each signature."""
    cases: dict[str, Case] = {}
    for program in programs:
        for found in candidates(program, target, kernels):
            if len(found.tactics) > 1 and can_be_timed(found.op, program):
                cases.setdefault(found.signature, _op_case(found, program))
    return list(cases.values())


def _op_case(found: Candidates, program: Program) -> Case:
    sources = [(tactic, found.kernel.source(found.op, program, tactic)) for tactic in found.tactics]
    ways = {key(found, tactic, bucket.max_rows): source for tactic, source in sources for bucket in BUCKETS
            if can_run(found, program, tactic, bucket.max_rows)}
    shapes = (program.weights[name] for name in found.op.weights.values())
    what = " ".join([found.op.kind, *(f"{weight.dtype} {list(weight.shape)}" for weight in shapes)])
    return Case(found.op.name, what, program, ways, found)
