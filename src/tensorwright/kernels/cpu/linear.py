"""The linear op on CPUs: which C++ runs it, what it packs, moves and computes. Layouts are `layouts.py`'s matter.

Two algorithms share one class because the op's own attribute decides between them: int8 activations go through integer
dot products (native/linear_integer.h), float32 activations through fused multiply-adds (native/linear_float.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tensorwright.kernels.cpu import layouts
from tensorwright.kernels.interface import Array, Cost, Source, Tactic, Target, Tensor
from tensorwright.program.ops import ACTIVATIONS, ATTRIBUTE_DEFAULTS, OPS
from tensorwright.program.program import Op, Program, Weight
from tensorwright.program.reference import dequantize, run_op

NATIVE_TYPES = {"float32": "float", "float16": "tw::half", "bfloat16": "tw::bfloat16"}
GROUP_SIZES = (-1, 32, 64, 128)
CACHE_LINE = 64
ROW_KIB, LARGE_ROW_KIB = 528, 2112  # of a block of rows, as int8: half the second-level cache of Zen 5, and more


class Linear:
    """y = x' · weightᵀ + bias + residual; x' is x, normed, gated or rounded to int8 as the attributes say."""

    name = "linear"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Every weight type but float8; int8 activations only in the groups of the weight (128 if it has none)."""
        if op.kind != "linear" or ("norm" in op.weights and _attribute(op, "gate")):
            return False
        weight = _weight(op, program)
        if _attribute(op, "gate") not in ("", *ACTIVATIONS):
            return False
        if not weight.is_quantized:
            return weight.dtype in NATIVE_TYPES and _group(op) == 0
        if weight.dtype == "float8_e4m3":
            return False
        if weight.scale_dtype not in NATIVE_TYPES or weight.group_size not in GROUP_SIZES:
            return False
        own_group = weight.group_size if weight.group_size > 0 else layouts.DEFAULT_GROUP
        return weight.shape[1] % max(weight.group_size, 1) == 0 and _group(op) in (0, own_group)

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        """The layout follows from the attribute. Integer products can cut many rows in other ways, with the same bits:
        larger blocks, whose rows stay in the third-level cache, and with AVX-512 VNNI tiles of four rows, not three.
        """
        if _group(op) == 0:
            return (Tactic(layouts.INPUT),)
        blocks = {"cached_row_kib": LARGE_ROW_KIB}
        tiles = {"tile_rows": 4}
        ways: tuple[dict[str, int], ...] = ({}, blocks)
        if "avx512_vnni" in target.features:
            ways += (tiles, tiles | blocks)
        return tuple(Tactic(layouts.DOT, parameters) for parameters in ways)

    def pack(self, op: Op, program: Program, role: str, tensor: Tensor, tactic: Tactic) -> Array:
        """The weight in the tactic's layout; bias and norm as float32."""
        weight = program.weights[op.weights[role]]
        return layouts.pack(weight, tensor, tactic.layout if role == "weight" else layouts.PLAIN)

    def unpack(self, weight: Weight, packed: Array, layout: str) -> Tensor:
        """The checkpoint's numbers again."""
        return layouts.unpack(weight, packed, layout if len(weight.shape) == 2 else layouts.PLAIN)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::linear with the weight's type, the input's form and N as constants."""
        weight = _weight(op, program)
        outputs, inputs = weight.shape
        gate = _attribute(op, "gate") or "none"
        # A template argument cannot be a float in C++17: epsilon goes as its bits.
        epsilon = int(np.float32(_attribute(op, "norm_epsilon")).view(np.uint32)) if "norm" in op.weights else 0
        form = f"tw::linear_input<{inputs}, {_flag('norm' in op.weights)}, tw::activation::{gate}, {epsilon:#x}u>"
        flags = f"{_flag('bias' in op.weights)}, {_flag(len(op.inputs) > 1)}"
        if tactic.parameters:
            tile_rows = tactic.parameters.get("tile_rows", "tw::CACHED_TILE_ROWS")
            flags += f", {tile_rows}, {tactic.parameters.get('cached_row_kib', ROW_KIB)}"
        return Source(("linear.h",), f"tw::linear<{_native_weights(weight, tactic)}, {form}, {outputs}, {flags}>::run")

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """Rounded rows with their scales and offsets (quantized_rows), prepared float32 rows, or nothing."""
        weight = _weight(op, program)
        inputs = weight.shape[1]
        if tactic.layout == layouts.DOT:
            shape = layouts.packed_shape(weight)
            row = -(-shape.num_blocks * shape.block_inputs // CACHE_LINE) * CACHE_LINE
            numbers = -(-4 * num_tokens * shape.num_blocks // CACHE_LINE) * CACHE_LINE
            return num_tokens * row + 2 * numbers
        is_plain = "norm" not in op.weights and not _attribute(op, "gate")
        return 0 if is_plain else -(-4 * num_tokens * inputs // CACHE_LINE) * CACHE_LINE

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """The packed weight once, x and residual read, y written; two operations per weight and token."""
        weight = _weight(op, program)
        outputs, inputs = weight.shape
        shape = layouts.packed_shape(weight)
        read = inputs * (2 if _attribute(op, "gate") else 1) + outputs * (len(op.inputs) - 1)
        return Cost(shape.num_panels * shape.panel_bytes + 4.0 * num_tokens * (read + outputs),
                    2.0 * num_tokens * outputs * inputs)

    def reference(self, op: Op, program: Program, inputs: Mapping[str, Array],
                  weights: Mapping[str, Tensor]) -> dict[str, Array]:
        """The op's meaning in NumPy, which rounds activations as the kernel does."""
        given = dict(zip(op.inputs, (inputs[name.rstrip("?")] for name in OPS["linear"].inputs
                                     if name.rstrip("?") in inputs), strict=True))
        numbers = {role: _multiplied_out(tensor, program.weights[op.weights[role]])
                   for role, tensor in weights.items()}
        whole = replace(op, attributes={**ATTRIBUTE_DEFAULTS, **op.attributes})
        return {"y": run_op(whole, given, numbers)[op.outputs[0]]}


def _attribute(op: Op, name: str) -> Any:
    return op.attributes.get(name, ATTRIBUTE_DEFAULTS[name])


def _group(op: Op) -> int:
    """Inputs that share an activation scale; 0: float32 activations."""
    return int(_attribute(op, "activation_group"))


def _weight(op: Op, program: Program) -> Weight:
    return program.weights[op.weights["weight"]]


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _native_weights(weight: Weight, tactic: Tactic) -> str:
    """The C++ type that reads the weight."""
    if not weight.is_quantized:
        return f"tw::float_weights<{NATIVE_TYPES[weight.dtype]}>"
    shape = layouts.packed_shape(weight)
    name = "integer_weights" if tactic.layout == layouts.DOT else "float_codes"
    return (f"tw::{name}<{shape.bits}, {shape.block_inputs}, {NATIVE_TYPES[weight.scale_dtype]}, "
            f"{_flag(not shape.scales_blocks)}>")


def _multiplied_out(tensor: Tensor, weight: Weight) -> Array:
    if tensor.scales is None:
        return tensor.values.astype(np.float32)
    return dequantize(tensor.values, tensor.scales, weight.dtype)
