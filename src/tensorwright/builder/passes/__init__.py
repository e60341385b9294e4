"""The passes, in the order they run. Each is a function (Program, Context) -> Program in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tensorwright.builder.passes import (
    choose_schemes,
    fuse_gate_up,
    fuse_norm,
    fuse_qkv,
    fuse_residual,
    fuse_rope_cache,
    shard,
)
from tensorwright.builder.passes.context import Context
from tensorwright.program.program import Program
from tensorwright.program.verify import verify

Pass = Callable[[Program, Context], Program]

PASSES: tuple[tuple[str, Pass], ...] = (
    ("choose_schemes", choose_schemes.run),
    ("shard", shard.run),
    ("fuse_qkv", fuse_qkv.run),
    ("fuse_rope_cache", fuse_rope_cache.run),
    ("fuse_gate_up", fuse_gate_up.run),
    ("fuse_norm", fuse_norm.run),
    ("fuse_residual", fuse_residual.run),
)


def run_passes(program: Program, context: Context, passes: Sequence[tuple[str, Pass]] = PASSES) -> Program:
    """The program after all passes, verified before, between and after them."""
    *_, (_, result) = stages(program, context, passes)
    return result


def stages(program: Program, context: Context,
           passes: Sequence[tuple[str, Pass]] = PASSES) -> Iterator[tuple[str, Program]]:
    """Name and program after each pass, the program as given first: for tests, dumps and curious readers."""
    yield "model", verify(program)
    for name, run in passes:
        program = verify(run(program, context), after=name)
        yield name, program
