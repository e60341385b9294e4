"""Moves an RMS norm into the linear that alone reads it: the linear norms its rows while it prepares them."""

from __future__ import annotations

from dataclasses import replace

from tensorwright.builder.passes.context import Context
from tensorwright.program.program import Op, Program


def run(program: Program, context: Context) -> Program:
    """Whole-row norms with one reader, a linear without a norm, become its `norm` weight."""
    ops: list[Op] = list(program.ops)
    for norm in [op for op in ops if op.kind == "rms_norm" and op.attributes["head_size"] == 0]:
        readers = program.consumers(norm.outputs[0])
        if len(readers) != 1 or readers[0].kind != "linear" or readers[0].attributes["gate"]:
            continue
        linear = readers[0]
        ops[ops.index(linear)] = replace(
            linear, inputs=(norm.inputs[0], *linear.inputs[1:]),
            weights={**linear.weights, "norm": norm.weights["weight"]},
            attributes={**linear.attributes, "norm_epsilon": norm.attributes["epsilon"]})
        ops.remove(norm)
    return program.with_ops(ops)
