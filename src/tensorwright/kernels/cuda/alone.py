"""The program that one of several ranks would compute alone: what stretches are made of, before they sum over ranks."""

from __future__ import annotations

from dataclasses import replace

from tensorwright.program.program import Op, Program


def without_ranks(program: Program) -> Program | None:
    """The ops without collectives: linears add the residual themselves, and the last one gives this rank's logits.

    None where a sum is not followed by its residual, or the logits are not simply gathered.
    """
    ops: list[Op] = []
    for op in program.ops[:-1]:
        if op.kind == "add" and ops and ops[-1].kind == "all_reduce":
            total, linear = ops.pop(), ops.pop()
            if linear.kind != "linear" or op.inputs[1] != total.outputs[0] or len(linear.inputs) > 1:
                return None
            ops.append(replace(linear, inputs=(linear.inputs[0], op.inputs[0]), outputs=op.outputs))
        else:
            ops.append(op)
    if program.ops[-1].kind != "all_gather" or any(op.kind.startswith("all_") for op in ops):
        return None
    return program.with_ops(ops)


def end_of(op: Op, program: Program) -> int:
    """The number of ops up to that which writes what an op of the rank alone writes."""
    return next(index for index, each in enumerate(program.ops) if op.outputs[0] in each.outputs) + 1
