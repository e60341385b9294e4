"""Steps of many tokens, prompts and single tokens mixed: the layers of a decoder with 16-bit numbers between the ops.

It is a stretch. Each linear is unpacked into rows of 16-bit numbers and multiplied by a library; one pass after it does
everything up to the next linear's input: residual and norm, rope and cache write, or the gated activation. The residual
stream stays float32, in the buffer of the last layer's output, where the ops after the layers find it.

Where a program rounds the inputs of its linears to float8 from some number of tokens on, these steps have stretches of
their own: the passes leave float8 with one scale a row, and weights are multiplied as they are packed, or unpacked to
float8 for the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tensorwright.kernels.cpu.plain import attribute
from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.attention import Attention, attention_launch, attention_memory, rope_launch
from tensorwright.kernels.cuda.elementwise import NATIVE_TYPES
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch, Size, Stretch, matmul, scaled_matmul
from tensorwright.kernels.cuda.linear import dtype_name, native_order, row_pass, unpack, unpack_bytes
from tensorwright.kernels.cuda.linear_float8 import OPERAND, linear_float8, ordered
from tensorwright.kernels.interface import Tactic, Target
from tensorwright.program.ops import ACTIVATIONS
from tensorwright.program.program import Op, Program, Weight

LAYER = ("linear", "rope_cache", "attention", "linear", "linear", "linear")
LEAST_TOKENS = 9  # fewer stream through small_linear, which unpacks nothing
TOKENS = Size("tokens")


@dataclass(frozen=True)
class _Prefill:
    """A program whose first ops are an embedding and `layers`."""

    program: Program
    target: Target
    layouts: Mapping[str, str]
    layers: tuple[tuple[Op, ...], ...]
    is_float8: bool = False  # what is multiplied
    is_packed: bool = False  # float8 weights are, as they lie

    @property
    def dtype(self) -> str:
        """The 16-bit type of all linears."""
        return dtype_name(self.weight(self.layers[0][0]))

    @property
    def number(self) -> str:
        """Its C++ type."""
        return NATIVE_TYPES[self.dtype]

    @property
    def hidden(self) -> int:
        """Columns of the residual stream."""
        return self.weight(self.layers[0][0]).shape[1]

    @property
    def stream(self) -> str:
        """The buffer that holds it."""
        return f"named.{self.layers[-1][-1].outputs[0]}"

    def tactic(self, op: Op) -> Tactic:
        """Attention's."""
        return Attention().tactics(op, self.program, self.target)[0]

    def weight(self, op: Op) -> Weight:
        """A linear's."""
        return self.program.weights[op.weights["weight"]]


def prefill_stretches(program: Program, target: Target, layouts: Mapping[str, str]) -> tuple[Stretch, ...]:
    """Those for most tokens first; none if the program does not begin with an embedding and plain decoder layers."""
    prefill = _Prefill(program, target, layouts, _layers(program))
    if not prefill.layers or not all(_fits(prefill, ops) for ops in prefill.layers):
        return ()
    end = 1 + len(LAYER) * len(prefill.layers)
    found = {_float8_rows(op) for ops in prefill.layers for op in ops if op.kind == "linear"}
    if found == {0}:
        return (Stretch(0, end, 0, 0, _source(prefill), least=LEAST_TOKENS),)
    if len(found) > 1:
        return ()
    least = found.pop()
    is_packed = all(prefill.weight(op).dtype == "float8_e4m3" for ops in prefill.layers for op in ops
                    if op.kind == "linear")
    rounded = replace(prefill, is_float8=True, is_packed=is_packed)
    return (Stretch(0, end, 0, 0, _source(rounded), least=least),
            Stretch(0, end, 0, 0, _source(prefill), least=LEAST_TOKENS))


def _float8_rows(op: Op) -> int:
    return int(attribute(op, "float8_rows"))


def _layers(program: Program) -> tuple[tuple[Op, ...], ...]:
    """Runs of ops of the right kinds, each over the stream that the one before leaves."""
    ops, stream = program.ops, program.ops[0].outputs[0]
    found: list[tuple[Op, ...]] = []
    while ops[0].kind == "embedding" and len(ops) >= 1 + len(LAYER) * (len(found) + 1):
        layer = ops[1 + len(LAYER) * len(found):1 + len(LAYER) * (len(found) + 1)]
        if tuple(op.kind for op in layer) != LAYER:
            break
        qkv, _, _, dense, gate, proj = layer
        if (qkv.inputs, dense.inputs[1:], gate.inputs, proj.inputs[1:]) != (
                (stream,), (stream,), dense.outputs, dense.outputs):
            break
        found.append(layer)
        stream = proj.outputs[0]
    return tuple(found)


def _fits(prefill: _Prefill, ops: tuple[Op, ...]) -> bool:
    """What the passes between the products are made for."""
    linears = [op for op in ops if op.kind == "linear"]
    weights = [prefill.weight(op) for op in linears]
    return (all(weight.shape[0] % units.UNIT_ROWS == 0 and weight.shape[1] % units.UNIT_INPUTS == 0
                and dtype_name(weight) == prefill.dtype for weight in weights)
            and ["norm" in op.weights for op in linears] == [True, False, True, False]
            and [attribute(op, "gate") in ACTIVATIONS for op in linears] == [False, False, False, True])


def _source(prefill: _Prefill) -> GpuSource:
    embedding, last = prefill.program.ops[0], len(prefill.layers) - 1
    table = prefill.program.weights[embedding.weights["table"]]
    launches = [Launch(f"tw::embedding<{NATIVE_TYPES[table.dtype]}, {table.shape[1]}>", (TOKENS, Size(), Size()),
                       arguments=("batch.token_ids", f"named.{table.name}", prefill.stream)),
                _add_norm(prefill, None, prefill.layers[0][0])]
    for index, ops in enumerate(prefill.layers):
        launches += _layer(prefill, ops, None if index == last else prefill.layers[index + 1][0])
    parts, arrivals = attention_memory(prefill.layers[0][2])
    products = "linear_float8.cuh" if prefill.is_packed else "prefill.cuh"
    return GpuSource((products, "elementwise.cuh", "rope.cuh", "attention.cuh"), "", tuple(launches),
                     scratch=(*_scratch(prefill).items(), ("attention_parts", Size(times=parts))),
                     zeros=(("attention_arrivals", arrivals),))


def _layer(prefill: _Prefill, ops: tuple[Op, ...], following: Op | None) -> list[Launch]:
    """`following`: the linear whose norm comes next; None: an op that is not of the stretch."""
    qkv, rope, attention, dense, gate, proj = ops
    numbers = prefill.number, prefill.number
    return [
        *_product(prefill, qkv, "scratch.x"),
        rope_launch(rope, prefill.program, "scratch.wide", "scratch.x", numbers, is_stretch=True, bias=_bias(qkv)),
        attention_launch(attention, prefill.program, prefill.tactic(attention), "scratch.x", "scratch.inner", numbers,
                         is_stretch=True),
        *_attended(prefill, dense), *_product(prefill, dense, "scratch.x" if prefill.is_float8 else "scratch.inner"),
        _add_norm(prefill, dense, gate),
        *_product(prefill, gate, "scratch.x"), _gate(prefill, gate, proj),
        *_product(prefill, proj, "scratch.inner"), _add_norm(prefill, proj, following)]


def _product(prefill: _Prefill, op: Op, x: str) -> tuple[Launch, ...]:
    """scratch.wide = x · weightᵀ in 16 bits: where another way to multiply takes its place."""
    weight = prefill.weight(op)
    rows, inputs = weight.shape
    address, order = f"named.{weight.name}", native_order(prefill.layouts[weight.name], rows)
    if prefill.is_packed:
        output = f"tw::Float8Products<{prefill.number}, {order}, {rows}>"
        if _is_gated_at_once(prefill, op):
            gate = attribute(prefill.program.consumers(op.outputs[0])[0], "gate")
            output = f"tw::Float8Gated<{prefill.number}, tw::Function::{gate}, {rows // 2}>"
        return (linear_float8(weight, address, (x, "scratch.scales", "sizes.tokens"), prefill.number, output,
                              ("scratch.wide",)),)
    if prefill.is_float8:
        scales = ("scratch.scales", "scratch.weight_scales")
        return (unpack_bytes(weight, address, order, "scratch.panel", scales[1]),
                scaled_matmul(TOKENS, x, "scratch.panel", "scratch.wide", (rows, inputs), prefill.dtype, scales))
    return (unpack(weight, address, order, "scratch.panel", 0, rows // units.UNIT_ROWS),
            matmul(TOKENS, x, "scratch.panel", "scratch.wide", (rows, inputs), prefill.dtype, prefill.dtype))


def _operand(prefill: _Prefill, where: str) -> tuple[str, tuple[Argument, ...]]:
    """The C++ type that makes rows of a product's input, and its arguments."""
    if prefill.is_packed:
        return OPERAND, (where, "scratch.scales", "sizes.tokens")
    if prefill.is_float8:
        return "tw::RowsFloat8", (where, "scratch.scales")
    return f"tw::Rows16<{prefill.number}>", (where,)


def _attended(prefill: _Prefill, dense: Op) -> tuple[Launch, ...]:
    """Attention's 16-bit rows as an operand of float8, where that is asked for."""
    if not prefill.is_float8:
        return ()
    operand, x = _operand(prefill, "scratch.x")
    return (row_pass("operand_rows", (prefill.number,), prefill.weight(dense).shape[1], operand,
                     ("scratch.inner", x), TOKENS),)


def _add_norm(prefill: _Prefill, added: Op | None, normed: Op | None) -> Launch:
    """The product of `added` onto the stream, and the stream, normed for the next linear, into scratch.x."""
    flags = tuple("true" if op else "false" for op in (added, normed))
    operand, x = _operand(prefill, "scratch.x")
    norm, epsilon = ("", 0.0) if normed is None else (
        f"named.{normed.weights['norm']}", float(attribute(normed, "norm_epsilon")))
    return row_pass("add_norm", (prefill.number, *flags), prefill.hidden, operand, (
        prefill.stream, "scratch.wide", "" if added is None else _bias(added), norm, x, epsilon), TOKENS)


def _gate(prefill: _Prefill, gate: Op, proj: Op) -> Launch:
    operand, x = _operand(prefill, "scratch.inner")
    if _is_gated_at_once(prefill, gate):
        return row_pass("operand_rows", (prefill.number,), prefill.weight(proj).shape[1], operand, ("scratch.wide", x),
                        TOKENS)
    return row_pass("gate_rows", (prefill.number, f"tw::Function::{attribute(proj, 'gate')}"),
                    prefill.weight(proj).shape[1], operand, ("scratch.wide", _bias(gate), x), TOKENS)


def _is_gated_at_once(prefill: _Prefill, op: Op) -> bool:
    """Whether the product of gate and up leaves the activated gate times up."""
    return (prefill.is_packed and prefill.layouts[prefill.weight(op).name] == units.GATED and "bias" not in op.weights)


def _bias(op: Op) -> str:
    return f"named.{op.weights['bias']}" if "bias" in op.weights else ""


def _scratch(prefill: _Prefill) -> dict[str, Size]:
    """x: normed input, then q; wide: each product; inner: attention's result, then the gated activation.

    Sizes are of 16-bit numbers; float8 takes half of its place.
    """
    linears = [[prefill.weight(op) for op in ops if op.kind == "linear"] for ops in prefill.layers]
    x = max(max(qkv.shape[1], dense.shape[1]) for qkv, dense, _, _ in linears)
    inner = max(max(dense.shape[1], proj.shape[1]) for _, dense, _, proj in linears)
    wide = max(weight.shape[0] for layer in linears for weight in layer)
    panel = max(weight.shape[0] * weight.shape[1] for layer in linears for weight in layer)
    scales = {"scales": Size("tokens", times=4), "weight_scales": Size(times=4 * wide)} if prefill.is_float8 else {}
    if prefill.is_packed:
        return {"x": ordered("tokens", 2 * x), "inner": ordered("tokens", 2 * inner),
                "wide": Size("tokens", times=2 * wide), "scales": Size("tokens", times=4)}
    return {"x": Size("tokens", times=2 * x), "inner": Size("tokens", times=2 * inner),
            "wide": Size("tokens", times=2 * wide), "panel": Size(times=(1 if scales else 2) * panel), **scales}
