"""Joins the q, k and v linears of a layer into one, which reads its input once; slices give the three back."""

from __future__ import annotations

from tensorwright.builder.passes.context import Context
from tensorwright.builder.passes.join import join_linears
from tensorwright.program.program import Op, Program


def run(program: Program, context: Context) -> Program:
    """One linear `...attention.qkv` and three slices where q, k and v stood side by side."""
    buffers, weights = dict(program.buffers), dict(program.weights)
    ops: list[Op] = []
    queue = list(program.ops)
    while queue:
        three = queue[:3]
        if [op.name.rsplit(".", 1)[-1] for op in three] != ["q", "k", "v"] or any(op.kind != "linear" for op in three):
            ops.append(queue.pop(0))
            continue
        joined = join_linears(three[0].name.rsplit(".", 1)[0] + ".qkv", three, buffers, weights)
        ops.append(joined)
        start = 0
        for op in three:
            size = buffers[op.outputs[0]].shape[1]
            if isinstance(size, int):
                ops.append(Op(f"{op.name}_slice", "slice", joined.outputs, op.outputs, {},
                              {"start": start, "size": size}))
                start += size
        del queue[:3]
    return program.with_ops(ops, buffers=buffers, weights=weights)
