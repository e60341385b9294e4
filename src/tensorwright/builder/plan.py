"""From a program to a plan: a kernel and its tactics for every op, and an entry point for each distinct one.

It asks the kernels, and `tactics.py` what follows from times; it names no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorwright.builder.tactics import Candidates, Pick, can_be_timed, candidates, pick_all
from tensorwright.builder.tune import Tuning
from tensorwright.engine.engine import Variant
from tensorwright.kernels.interface import Kernel, Source, Tactic, Target, symbols
from tensorwright.program.program import Op, Program


@dataclass(frozen=True)
class Choice:
    """How one op is run: the tactic for any number of rows, others for few rows, and why (`picks`, one a bucket)."""

    op: Op
    kernel: Kernel
    tactic: Tactic
    symbol: str
    few_rows: tuple[Variant, ...]
    picks: tuple[Pick, ...]


@dataclass(frozen=True)
class Plan:
    """One choice for each op of the program in order, and the C++ of all of them."""

    program: Program
    target: Target
    choices: tuple[Choice, ...]
    sources: tuple[Source, ...]
    tuning: Tuning

    @property
    def is_tuned(self) -> bool:
        """Whether a time stands behind every choice that can have one."""
        return all(pick.why != "model" for choice in self.choices if can_be_timed(choice.op, self.program)
                   for pick in choice.picks)


def choose(program: Program, target: Target, kernels: Sequence[Kernel], tuning: Tuning | None = None) -> Plan:
    """The first kernel that supports each op, with the tactics that the times speak for; without times, its own choice.

    Raises BuildError where no kernel supports an op, or ops that share a weight agree on no layout.
    """
    tuning = tuning or Tuning()
    found = candidates(program, target, kernels)
    picks = pick_all(found, program, tuning.timings)
    sources = tuple(each.kernel.source(each.op, program, pick.tactic)
                    for each, of_op in zip(found, picks, strict=True) for pick in _changes(of_op))
    names = iter(symbols(sources))
    choices = tuple(_choice(each, of_op, [next(names) for _ in _changes(of_op)])
                    for each, of_op in zip(found, picks, strict=True))
    return Plan(program, target, choices, sources, tuning)


def _choice(found: Candidates, picks: tuple[Pick, ...], symbols: Sequence[str]) -> Choice:
    *few, last = _changes(picks)
    variants = tuple(Variant(pick.max_rows, pick.tactic.parameters, symbol)
                     for pick, symbol in zip(few, symbols, strict=False))
    return Choice(found.op, found.kernel, last.tactic, symbols[-1], variants, picks)


def _changes(picks: Sequence[Pick]) -> list[Pick]:
    """Picks without those whose next one has the same tactic."""
    return [pick for pick, following in zip(picks, (*picks[1:], None), strict=True)
            if following is None or following.tactic != pick.tactic]
