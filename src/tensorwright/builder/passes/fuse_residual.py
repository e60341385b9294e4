"""Lets a linear add the residual stream while it writes its output."""

from __future__ import annotations

from dataclasses import replace

from tensorwright.builder.passes.context import Context
from tensorwright.program.program import Op, Program


def run(program: Program, context: Context) -> Program:
    """add(x, linear(h)) becomes linear(h, x) where nothing else reads the linear's output."""
    ops: list[Op] = list(program.ops)
    for add in [op for op in ops if op.kind == "add"]:
        linear = program.producer(add.inputs[1])
        if linear is None or linear.kind != "linear" or len(linear.inputs) > 1:
            continue
        if len(program.consumers(linear.outputs[0])) != 1:
            continue
        ops[ops.index(linear)] = replace(linear, inputs=(linear.inputs[0], add.inputs[0]), outputs=add.outputs)
        ops.remove(add)
    return program.with_ops(ops)
