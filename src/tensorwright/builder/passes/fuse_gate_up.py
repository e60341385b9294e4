"""Joins the two wide linears of an MLP into one, and moves their activated product into the linear that follows."""

from __future__ import annotations

from dataclasses import replace

from tensorwright.builder.passes.context import Context
from tensorwright.builder.passes.join import join_linears
from tensorwright.program.program import Op, Program


def run(program: Program, context: Context) -> Program:
    """fc, gate, activation, multiply, proj become `fc_gate` and a proj with `gate` set."""
    buffers, weights = dict(program.buffers), dict(program.weights)
    ops = list(program.ops)
    for product in [op for op in ops if op.kind == "multiply"]:
        activation, gate = (program.producer(name) for name in product.inputs)
        fc = program.producer(activation.inputs[0]) if activation else None
        readers = program.consumers(product.outputs[0])
        if fc is None or gate is None or activation is None or not _fits(activation, fc, gate, readers):
            continue
        joined = join_linears(fc.name.rsplit(".", 1)[0] + ".fc_gate", (fc, gate), buffers, weights)
        proj = readers[0]
        ops[ops.index(fc)] = joined
        ops[ops.index(proj)] = replace(proj, inputs=(joined.outputs[0], *proj.inputs[1:]),
                                       attributes={**proj.attributes, "gate": activation.attributes["function"]})
        ops = [op for op in ops if op not in (gate, activation, product)]
    return program.with_ops(ops, buffers=buffers, weights=weights)


def _fits(activation: Op, fc: Op, gate: Op, readers: list[Op]) -> bool:
    return (activation.kind == "activation" and fc.kind == gate.kind == "linear" and fc.inputs == gate.inputs
            and set(fc.weights) == set(gate.weights) and len(readers) == 1 and readers[0].kind == "linear")
