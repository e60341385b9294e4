"""The linear op on GPUs: which launches run it, for few tokens and for many. Layouts are `units.py`'s matter.

Up to 8 tokens, native/linear_small.cuh streams the packed weight once through the tensor cores. Beyond, the weight is
unpacked to 16-bit rows, piece by piece, for a library's matrix product. Both round x to the model's 16-bit type; codes
are exact in the first, code · scale is rounded in the second; sums are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.elementwise import NATIVE_TYPES
from tensorwright.kernels.cuda.launch import (
    Argument,
    Arguments,
    GpuSource,
    Launch,
    Size,
    gpu_source,
    matmul,
    scaled_matmul,
)
from tensorwright.kernels.cuda.linear_float8 import OPERAND, linear_float8, ordered
from tensorwright.kernels.cuda.targets import SHARED_BYTES
from tensorwright.kernels.interface import Array, Cost, Source, Tactic, Target, Tensor
from tensorwright.program.ops import ACTIVATIONS, ATTRIBUTE_DEFAULTS, OPS
from tensorwright.program.program import Op, Program, Weight
from tensorwright.program.reference import dequantize, round_to_bits, run_op

GROUP_SIZES = (-1, 32, 64, 128)
FEW_TOKENS = (1, 2, 4, 8)  # template instances of small_linear
WARPS, STATIC_SHARED = 8, 2048  # of small_linear; barriers and what else it declares
PANEL_BYTES = 320 << 20  # of unpacked weights at a time
UNPACK_WARPS = 8  # of unpack_units
FLOAT8_ROWS, FLOAT8_TARGETS = 65, ("sm_90",)  # from where on, and where, a library multiplies float8 numbers
WIDEST_BLOCK = 1024
PRODUCT_WORTH = 100.0  # estimates: any stream of the weight is better than unpacking it


class Linear:
    """y = x' · weightᵀ + bias + residual; x' is x, normed or gated as the attributes say, in 16 bits."""

    name = "linear"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """16-bit, int8, int4 and float8 weights with 16-bit scales; inputs rounded to float8 where there are many."""
        if op.kind != "linear" or ("norm" in op.weights and _attribute(op, "gate")):
            return False
        weight = _weight(op, program)
        if _attribute(op, "gate") not in ("", *ACTIVATIONS) or _attribute(op, "activation_group"):
            return False
        if _attribute(op, "float8_rows") and not (
                target.name in FLOAT8_TARGETS and _attribute(op, "float8_rows") == FLOAT8_ROWS and _has_float8(weight)):
            return False
        if not weight.is_quantized:
            return weight.dtype in units.DTYPES
        return (weight.dtype in ("int4", *units.BYTES) and weight.scale_dtype in units.DTYPES
                and weight.group_size in GROUP_SIZES and weight.shape[1] % max(weight.group_size, 1) == 0)

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        """One for each count of few tokens whose input fits into shared memory, and that for any number.

        Where inputs are rounded to float8 from FLOAT8_ROWS on, others do: with packed float8 weights, or a library.
        """
        weight, limit = _weight(op, program), SHARED_BYTES[target.name] - STATIC_SHARED
        layout, rounds = _layout(op, program), _attribute(op, "float8_rows") > 0
        few = ((tokens, _ring(weight, tokens, limit)) for tokens in FEW_TOKENS)
        return (*(Tactic(layout, {"tokens": tokens, "stages": ring[0], "stage_units": ring[1]})
                  for tokens, ring in few if ring is not None), Tactic(layout),
                *([Tactic(layout, {"float8": 1, "packed": 1})] if rounds and weight.dtype == "float8_e4m3" else []),
                *([Tactic(layout, {"float8": 1})] if rounds else []))

    def estimate(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> float:
        """The smallest instance that holds the tokens; unpacking where there is none. Infinite: it would be wrong."""
        tokens, rounded_from = tactic.parameters.get("tokens"), _attribute(op, "float8_rows")
        if ("float8" in tactic.parameters) != (0 < rounded_from <= num_tokens):
            return float("inf")
        if tokens is None:
            return PRODUCT_WORTH
        return float(tokens) if num_tokens <= tokens else float("inf")

    def pack(self, op: Op, program: Program, role: str, tensor: Tensor, tactic: Tactic) -> Array:
        """The weight in units; bias and norm as float32."""
        if role == "weight":
            return units.pack(_weight(op, program), tensor, tactic.layout)
        return np.ascontiguousarray(tensor.values, np.float32).reshape(-1).view(np.uint8)

    def unpack(self, weight: Weight, packed: Array, layout: str) -> Tensor:
        """The checkpoint's numbers again."""
        if len(weight.shape) == 2:
            return units.unpack(weight, packed, layout)
        return Tensor(packed.view(np.float32).reshape(weight.shape))

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """The launches of either way."""
        if "float8" in tactic.parameters:
            return (_packed_float8 if "packed" in tactic.parameters else _many_float8)(op, program, tactic)
        return _few(op, program, tactic) if "tokens" in tactic.parameters else _many(op, program, tactic)

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """As `GpuSource.scratch` says for so many rows."""
        source = self.source(op, program, tactic)
        pieces = source.scratch if isinstance(source, GpuSource) else ()
        return sum(size.at({"rows": num_tokens, "one": 1}) for _, size in pieces)

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """The packed weight once, x and residual read, y written; two operations per weight and token."""
        weight = _weight(op, program)
        outputs, inputs = weight.shape
        read = inputs * (2 if _attribute(op, "gate") else 1) + outputs * (len(op.inputs) - 1)
        return Cost(units.Shape(weight).bytes + 4.0 * num_tokens * (read + outputs),
                    2.0 * num_tokens * outputs * inputs)

    def reference(self, op: Op, program: Program, inputs: Mapping[str, Array],
                  weights: Mapping[str, Tensor]) -> dict[str, Array]:
        """The op in NumPy, x' in 16 bits or float8. Weights are not rounded: where they are, the error is the same."""
        whole = replace(op, attributes={**ATTRIBUTE_DEFAULTS, **op.attributes})
        given = dict(zip(op.inputs, (inputs[name.rstrip("?")] for name in OPS["linear"].inputs
                                     if name.rstrip("?") in inputs), strict=True))
        weight = _weight(op, program)
        numbers = {role: tensor.values.astype(np.float32) if tensor.scales is None
                   else dequantize(tensor.values, tensor.scales, weight.dtype) for role, tensor in weights.items()}
        prepared = _prepared(whole, given, numbers)
        if not 0 < whole.attributes["float8_rows"] <= len(prepared):
            prepared = prepared.astype(_dtype(weight)).astype(np.float32)
        elif whole.attributes["weight_bits"]:
            numbers["weight"] = round_to_bits(numbers["weight"], whole.attributes["weight_bits"])
        plain = replace(whole, attributes=dict(ATTRIBUTE_DEFAULTS), weights={
            role: name for role, name in op.weights.items() if role != "norm"})
        numbers.pop("norm", None)
        return {"y": run_op(plain, {**given, op.inputs[0]: prepared}, numbers)[op.outputs[0]]}


def _has_float8(weight: Weight) -> bool:
    """Whether it can be unpacked to float8 with one scale a row."""
    return weight.dtype == "float8_e4m3" or (weight.dtype == "int4" and weight.group_size > 0)


def _prepared(op: Op, given: Mapping[str, Array], numbers: Mapping[str, Array]) -> Array:
    """X' in float32: the product with the identity is the input itself."""
    width = numbers["weight"].shape[1]
    roles = {"weight": np.eye(width, dtype=np.float32)} | {r: numbers[r] for r in ("norm",) if r in numbers}
    alone = replace(op, inputs=op.inputs[:1], weights=dict.fromkeys(roles, ""))
    return run_op(alone, given, roles)[op.outputs[0]]


def _few(op: Op, program: Program, tactic: Tactic) -> GpuSource:
    shape, tokens = units.Shape(_weight(op, program)), tactic.parameters["tokens"]
    given = ("weights.weight", "scratch.x", "", _row_scales(shape), 0.0)
    return gpu_source(("linear.cuh",), _input(op, program, tokens),
                      small_linear(op, program, tactic, given, _output(op)),
                      scratch={"x": Size(times=tokens * shape.units * units.UNIT_INPUTS * 2)})


def small_linear(op: Op, program: Program, tactic: Tactic, given: tuple[Argument, ...], output: tuple[Argument, ...],
                 partial_sums: int = 0, output_type: str = "") -> Launch:
    """The launch over an input in input order. `partial_sums` of squares of it: the norm that is yet to be applied.

    `output_type`: the C++ type that takes the sums; none: rows of float32.
    """
    weight, tokens = _weight(op, program), tactic.parameters["tokens"]
    shape, outputs = units.Shape(weight), weight.shape[0]
    stages, stage_units = tactic.parameters["stages"], tactic.parameters["stage_units"]
    order = native_order(tactic.layout, outputs)
    kernel = (f"tw::small_linear<{native_weights(weight)}, {shape.tiles * units.UNIT_ROWS}, "
              f"{shape.units * units.UNIT_INPUTS}, {tokens}, {WARPS}, {stages}, {stage_units}, {partial_sums}, "
              f"{output_type or f'tw::Rows<{order}, {outputs}>'}>")
    return Launch(kernel, (Size("processors"), Size(), Size()), 32 * WARPS,
                  _shared_bytes(weight, tokens, stages, stage_units), (given, output))


def _many(op: Op, program: Program, tactic: Tactic) -> GpuSource:
    """Piece after piece of the weight's rows: unpack, multiply, put the results in their places.

    A weight that is one piece is unpacked into its natural order; products that nothing is added to are results then.
    """
    weight = _weight(op, program)
    shape = units.Shape(weight)
    outputs, padded, number = weight.shape[0], shape.units * units.UNIT_INPUTS, dtype_name(weight)
    piece_tiles = max(1, min(shape.tiles, PANEL_BYTES // (units.UNIT_ROWS * padded * 2)))
    order = native_order(tactic.layout, outputs)
    is_whole = piece_tiles == shape.tiles
    left = "tw::InOrder" if is_whole else order  # from the panel's order to the natural one
    is_direct = (left == "tw::InOrder" and piece_tiles * units.UNIT_ROWS == outputs and len(op.inputs) == 1
                 and "bias" not in op.weights)
    launches = [_input(op, program, 0)]
    for tile in range(0, shape.tiles, piece_tiles):
        tiles = min(piece_tiles, shape.tiles - tile)
        columns = tiles * units.UNIT_ROWS
        launches += [
            unpack(weight, "weights.weight", order if is_whole else "tw::InOrder", "scratch.panel", tile, tiles),
            matmul(Size("rows"), "scratch.x", "scratch.panel", "outputs.y" if is_direct else "scratch.product",
                   (columns, padded), number, "float32")]
        if not is_direct:
            launches.append(Launch(
                f"tw::linear_output<{left}, {outputs}, {columns}>",
                (Size("rows"), Size(times=-(-columns // 256)), Size()), 256, 0,
                ("scratch.product", _output(op), tile * units.UNIT_ROWS)))
    panel = {"x": Size("rows", times=padded * 2), "panel": Size(times=piece_tiles * units.UNIT_ROWS * padded * 2)}
    product = {} if is_direct else {"product": Size("rows", times=piece_tiles * units.UNIT_ROWS * 4)}
    return gpu_source(("linear.cuh",), *launches, scratch=panel | product)


def _many_float8(op: Op, program: Program, tactic: Tactic) -> GpuSource:
    """X' in float32, then in float8; the whole weight as float8; products in their places."""
    weight = _weight(op, program)
    shape = units.Shape(weight)
    outputs, padded, rows = weight.shape[0], shape.units * units.UNIT_INPUTS, shape.tiles * units.UNIT_ROWS
    scales = ("scratch.scales", "scratch.weight_scales")
    rounded = row_pass("operand_rows", ("float",), padded, "tw::RowsFloat8",
                       ("scratch.x", ("scratch.rounded", scales[0])), Size("rows"))
    order = native_order(tactic.layout, outputs)
    finish = Launch(f"tw::linear_output<tw::InOrder, {outputs}, {rows}>",
                    (Size("rows"), Size(times=-(-rows // 256)), Size()), 256, 0, ("scratch.product", _output(op), 0))
    return gpu_source(
        ("prefill.cuh",), _input(op, program, 0, "float"), rounded,
        unpack_bytes(weight, "weights.weight", order, "scratch.panel", scales[1]),
        scaled_matmul(Size("rows"), "scratch.rounded", "scratch.panel", "scratch.product", (rows, padded), "float32",
                      scales), finish,
        scratch={"x": Size("rows", times=4 * padded), "rounded": Size("rows", times=padded),
                 "scales": Size("rows", times=4), "panel": Size(times=rows * padded),
                 "weight_scales": Size(times=4 * rows), "product": Size("rows", times=4 * rows)})


def _packed_float8(op: Op, program: Program, tactic: Tactic) -> GpuSource:
    """The same with the weight as it lies, straight into the results."""
    weight = _weight(op, program)
    padded = units.Shape(weight).units * units.UNIT_INPUTS
    operand: tuple[Argument, ...] = ("scratch.rounded", "scratch.scales", "sizes.rows")
    rounded = row_pass("operand_rows", ("float",), padded, OPERAND, ("scratch.x", operand), Size("rows"))
    results = f"tw::Float8Results<{native_order(tactic.layout, weight.shape[0])}, {weight.shape[0]}>"
    product = linear_float8(weight, "weights.weight", operand, NATIVE_TYPES[dtype_name(weight)], results, _output(op))
    return gpu_source(("linear_float8.cuh",), _input(op, program, 0, "float"), rounded, product,
                      scratch={"x": Size("rows", times=4 * padded), "rounded": ordered("rows", padded),
                               "scales": Size("rows", times=4)})


def row_pass(function: str, shape: tuple[object, ...], columns: int, operand: str, arguments: Arguments,
             rows: Size) -> Launch:
    """A kernel of native/prefill.cuh: a block for each row of so many columns, eight or a few times eight a thread."""
    vectors = columns // 8
    threads = -(-vectors // -(-vectors // WIDEST_BLOCK) // 32) * 32
    number, *rest = shape
    template = (number, columns, threads, *rest, operand)
    return Launch(f"tw::{function}<{', '.join(map(str, template))}>", (rows, Size(), Size()), threads, 0, arguments)


def unpack(weight: Weight, address: str, order: str, panel: str, tile: int, tiles: int) -> Launch:
    """So many row tiles from `tile` on as 16-bit rows, in the order that a C++ type of linear.cuh names."""
    shape = units.Shape(weight)
    return Launch(f"tw::unpack_units<{native_weights(weight)}, {shape.units}, {order}>",
                  (Size(times=-(-shape.units // UNPACK_WARPS)), Size(times=tiles), Size()), 32 * UNPACK_WARPS, 0,
                  (address, f"{address}+{shape.bytes}" if shape.has_row_scales else "", panel, tile))


def unpack_bytes(weight: Weight, address: str, order: str, panel: str, scales: str) -> Launch:
    """A float8 weight as rows of float8 and one float32 scale a row; int4 of groups is rounded for it."""
    shape = units.Shape(weight)
    if weight.dtype == "int4":
        return Launch(f"tw::round_units<{native_weights(weight)}, {shape.units}, {order}, 8>",
                      (Size(times=shape.tiles), Size(), Size()), 32 * UNPACK_WARPS, 0, (address, panel, scales))
    return Launch(f"tw::unpack_bytes<{native_weights(weight)}, {shape.units}, {order}>",
                  (Size(times=-(-shape.units // UNPACK_WARPS)), Size(times=shape.tiles), Size()), 32 * UNPACK_WARPS, 0,
                  (address, f"{address}+{shape.bytes}", panel, scales))


def _input(op: Op, program: Program, tokens: int, number: str = "") -> Launch:
    """X' in the weight's 16 bits or as `number`: in input order for so many tokens, or row after row."""
    weight = _weight(op, program)
    gate = _attribute(op, "gate") or "none"
    shape = (number or NATIVE_TYPES[dtype_name(weight)], weight.shape[1], units.Shape(weight).units * units.UNIT_INPUTS,
             _flag("norm" in op.weights), f"tw::Function::{gate}", tokens)
    return Launch(f"tw::linear_input<{', '.join(map(str, shape))}>",
                  (Size(times=tokens) if tokens else Size("rows"), Size(), Size()), 256, 0,
                  ("inputs.x", "weights.norm", "scratch.x", float(_attribute(op, "norm_epsilon")), "sizes.rows"))


def _output(op: Op) -> tuple[str, ...]:
    return ("outputs.y", "weights.bias", "inputs.residual" if len(op.inputs) > 1 else "", "sizes.rows")


def _row_scales(shape: units.Shape) -> str:
    return f"weights.weight+{shape.bytes}" if shape.has_row_scales else ""


def _ring(weight: Weight, tokens: int, limit: int) -> tuple[int, int] | None:
    """(stages, units of a stage) of each warp's ring: large stages, then as many as fit, 2 to 8; None: not even two."""
    groups = units.Shape(weight).units
    for stage_units in (8, 7, 5, 4, 2, 1):
        if stage_units > 1 and groups % (WARPS * stage_units):
            continue
        for stages in (8, 6, 5, 4, 3, 2):
            if _shared_bytes(weight, tokens, stages, stage_units) <= limit:
                return stages, stage_units
    return None


def _shared_bytes(weight: Weight, tokens: int, stages: int, stage_units: int) -> int:
    """SmallShape::SHARED_BYTES of native/linear_small.cuh."""
    shape = units.Shape(weight)
    pass_tiles = 4 if shape.tiles <= 512 else 16
    has_bias = weight.dtype == "int4" or (weight.dtype, weight.scale_dtype) == ("int8", "float16")
    bias = WARPS * -(-shape.units // WARPS) * 4 * 8 * 4 if has_bias else 0
    return (WARPS * stages * stage_units * shape.unit_bytes + shape.units * units.UNIT_INPUTS * tokens * 2
            + pass_tiles * WARPS * tokens * units.UNIT_ROWS * 4 + bias)


def _layout(op: Op, program: Program) -> str:
    """The row order that fused epilogues want, where the shapes allow it."""
    readers = program.consumers(op.outputs[0])
    rows = _weight(op, program).shape[0]
    if len(readers) != 1 or rows % units.UNIT_ROWS:
        return units.IN_ORDER
    reader = readers[0]
    if reader.kind == "rope_cache" and reader.attributes["head_size"] == units.HEAD:
        return units.ROPE
    if reader.kind == "linear" and _attribute(reader, "gate"):
        return units.GATED
    return units.IN_ORDER


def native_order(layout: str, rows: int) -> str:
    """The C++ type of a layout's row order."""
    return {units.ROPE: "tw::RopePairs", units.GATED: f"tw::GatePairs<{rows // 2}>"}.get(layout, "tw::InOrder")


def native_weights(weight: Weight) -> str:
    """The C++ type that reads a unit."""
    number = NATIVE_TYPES[dtype_name(weight)]
    if not weight.is_quantized:
        return f"tw::Plain<{number}>"
    kind = {"int4": "Int4", "int8": "Int8", "float8_e4m3": "Fp8"}[weight.dtype]
    return f"tw::{kind}<{number}, {units.Shape(weight).group}>"


def dtype_name(weight: Weight) -> str:
    """The 16-bit type that products are of."""
    return weight.scale_dtype if weight.is_quantized else weight.dtype


def _dtype(weight: Weight) -> Any:
    return units.DTYPES[dtype_name(weight)]


def _weight(op: Op, program: Program) -> Weight:
    return program.weights[op.weights["weight"]]


def _attribute(op: Op, name: str) -> Any:
    return op.attributes.get(name, ATTRIBUTE_DEFAULTS[name])


def _flag(value: bool) -> str:
    return "true" if value else "false"
