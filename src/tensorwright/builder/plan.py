"""From a program to a plan: a kernel and a tactic for every op, and an entry point for each distinct one.

It asks the kernels; it names none. A weight has one layout, so ops that share a weight must agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorwright.errors import BuildError
from tensorwright.kernels.cpu.compile import kernel_symbols
from tensorwright.kernels.interface import Kernel, Source, Tactic, Target
from tensorwright.program.program import Op, Program


@dataclass(frozen=True)
class Choice:
    """How one op is run."""

    op: Op
    kernel: Kernel
    tactic: Tactic
    symbol: str


@dataclass(frozen=True)
class Plan:
    """One choice for each op of the program in order, and the C++ of each."""

    program: Program
    target: Target
    choices: tuple[Choice, ...]
    sources: tuple[Source, ...]


def choose(program: Program, target: Target, kernels: Sequence[Kernel]) -> Plan:
    """The first kernel that supports each op, with its heuristic's tactic. Raises BuildError where there is none."""
    layouts: dict[str, str] = {}
    found: list[tuple[Op, Kernel, Tactic, Source]] = []
    for op in program.ops:
        kernel = next((kernel for kernel in kernels if kernel.supports(op, program, target)), None)
        if kernel is None:
            raise BuildError(f"no kernel of target {target.name} can run {op.name} [{op.kind}]")
        tactic = _tactic(op, program, target, kernel, layouts)
        found.append((op, kernel, tactic, kernel.source(op, program, tactic)))
    sources = tuple(source for *_, source in found)
    choices = tuple(Choice(op, kernel, tactic, symbol)
                    for (op, kernel, tactic, _), symbol in zip(found, kernel_symbols(sources), strict=True))
    return Plan(program, target, choices, sources)


def _tactic(op: Op, program: Program, target: Target, kernel: Kernel, layouts: dict[str, str]) -> Tactic:
    """The first tactic whose layout agrees with what other ops chose for the same weights."""
    names = [name for name in op.weights.values() if not program.weights[name].values]
    for tactic in kernel.tactics(op, program, target):
        if all(layouts.get(name, tactic.layout) == tactic.layout for name in names):
            layouts.update(dict.fromkeys(names, tactic.layout))
            return tactic
    raise BuildError(f"{op.name}: no tactic of {kernel.name} agrees with the layouts of the weights it shares")
