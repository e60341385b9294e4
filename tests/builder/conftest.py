"""A linear kernel with a choice of two tactics that do the same; the one that it lists first dawdles before it."""

from __future__ import annotations

import pytest

from tensorwright.kernels.cpu.linear import Linear
from tensorwright.kernels.interface import Source, Tactic, Target
from tensorwright.program.program import Op, Program

WAITS = (1_000_000, 0)  # rounds of an empty loop before each tactic's work: some 300 microseconds, or nothing
_own_tactics, _own_source = Linear.tactics, Linear.source


def _tactics(self: Linear, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
    first = _own_tactics(self, op, program, target)[0]
    return tuple(Tactic(first.layout, {**first.parameters, "wait": wait}) for wait in WAITS)


def _source(self: Linear, op: Op, program: Program, tactic: Tactic) -> Source:
    own = Tactic(tactic.layout, {name: value for name, value in tactic.parameters.items() if name != "wait"})
    plain = _own_source(self, op, program, own)
    return Source(plain.headers, (
        "([](const tw_step* step, const tw_run* run, const tw_worker* worker) { "
        f"for (volatile int i = 0; i < {tactic.parameters['wait']}; i = i + 1) {{}} "
        f"{plain.function}(step, run, worker); }})"))


@pytest.fixture
def several_tactics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear has `WAITS` to choose from."""
    monkeypatch.setattr(Linear, "tactics", _tactics)
    monkeypatch.setattr(Linear, "source", _source)
