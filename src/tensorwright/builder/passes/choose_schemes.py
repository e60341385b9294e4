"""Gives each linear its weight scheme, as the checkpoint was quantised, and the rounding of its activations.

Where linears round their activations to int8, attention may round its own to 16 bits: a twentieth of that error.

Embedding and lm_head stay as they are unless the checkpoint's lm_head was quantised: then it has one scale per channel.
"""

from __future__ import annotations

from dataclasses import replace

from tensorwright.builder.passes.context import Context
from tensorwright.program.program import Op, Program, Weight

FLOAT8, FLOAT8_BITS = "float8_e4m3", 4  # significant bits


def run(program: Program, context: Context) -> Program:
    """Linears of layers get quantised weights; where a weight is quantised its activations may be rounded too."""
    weights = dict(program.weights)
    ops: list[Op] = []
    for op in program.ops:
        if op.kind == "linear":
            name = op.weights["weight"]
            weights[name] = _scheme(weights[name], op.name == "lm_head", context)
            if weights[name].dtype == FLOAT8:
                op = replace(op, attributes={**op.attributes, "float8_rows": context.float8_rows})
            elif weights[name].is_quantized:
                group = weights[name].group_size
                rounded = {"activation_group": min(group, context.activation_group) if group > 0
                           else context.activation_group}
                if weights[name].dtype == "int4" and context.int4_float8_rows:
                    rounded = {"float8_rows": context.int4_float8_rows, "weight_bits": FLOAT8_BITS}
                op = replace(op, attributes={**op.attributes, **rounded})
        ops.append(op)
    if context.algorithm is not None and context.activation_group > 0:
        ops = [replace(op, attributes={**op.attributes, "activation_bits": 16}) if op.kind == "attention" else op
               for op in ops]
    return program.with_ops(ops, weights=weights)


def _scheme(weight: Weight, is_lm_head: bool, context: Context) -> Weight:
    if not context.quantize_lm_head if is_lm_head else context.algorithm is None:
        return weight
    dtype, group = FLOAT8 if context.algorithm == "FP8_PER_CHANNEL_PER_TOKEN" else "int8", -1
    if context.algorithm == "W4A16" and not is_lm_head:
        dtype, group = "int4", context.group_size
    parts = weight.parts
    if is_lm_head:  # a quantised lm_head is a tensor of its own even where the embeddings are tied
        parts = tuple(replace(part, name="lm_head") for part in parts)
    return replace(weight, dtype=dtype, group_size=group, scale_dtype=context.scale_dtype, parts=parts)
