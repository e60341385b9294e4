"""Choosing tactics from times: one layout for all sizes, the best tactic for each, in doubt the kernel's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from tensorwright.builder.plan import choose
from tensorwright.builder.tactics import BUCKETS, Timing, TimingKey, candidates, key
from tensorwright.builder.tune import Tuning
from tensorwright.builder.tuning_facts import tuning_facts
from tensorwright.errors import BuildError
from tensorwright.kernels.cpu.linear import Linear
from tensorwright.kernels.cpu.targets import resolve_target
from tensorwright.kernels.interface import Kernel, Tactic, Target
from tensorwright.program.program import Buffer, Op, Program, Weight

TARGET = resolve_target("portable")
WIDE, NARROW = ("dot64", 4), ("dot16", 1)


class Several(Linear):
    """A linear with the tactics that a test gives it, as (layout, rows of its tile); `only`: for ops of that name."""

    def __init__(self, *offered: tuple[str, int], only: str = "") -> None:
        self._tactics = tuple(Tactic(layout, {"rows": rows}) for layout, rows in offered)
        self._only = only

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        return op.name.startswith(self._only)

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        return self._tactics


class Estimating(Several):
    """One whose estimate is the number in the tactic."""

    def estimate(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> float:
        return tactic.parameters["rows"]


def program_of(*names: str, shared: bool = False) -> Program:
    """Linears in a row, with weights of their own or one for all."""
    buffers = {f"x{index}": Buffer(f"x{index}", ("tokens", 64), "float32") for index in range(len(names) + 1)}
    weights = [Weight("shared" if shared else f"{name}.weight", (64, 64), "float16") for name in names]
    ops = tuple(Op(name, "linear", (f"x{i}",), (f"x{i + 1}",), {"weight": weights[i].name})
                for i, name in enumerate(names))
    return Program(buffers, {weight.name: weight for weight in weights}, ops)


def timings(program: Program, kernels: tuple[Kernel, ...],
            seconds: Callable[[Tactic, int], float]) -> Mapping[TimingKey, Timing]:
    """A time for every tactic of every op at every size."""
    return {key(found, tactic, bucket.max_rows): Timing(seconds(tactic, bucket.max_rows), "measured")
            for found in candidates(program, TARGET, kernels) for tactic in found.tactics for bucket in BUCKETS}


def chosen(program: Program, kernels: tuple[Kernel, ...], times: Mapping[TimingKey, Timing]) -> list[list[str]]:
    """For each op the tactic of each bucket, as "layout rows"."""
    plan = choose(program, TARGET, kernels, Tuning(times))
    return [[f"{pick.tactic.layout} {pick.tactic.parameters['rows']}" for pick in choice.picks]
            for choice in plan.choices]


def test_each_size_gets_its_best_tactic() -> None:
    kernels = (Several(WIDE, ("dot64", 1)),)
    program = program_of("a")
    times = timings(program, kernels,
                    lambda tactic, rows: 1.0 if (rows <= 8) == (tactic.parameters["rows"] == 1) else 2.0)
    (found,) = chosen(program, kernels, times)
    assert found == ["dot64 1" if bucket.max_rows <= 8 else "dot64 4" for bucket in BUCKETS]
    (choice,) = choose(program, TARGET, kernels, Tuning(times)).choices
    assert [(variant.max_rows, variant.parameters["rows"]) for variant in choice.few_rows] == [(8, 1)]
    assert choice.tactic.parameters["rows"] == 4


def test_one_layout_serves_all_sizes() -> None:
    """The narrow one is far better for many rows, the wide one a little for one row: weighted, the steps decide."""
    kernels = (Several(WIDE, NARROW),)
    program = program_of("a")

    def times(at_many: float) -> Mapping[TimingKey, Timing]:
        return timings(program, kernels, lambda tactic, rows: {
            "dot64": 1.0 if rows < 512 else at_many, "dot16": 1.2 if rows < 512 else 1.0}[tactic.layout])

    gained = 0.2 * sum(bucket.steps for bucket in BUCKETS if bucket.max_rows < 512)
    assert chosen(program, kernels, times(gained)) == [["dot64 4"] * len(BUCKETS)]
    assert chosen(program, kernels, times(2 * gained)) == [["dot16 1"] * len(BUCKETS)]


def test_noise_changes_nothing() -> None:
    kernels = (Several(WIDE, NARROW, ("dot64", 2)),)
    program = program_of("a")
    times = timings(program, kernels, lambda tactic, rows: 1.0 - 0.005 * tactic.parameters["rows"] % 4)
    assert chosen(program, kernels, times) == [["dot64 4"] * len(BUCKETS)]


def test_ops_that_share_a_weight_agree() -> None:
    """The second op offers the layout that the first one likes less, so both take it."""
    kernels = (Several(WIDE, NARROW, only="a"), Several(NARROW, only="b"))
    assert {name for names in chosen(program_of("a", "b", shared=True), kernels, {}) for name in names} == {"dot16 1"}
    assert [names[0] for names in chosen(program_of("a", "b"), kernels, {})] == ["dot64 4", "dot16 1"]


def test_ops_that_cannot_agree() -> None:
    kernels = (Several(WIDE, only="a"), Several(NARROW, only="b"))
    with pytest.raises(BuildError, match="b: no tactic of linear agrees"):
        choose(program_of("a", "b", shared=True), TARGET, kernels)


@pytest.mark.parametrize(("kernel", "expected"), [(Several(WIDE, NARROW), "dot64 4"),
                                                  (Estimating(WIDE, NARROW), "dot16 1")])
def test_without_all_times_rules_decide(kernel: Several, expected: str) -> None:
    """One missing time, and no time counts: estimates and seconds cannot be compared."""
    program = program_of("a")
    times = dict(timings(program, (kernel,), lambda tactic, rows: 1.0 if tactic.layout == "dot64" else 2.0))
    times.popitem()
    plan = choose(program, TARGET, (kernel,), Tuning(times))
    assert chosen(program, (kernel,), times) == [[expected] * len(BUCKETS)]
    assert {pick.why for pick in plan.choices[0].picks} == {"model"}
    assert not plan.is_tuned


def test_the_manifest_tells_times_and_the_next_best() -> None:
    kernels = (Several(WIDE, NARROW),)
    program = program_of("layers.0.qkv", "layers.1.qkv")
    plan = choose(program, TARGET, kernels, Tuning(timings(program, kernels, lambda tactic, rows: {
        "dot64": 1.0, "dot16": 1.5}[tactic.layout]), "a machine"))
    assert plan.is_tuned
    (group,) = tuning_facts(plan)["groups"]
    assert (group["name"], group["ops"]) == ("linear qkv", ["layers.0.qkv", "layers.1.qkv"])
    first = group["picks"][0]
    assert (first["tactic"], first["seconds"], first["why"]) == ("dot64 rows=4", 1.0, "measured")
    assert first["next_best"] == ["dot16 rows=1", 1.5]
    assert first["bytes"] > 64 * 64 * 2


def test_an_op_without_a_choice_is_not_mentioned() -> None:
    plan = choose(program_of("a"), TARGET, (Several(WIDE),))
    assert plan.is_tuned
    assert tuning_facts(plan)["groups"] == []
