"""Recognises programs of plain decoders by their ops, for kernels that run several of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensorwright.kernels.cuda import units
from tensorwright.program.program import Op, Program, Weight

HEAD = 128
LAYER = ("linear", "rope_cache", "attention", "linear", "linear", "linear")


@dataclass(frozen=True)
class Shapes:
    """What the layers have in common."""

    weight: Weight  # as all four linears of a layer are held
    number: str  # the 16-bit dtype of products
    cache: str  # that, or float8_e4m3
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    block_size: int


@dataclass(frozen=True)
class Decoder:
    """The ops of each layer, between an embedding and gathered rows with an lm_head.

    window: the smallest of any layer, which sequences of so many tokens do not notice yet; 0: none. has_one_window:
    all layers have this one.
    """

    layers: tuple[tuple[Op, ...], ...]
    shapes: Shapes
    window: int
    has_one_window: bool


def recognise(program: Program, layouts: Mapping[str, str]) -> Decoder | None:
    """The program as such a decoder, if its weights (`layouts` by name) lie as fused epilogues want them."""
    layers = _layers(program)
    shapes = None if layers is None else _shapes(layers, program, layouts)
    if layers is None or shapes is None:
        return None
    windows = [int(attention.attributes["window"]) for _, _, attention, *_ in layers]
    return Decoder(tuple(layers), shapes, min((window for window in windows if window > 0), default=0),
                   len(set(windows)) == 1)


def few_layers(program: Program, count: int) -> Program | None:
    """The same with the first layers only, as far as the time of a step is concerned; None: not such a decoder."""
    layers = _layers(program)
    if layers is None:
        return None
    return program.with_ops([program.ops[0], *(op for layer in layers[:count] for op in layer), *program.ops[-2:]])


def _layers(program: Program) -> list[tuple[Op, ...]] | None:
    """The ops of each layer, where the program is an embedding, such layers, gathered rows and an lm_head."""
    kinds = [op.kind for op in program.ops]
    count, rest = divmod(len(kinds) - 3, len(LAYER))
    if rest or count < 1 or kinds != ["embedding", *LAYER * count, "gather_rows", "linear"]:
        return None
    return [program.ops[1 + len(LAYER) * i:1 + len(LAYER) * (i + 1)] for i in range(count)]


def _shapes(layers: list[tuple[Op, ...]], program: Program, layouts: Mapping[str, str]) -> Shapes | None:
    """The shapes, if all layers have the same, and nothing that the kernel does not do."""
    found = {_shapes_of_layer(ops, program) for ops in layers}
    shapes = found.pop() if len(found) == 1 else None
    wanted = (units.ROPE, units.IN_ORDER, units.GATED, units.IN_ORDER)
    linears = [[op for op in ops if op.kind == "linear"] for ops in layers]
    if [[layouts[op.weights["weight"]] for op in four] for four in linears] != [list(wanted)] * len(layers):
        return None
    lm_head = program.ops[-1]
    return shapes if set(lm_head.weights) == {"weight", "norm"} and not lm_head.attributes["gate"] else None


def _shapes_of_layer(ops: tuple[Op, ...], program: Program) -> Shapes | None:
    qkv, rope, attention, dense, fc_gate, proj = ops
    linears = (qkv, dense, fc_gate, proj)
    held = [program.weights[op.weights["weight"]] for op in linears]
    a, cache, number = attention.attributes, program.buffers[rope.outputs[1]], held[0].scale_dtype or held[0].dtype
    is_plain = (
        all("bias" not in op.weights for op in linears) and set(rope.weights) == {"inverse_frequencies"}
        and ["norm" in op.weights for op in linears] == [True, False, True, False]
        and [len(op.inputs) for op in linears] == [1, 2, 1, 2] and proj.attributes["gate"] == "silu"
        and len({(w.dtype, w.group_size, w.scale_dtype) for w in held}) == 1
        and a["head_size"] == HEAD and rope.attributes["attention_factor"] == 1.0
        and program.weights[rope.weights["inverse_frequencies"]].shape == (HEAD // 2,)
        and cache.dtype in (number, "float8_e4m3") and int(cache.shape[3]) % 16 == 0)
    if not is_plain:
        return None
    weight = Weight("", (0, 0), held[0].dtype, held[0].group_size, held[0].scale_dtype)
    return Shapes(weight, number, cache.dtype, held[0].shape[1], a["num_heads"], a["num_kv_heads"], held[3].shape[1],
                  int(cache.shape[3]))
