"""Steps of many tokens on one of several ranks: prefill.py's stretch, with sums over ranks where it adds to the stream.

It knows which launches change; their kernels and shapes are prefill.py's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tensorwright.kernels.cuda.alone import end_of, without_ranks
from tensorwright.kernels.cuda.launch import RANKS, GpuSource, Launch, Stretch
from tensorwright.kernels.cuda.prefill import prefill_stretches
from tensorwright.kernels.cuda.ranks import count_collectives
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Program

HEADER, ADDING, SUMMING = "prefill_ranks.cuh", "tw::add_norm<", "tw::sum_norm<"


def rank_prefill_stretches(program: Program, target: Target, layouts: Mapping[str, str]) -> tuple[Stretch, ...]:
    """As `prefill_stretches` of what the rank would compute alone."""
    alone = without_ranks(program)
    return () if alone is None else tuple(
        replace(stretch, end=end_of(alone.ops[stretch.end - 1], program), source=_summed(stretch.source))
        for stretch in prefill_stretches(alone, target, layouts))


def _summed(source: GpuSource) -> GpuSource:
    """The source with its sums numbered as they come. add_norm<type, columns, threads, whether it adds, ...>."""
    launches: list[Launch] = []
    number = 0
    for launch in source.launches:
        if launch.function.startswith(ADDING):
            *shape, adds, rest = launch.function.removeprefix(ADDING).split(", ", 4)
            if adds == "true":
                number += 1
                launch = replace(launch, function=f"{SUMMING}{', '.join((*shape, rest))}",
                                 arguments=(RANKS, number, *launch.arguments))
        launches.append(launch)
    return replace(source, headers=(HEADER, *source.headers), launches=(*launches, count_collectives(number)))
