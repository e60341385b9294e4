"""Which ways through a decode step an engine gets: stretches, ordered by what few layers took where they were timed.

It knows stretches and op by op. It measures nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensorwright.builder.clock import Case
from tensorwright.builder.tactics import Candidates, Timing, TimingKey, Timings, candidates, pick_all
from tensorwright.kernels.cuda.decode_steps import decode_stretches
from tensorwright.kernels.cuda.decoder import few_layers
from tensorwright.kernels.cuda.launch import (
    Argument,
    Arguments,
    GpuSource,
    Launch,
    Size,
    Stretch,
    needs_peers,
    operand_name,
)
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.interface import Target
from tensorwright.program.ops import BATCH_INPUTS
from tensorwright.program.program import Op, Program

LAYERS, CONTEXT = 4, 1024  # that are timed, with so many tokens in each sequence
OP_BY_OP = "op by op"


@dataclass(frozen=True)
class Choice:
    """What runs steps of so many sequences: stretches in the order of preference, and all times that are known.

    `bytes` are moved by the layers that are timed.
    """

    tokens: int
    stretches: tuple[Stretch, ...]
    timings: Mapping[str, Timing]
    bytes: float

    def facts(self, bytes_per_s: float | None) -> dict[str, Any]:
        """A pick as in `tuning_facts`."""
        names = [*(stretch.entry for stretch in self.stretches), OP_BY_OP]
        best = next((name for name in names if name in self.timings), names[0])
        timing = self.timings.get(best)
        others = sorted((other.seconds, name) for name, other in self.timings.items() if name != best)
        return {"max_rows": self.tokens, "tactic": best, "why": timing.source if timing else "model",
                "seconds": timing and timing.seconds, "bytes": self.bytes, "operations": 0.0,
                "next_best": [others[0][1], others[0][0]] if timing and others else None,
                "limit_s": self.bytes / bytes_per_s if bytes_per_s else None}


def step_cases(programs: Iterable[Program], target: Target, processors: int = 0) -> list[Case]:
    """A case for each number of sequences that there are stretches for. `processors` of the GPU; 0: any."""
    cases: dict[TimingKey, Case] = {}
    for program in programs:
        for tokens, ways in _ways(program, target, processors).items():
            title = f"decode steps of {tokens}"
            cases.setdefault(next(iter(ways)), Case(title, f"{LAYERS} layers in {title}", _few(program), ways))
    return list(cases.values())


def choose_stretches(program: Program, target: Target, layouts: Mapping[str, str], timings: Timings) -> list[Choice]:
    """For each number of sequences: the fastest first, none slower than op by op; without times as they come."""
    stretches = decode_stretches(program, target, layouts)
    ways = _ways(program, target) if stretches else {}
    choices = []
    for tokens in sorted({stretch.tokens for stretch in stretches}):
        own = [stretch for stretch in stretches if stretch.tokens == tokens]
        known = {of.tactic: timings[of] for of in ways.get(tokens, {}) if of in timings}
        choices.append(Choice(tokens, tuple(_ordered(own, known)), known, _bytes(_few(program), target, tokens)))
    return choices


def _ordered(stretches: Sequence[Stretch], known: Mapping[str, Timing]) -> list[Stretch]:
    """Those for other GPUs than the measured one stay where they are: this one takes the next."""
    if OP_BY_OP not in known:
        return list(stretches)
    timed = [stretch for stretch in stretches if stretch.entry in known]
    worth = [stretch for stretch in timed if known[stretch.entry].seconds <= known[OP_BY_OP].seconds]
    return [*(stretch for stretch in stretches if stretch not in timed),
            *sorted(worth, key=lambda stretch: known[stretch.entry].seconds)]


def _bytes(program: Program, target: Target, tokens: int) -> float:
    return sum(each.kernel.cost(each.op, program, tokens, tokens * CONTEXT).bytes
               for each in candidates(program, target, KERNELS))


def layouts_of(program: Program, target: Target) -> dict[str, str]:
    """The layout of each weight: its first op's, as it is packed."""
    found = candidates(program, target, KERNELS)
    layouts: dict[str, str] = {}
    for each, picks in zip(found, pick_all(found, program, {}), strict=True):
        for name in each.op.weights.values():
            layouts.setdefault(name, picks[-1].tactic.layout)
    return layouts


def _few(program: Program) -> Program:
    return few_layers(program, LAYERS) or program


def _ways(program: Program, target: Target, processors: int = 0) -> dict[int, dict[TimingKey, GpuSource]]:
    """By number of sequences."""
    few = _few(program)
    stretches = [stretch for stretch in decode_stretches(few, target, layouts_of(few, target))
                 if not needs_peers(stretch.source)]  # which nobody answers while an engine is built
    found = candidates(few, target, KERNELS) if stretches else ()
    signature = "decode step " + hashlib.sha256("".join(each.signature for each in found).encode()).hexdigest()[:32]
    ways: dict[int, dict[TimingKey, GpuSource]] = {}
    for stretch in stretches:
        if processors and stretch.processors not in (0, processors):
            continue
        ways.setdefault(stretch.tokens, {})[TimingKey(signature, stretch.entry, stretch.tokens)] = stretch.source
    for tokens, of in ways.items():
        of[TimingKey(signature, OP_BY_OP, tokens)] = _op_by_op(found, few, tokens)
    return ways


def _op_by_op(found: Sequence[Candidates], program: Program, tokens: int) -> GpuSource:
    """All launches of a step, as of one source: every operand by its name in the program."""
    launches: list[Launch] = []
    headers: dict[str, None] = {}
    scratch: dict[str, Size] = {}
    zeros: dict[str, int] = {}
    for each, picks in zip(found, pick_all(found, program, {}), strict=True):
        pick = next((pick for pick in picks if tokens <= pick.max_rows), picks[-1])
        source = each.kernel.source(each.op, program, pick.tactic)
        if not isinstance(source, GpuSource):
            continue
        headers |= dict.fromkeys(source.headers)
        place = each.op.name.rpartition(".")[2]
        scratch |= {f"{place}.{name}": size for name, size in source.scratch}
        zeros |= {f"{place}.{name}": count for name, count in source.zeros}  # which are zero again after each launch
        launches += [replace(launch, arguments=_named(launch.arguments, each.op, place)) for launch in source.launches]
    return GpuSource(tuple(headers), "", tuple(launches), tuple(scratch.items()), tuple(zeros.items()))


def _named(arguments: Arguments, op: Op, place: str) -> Arguments:
    return tuple(tuple(_name(each, op, place) for each in argument) if isinstance(argument, tuple)
                 else _name(argument, op, place) for argument in arguments)


def _name(argument: Argument, op: Op, place: str) -> Argument:
    if not isinstance(argument, str) or not argument:
        return argument
    whole, plus, offset = argument.partition("+")
    kind, _, name = whole.partition(".")
    if kind in ("scratch", "zeros"):
        return f"{kind}.{place}.{name}"
    if kind not in ("inputs", "outputs", "weights"):
        return argument
    operand = operand_name(op, whole)
    if operand is None:
        return ""
    return f"{'batch' if operand in BATCH_INPUTS else 'named'}.{operand}{plus}{offset}"
