"""Which tactic runs each op for how many rows: a pure function of what the kernels offer and of times.

A weight has one packed layout, so a layout is chosen over all sizes of steps together, and by all ops that share the
weight; then each size gets the best tactic within that layout. It measures nothing (`measure.py`) and compiles nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tensorwright.errors import BuildError
from tensorwright.kernels.interface import Estimates, Kernel, Tactic, Target
from tensorwright.program.program import Op, Program


@dataclass(frozen=True)
class Bucket:
    """Steps that share a tactic: of more rows than the bucket before, up to `max_rows`; the last one has no end.

    `steps` weighs it where a layout is chosen: how often such a step occurs for one of 512 tokens of a prompt.
    """

    max_rows: int
    steps: int


# Fixed, whatever the limits: other limits change no code and no layout, so that they need no other engine file.
BUCKETS = (Bucket(1, 64), Bucket(4, 32), Bucket(8, 16), Bucket(16, 16), Bucket(64, 4), Bucket(512, 1))
SLOWER_BY_NOISE = 1.03  # a tactic must gain more than this over those that the kernel lists before it

T = TypeVar("T")
Why = Literal["only", "measured", "cached", "model"]


@dataclass(frozen=True)
class Timing:
    """What one execution took, and whether this build measured it or an earlier one."""

    seconds: float
    source: Literal["measured", "cached"]


@dataclass(frozen=True)
class TimingKey:
    """What a time belongs to: an op's signature, one tactic, so many rows."""

    signature: str
    tactic: str
    rows: int


Timings = Mapping[TimingKey, Timing]


@dataclass(frozen=True)
class Pick:
    """The tactic of one bucket. Times are None where none are known; `next_best` is among all layouts' tactics."""

    max_rows: int
    tactic: Tactic
    why: Why
    seconds: float | None = None
    next_best: tuple[Tactic, float] | None = None


@dataclass(frozen=True)
class Candidates:
    """An op, its kernel and the ways to run it, the kernel's favourite first."""

    op: Op
    kernel: Kernel
    tactics: tuple[Tactic, ...]
    signature: str


def candidates(program: Program, target: Target, kernels: Sequence[Kernel]) -> tuple[Candidates, ...]:
    """For each op the first kernel that supports it. Raises BuildError where there is none."""
    found = []
    for op in program.ops:
        kernel = next((kernel for kernel in kernels if kernel.supports(op, program, target)), None)
        if kernel is None:
            dtypes = sorted({program.weights[name].dtype for name in op.weights.values()})
            held = f" with weights of {' and '.join(dtypes)}" if dtypes else ""
            caches = [b.dtype for b in map(program.buffers.__getitem__, op.inputs) if b.kind == "cache"]
            raise BuildError(f"no kernel of target {target.name} can run {op.name} [{op.kind}]{held}",
                             mend=_mend({*dtypes, *caches}))
        found.append(Candidates(op, kernel, kernel.tactics(op, program, target), _signature(op, program, kernel)))
    return tuple(found)


def _mend(dtypes: set[str]) -> str | None:
    """By the dtypes of an op that no kernel runs."""
    if "float8_e4m3" in dtypes:
        return "float8 needs a GPU: --target sm_90 for one; for CPUs convert with --use_weight_only, --int8_kv_cache"
    return "for GPUs: tensorwright convert --dtype float16, or bfloat16" if "float32" in dtypes else None


def can_be_timed(op: Op, program: Program) -> bool:
    """Whether random numbers are as good as any: the op reads activations and weights, no cache and no batch.

    Nobody answers a collective while an engine is built.
    """
    return op.kind not in ("all_reduce", "all_gather") and all(
        program.buffers[name].kind in ("activation", "output") for name in (*op.inputs, *op.outputs))


def can_run(candidate: Candidates, program: Program, tactic: Tactic, rows: int) -> bool:
    """Whether the tactic is for so many rows: where it is not, its estimate is infinite."""
    kernel = candidate.kernel
    return not isinstance(kernel, Estimates) or math.isfinite(kernel.estimate(candidate.op, program, tactic, rows))


def key(candidate: Candidates, tactic: Tactic, rows: int) -> TimingKey:
    """Where the time of a tactic is looked up."""
    return TimingKey(candidate.signature, describe(tactic), rows)


def describe(tactic: Tactic) -> str:
    """A tactic in a few words: "dot64 rows=4"."""
    return " ".join([tactic.layout, *(f"{name}={value}" for name, value in sorted(tactic.parameters.items()))])


def pick_all(found: Sequence[Candidates], program: Program, timings: Timings) -> list[tuple[Pick, ...]]:
    """For each op one pick for each bucket. Raises BuildError where ops cannot agree on a shared weight's layout."""
    picks: dict[str, tuple[Pick, ...]] = {}
    for group in _sharing_weights(found, program):
        layout = _layout(group, program, timings)
        is_timed = _is_timed(group, program, timings)
        for candidate in group:
            picks[candidate.op.name] = tuple(_pick(candidate, program, timings if is_timed else {}, layout, bucket)
                                             for bucket in BUCKETS)
    return [picks[candidate.op.name] for candidate in found]


def _signature(op: Op, program: Program, kernel: Kernel) -> str:
    """What an op's time depends on, as text: ops of equal signature are measured once."""
    weights = {role: program.weights[name] for role, name in op.weights.items()}
    return json.dumps([
        kernel.name, op.kind, dict(op.attributes),
        [[list(buffer.shape[1:]), buffer.dtype] for buffer in (program.buffers[n] for n in (*op.inputs, *op.outputs))],
        {role: [list(w.shape), w.dtype, w.group_size, w.scale_dtype] for role, w in weights.items()}], sort_keys=True)


def _sharing_weights(found: Sequence[Candidates], program: Program) -> list[list[Candidates]]:
    """Ops in groups that must agree on a layout; most are alone in theirs."""
    group_of: dict[str, list[Candidates]] = {}
    groups: list[list[Candidates]] = []
    for candidate in found:
        names = [name for name in candidate.op.weights.values() if not program.weights[name].values]
        joined = [candidate]
        for group in {id(group_of[name]): group_of[name] for name in names if name in group_of}.values():
            joined = group + joined
            groups.remove(group)
        groups.append(joined)
        held = [n for member in joined for n in member.op.weights.values() if not program.weights[n].values]
        group_of.update(dict.fromkeys(held, joined))
    return groups


def _layout(group: Sequence[Candidates], program: Program, timings: Timings) -> str:
    """The layout of least weighted time or, where times are missing, of least estimate; the kernel's first in doubt."""
    first, *others = (list(dict.fromkeys(tactic.layout for tactic in member.tactics)) for member in group)
    common = [layout for layout in first if all(layout in offered for offered in others)]
    if not common:
        raise BuildError(f"{group[-1].op.name}: no tactic of {group[-1].kernel.name} agrees with the layouts of the "
                         "weights it shares")
    is_timed = _is_timed(group, program, timings)

    def worth(layout: str) -> float:
        return sum(bucket.steps * min(_value(member, program, tactic, bucket, timings if is_timed else {})
                                      for tactic in member.tactics if tactic.layout == layout)
                   for member in group for bucket in BUCKETS)

    return _best(common, worth)


def _is_timed(group: Sequence[Candidates], program: Program, timings: Timings) -> bool:
    """Times and estimates cannot be compared: either every number is a time, or none is."""
    return all(key(member, tactic, bucket.max_rows) in timings
               for member in group for tactic in member.tactics for bucket in BUCKETS
               if can_run(member, program, tactic, bucket.max_rows))


def _value(candidate: Candidates, program: Program, tactic: Tactic, bucket: Bucket, timings: Timings) -> float:
    """Seconds where known, else the kernel's estimate, else nothing that tells tactics apart."""
    if timing := timings.get(key(candidate, tactic, bucket.max_rows)):
        return timing.seconds
    if isinstance(candidate.kernel, Estimates):
        return candidate.kernel.estimate(candidate.op, program, tactic, bucket.max_rows)
    return 0.0


def _pick(candidate: Candidates, program: Program, timings: Timings, layout: str, bucket: Bucket) -> Pick:
    def value(tactic: Tactic) -> float:
        return _value(candidate, program, tactic, bucket, timings)

    best = _best([tactic for tactic in candidate.tactics if tactic.layout == layout], value)
    if len(candidate.tactics) == 1:
        return Pick(bucket.max_rows, best, "only")
    timing = timings.get(key(candidate, best, bucket.max_rows))
    if timing is None:
        return Pick(bucket.max_rows, best, "model")
    other = min((tactic for tactic in candidate.tactics if tactic != best), key=value)
    next_best = (other, value(other)) if math.isfinite(value(other)) else None
    return Pick(bucket.max_rows, best, timing.source, timing.seconds, next_best)


def _best(choices: Sequence[T], value: Callable[[T], float]) -> T:
    """The first choice that is as good as the best one, noise aside."""
    limit = min(map(value, choices)) * SLOWER_BY_NOISE
    return next(choice for choice in choices if value(choice) <= limit)
