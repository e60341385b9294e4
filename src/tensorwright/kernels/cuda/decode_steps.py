"""Every stretch that a decode step of a program may take. A new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from tensorwright.kernels.cuda.decode import layer_stretches
from tensorwright.kernels.cuda.decode_batch import batch_stretches
from tensorwright.kernels.cuda.decode_chain import chain_stretches
from tensorwright.kernels.cuda.decode_ranks import rank_stretches
from tensorwright.kernels.cuda.decoder import recognise
from tensorwright.kernels.cuda.launch import Stretch
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Program


def decode_stretches(program: Program, target: Target, layouts: Mapping[str, str]) -> tuple[Stretch, ...]:
    """The best first, for each number of sequences; `layouts`: of each weight by name. None for other programs."""
    decoder = recognise(program, layouts)
    if decoder is None:
        return rank_stretches(program, target, layouts)
    found = (*layer_stretches(decoder, program, target), *batch_stretches(decoder, program, target),
             *chain_stretches(decoder, program, target))
    return tuple(sorted(found, key=lambda stretch: stretch.tokens))
