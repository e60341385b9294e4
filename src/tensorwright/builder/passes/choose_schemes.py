"""Gives each linear its weight scheme, as the checkpoint was quantised, and the rounding of its activations.

Where linears round their activations to int8, attention may round its own to 16 bits: a twentieth of that error.

Embedding and lm_head stay as they are unless the checkpoint's lm_head was quantised: then it is int8 per channel.
"""

from __future__ import annotations

from dataclasses import replace

from tensorwright.builder.passes.context import Context
from tensorwright.program.program import Op, Program, Weight


def run(program: Program, context: Context) -> Program:
    """Linears of layers get int4 or int8 weights; where a weight is quantised its activations are rounded too."""
    weights = dict(program.weights)
    ops: list[Op] = []
    for op in program.ops:
        if op.kind == "linear":
            name = op.weights["weight"]
            weights[name] = _scheme(weights[name], op.name == "lm_head", context)
            if weights[name].is_quantized:
                group = weights[name].group_size
                rounded = {"activation_group": min(group, context.activation_group) if group > 0
                           else context.activation_group}
                op = replace(op, attributes={**op.attributes, **rounded})
        ops.append(op)
    if context.algorithm is not None and context.activation_group > 0:
        ops = [replace(op, attributes={**op.attributes, "activation_bits": 16}) if op.kind == "attention" else op
               for op in ops]
    return program.with_ops(ops, weights=weights)


def _scheme(weight: Weight, is_lm_head: bool, context: Context) -> Weight:
    if is_lm_head:
        dtype, group = ("int8", -1) if context.quantize_lm_head else (weight.dtype, 0)
    elif context.algorithm == "W4A16":
        dtype, group = "int4", context.group_size
    elif context.algorithm == "W8A16":
        dtype, group = "int8", -1
    else:
        return weight
    if not group:
        return weight
    parts = weight.parts
    if is_lm_head:  # a quantised lm_head is a tensor of its own even where the embeddings are tied
        parts = tuple(replace(part, name="lm_head") for part in parts)
    return replace(weight, dtype=dtype, group_size=group, scale_dtype=context.scale_dtype, parts=parts)
