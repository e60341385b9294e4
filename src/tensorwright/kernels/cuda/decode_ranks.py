"""A decode step of up to 64 sequences on one of several ranks: the chain of what this rank would compute alone, where
what is added to the residual stream is summed over ranks.

It knows which launches change; their kernels and shapes are decode_chain.py's matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tensorwright.kernels.cuda.alone import end_of, without_ranks
from tensorwright.kernels.cuda.decode_chain import SMALL, chain_stretches
from tensorwright.kernels.cuda.decoder import recognise
from tensorwright.kernels.cuda.launch import RANKS, Argument, GpuSource, Launch, Size, Stretch
from tensorwright.kernels.cuda.ranks import count_collectives
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Program

HEADER = "decode_ranks.cuh"
EMBED = re.compile(r"tw::embed<(?P<number>[^,]+), (?P<order>[^,]+), (?P<tokens>\d+), (?P<hidden>\d+), \d+>")
RESIDUAL = re.compile(r"tw::Residual(?P<block>Block)?<([^<>]+)>>$")  # the last type that a linear is made of


def rank_stretches(program: Program, target: Target, layouts: Mapping[str, str]) -> tuple[Stretch, ...]:
    """One for each number of sequences that has a chain; none for programs of one rank, or of another shape."""
    alone = without_ranks(program)
    decoder = None if alone is None else recognise(alone, layouts)
    if alone is None or decoder is None:
        return ()
    return tuple(replace(stretch, end=end_of(alone.ops[-1], program), source=_summed(stretch))
                 for stretch in chain_stretches(decoder, alone, target))


def _summed(stretch: Stretch) -> GpuSource:
    """The chain's source with sums over ranks, numbered as they come.

    Few sequences are summed as each warp finishes its rows; more, by a pass of its own over the finished rows.
    """
    source = stretch.source
    embed = next(match for match in (EMBED.fullmatch(launch.function) for launch in source.launches) if match)
    launches: list[Launch] = []
    number = 0
    for launch in source.launches:
        if RESIDUAL.search(launch.function) and isinstance(launch.arguments[1], tuple):
            number += 1
            launches += _in_one(launch, number) if stretch.tokens in SMALL else _in_two(launch, number, embed)
        else:
            launches.append(launch)
    part = Size(times=4 * stretch.tokens * int(embed["hidden"]))
    return replace(source, headers=(*source.headers, HEADER), launches=(*launches, count_collectives(number)),
                   scratch=(*source.scratch, ("part", part)))


def _in_one(launch: Launch, number: int) -> list[Launch]:
    """A linear whose epilogue sums."""
    given, output, *rest = launch.arguments
    return [replace(launch, function=launch.function.replace("tw::Residual<", "tw::SummedResidual<"),
                    arguments=(given, (*_fields(output), RANKS, number), *rest))]


def _in_two(launch: Launch, number: int, embed: re.Match[str]) -> list[Launch]:
    """A linear that leaves rows of float32, and their sum."""
    given, output, *rest = launch.arguments
    rows = f"tw::Rows<tw::InOrder, {embed['hidden']}>"
    function = RESIDUAL.sub(lambda found: f"tw::EachToken<{rows}>>" if found["block"] else f"{rows}>", launch.function)
    tokens, shape = int(embed["tokens"]), ", ".join(embed.group("number", "order", "tokens", "hidden"))
    return [replace(launch, function=function, arguments=(given, ("scratch.part", "", "", tokens), *rest)),
            Launch(f"tw::sum_residual<{shape}>", (Size(times=tokens), Size(), Size()), 512, 0,
                   (RANKS, number, "scratch.part", _fields(output)))]


def _fields(output: Argument | tuple[Argument, ...]) -> tuple[Argument, ...]:
    """tw::Residual's."""
    return output if isinstance(output, tuple) else (output,)
