"""A decode step of one or two sequences in two launches: all layers, lm_head (native/decode_layers.cuh).

It is a stretch: another way to run the whole program, over the weights as their own kernels packed them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.attention import LOG2E
from tensorwright.kernels.cuda.decoder import HEAD, Decoder, Shapes
from tensorwright.kernels.cuda.launch import GpuSource, Launch, Size, Stretch
from tensorwright.kernels.cuda.linear import Linear, native_weights, small_linear
from tensorwright.kernels.cuda.targets import PROCESSORS, SHARED_BYTES
from tensorwright.kernels.interface import Tactic, Target
from tensorwright.program.program import Op, Program

WARPS, STAGE_BYTES, MAX_LAYERS = 12, 4096, 48  # of native/decode_layers.cuh; codes of a stage
STATIC_SHARED = 8 << 10  # barriers, pointers, keys and what else the kernel declares
MOST_STAGES = {1: 3, 2: 3}  # on their way to each warp, by sequences: more gain nothing


def layer_stretches(decoder: Decoder, program: Program, target: Target) -> tuple[Stretch, ...]:
    """One for each number of sequences that the kernel and the target are made for."""
    processors = PROCESSORS.get(target.name)
    if processors is None or len(decoder.layers) > MAX_LAYERS or decoder.shapes.cache != decoder.shapes.number:
        return ()
    sources = {tokens: _source(program, target, decoder, tokens, processors)
               for tokens in MOST_STAGES if _fits(decoder.shapes, tokens, processors)}
    limit = 0 if decoder.has_one_window else decoder.window
    return tuple(Stretch(0, len(program.ops), tokens, processors, source, limit)
                 for tokens, source in sources.items() if source is not None)


@dataclass(frozen=True)
class _Linears:
    """Sizes of a layer's four linears in the kernel: qkv, output projection, gate and up, down."""

    shapes: Shapes
    tokens: int
    processors: int

    @property
    def rows_and_inputs(self) -> tuple[tuple[int, int], ...]:
        """Of each."""
        s = self.shapes
        return (((s.heads + 2 * s.kv_heads) * HEAD, s.hidden), (s.hidden, s.heads * HEAD), (2 * s.ffn, s.hidden),
                (s.hidden, s.ffn))

    @property
    def stage_units(self) -> int:
        """Units that are one copy."""
        return STAGE_BYTES // units.Shape(self.shapes.weight).code_bytes

    @property
    def stage_bytes(self) -> int:
        """With their scales."""
        return self.stage_units * units.Shape(self.shapes.weight).unit_bytes

    @property
    def input_bytes(self) -> int:
        """Of the widest input."""
        return max(inputs for _, inputs in self.rows_and_inputs) * self.tokens * 2

    @property
    def sum_bytes(self) -> int:
        """Partial sums of the linear with most stages in one block."""
        stages = max(-(-rows // units.UNIT_ROWS // self.processors) * (inputs // units.UNIT_INPUTS // self.stage_units)
                     for rows, inputs in self.rows_and_inputs)
        return stages * self.tokens * units.UNIT_ROWS * 4

    @property
    def bias_bytes(self) -> int:
        """What products of raw codes need of the input (`RAW_BIAS` of native/weights.cuh)."""
        weight = self.shapes.weight
        if weight.dtype != "int4" and (weight.dtype, weight.scale_dtype) != ("int8", "float16"):
            return 0
        groups = units.UNIT_INPUTS // weight.group_size if weight.group_size > 0 else 1
        return self.input_bytes // (2 * self.tokens) // units.UNIT_INPUTS * groups * 32

    @property
    def shared_bytes(self) -> int:
        """All but the ring."""
        return self.input_bytes + self.sum_bytes + self.bias_bytes


def _fits(s: Shapes, tokens: int, processors: int) -> bool:
    """What the kernel asserts of its shapes."""
    linears, group = _Linears(s, tokens, processors), s.heads // s.kv_heads
    return (s.block_size % 16 == 0 and processors >= tokens * s.kv_heads and group <= 8
            and all(rows // units.UNIT_ROWS >= processors and inputs % 512 == 0
                    for rows, inputs in linears.rows_and_inputs)
            and s.hidden // units.UNIT_ROWS * tokens // 4 <= 32 * WARPS
            and WARPS * group * HEAD * 4 <= linears.input_bytes + linears.sum_bytes)


def _source(program: Program, target: Target, decoder: Decoder, tokens: int, processors: int) -> GpuSource | None:
    lm_head, layers, s = program.ops[-1], decoder.layers, decoder.shapes
    tactic = next((t for t in Linear().tactics(lm_head, program, target) if t.parameters.get("tokens") == tokens), None)
    if tactic is None:
        return None
    chunks, group = processors // (tokens * s.kv_heads), s.heads // s.kv_heads
    words = {"x": s.hidden // 2, "q": s.heads * 64, "kv": 2 * s.kv_heads * 64, "attended": s.heads * 64,
             "x_mlp": s.hidden // 2, "gated": s.ffn // 2, "square_sums": s.hidden // 16,
             "square_sums_mlp": s.hidden // 16}
    layers_launch = _layers_launch(program, decoder, target, _Linears(s, tokens, processors))
    if layers_launch is None:
        return None
    return GpuSource(
        ("decode_layers.cuh", "linear.cuh"), "", (layers_launch, _lm_head(program, tactic, s, tokens)),
        scratch=(("parts", Size(times=tokens * s.kv_heads * chunks * group * (HEAD + 2) * 4)),
                 ("x_out", Size(times=tokens * s.hidden * 2)), ("squares_out", Size(times=tokens * s.hidden // 16 * 4)),
                 ("stream_out", Size(times=tokens * s.hidden * 4))),
        zeros=(("arrivals", tokens * s.kv_heads * 4),
               *((name, count * tokens * 4) for name, count in words.items())),
        tables=(("layers", tuple(pointer for ops in layers for pointer in layer_pointers(ops))),))


def _layers_launch(program: Program, decoder: Decoder, target: Target, linears: _Linears) -> Launch | None:
    """None: it does not fit into shared memory."""
    layers, s, tokens, processors = decoder.layers, linears.shapes, linears.tokens, linears.processors
    warps_bytes = WARPS * linears.stage_bytes
    room = SHARED_BYTES[target.name] - STATIC_SHARED - linears.shared_bytes
    depth = min(MOST_STAGES[tokens], room // warps_bytes)
    if depth < 2:
        return None
    shape = (native_weights(s.weight), tokens, s.hidden, s.heads, s.kv_heads, s.ffn, s.block_size, depth, WARPS,
             processors)
    embedding, first, lm_head = program.ops[0], layers[0], program.ops[-1]
    arguments = (
        "tables.layers", f"named.{lm_head.weights['norm']}", f"named.{embedding.weights['table']}", "batch.token_ids",
        "batch.positions", "batch.slots", "batch.kv_lengths", "batch.block_tables",
        f"named.{first[1].weights['inverse_frequencies']}", "zeros.x", "zeros.q", "zeros.kv", "zeros.attended",
        "zeros.x_mlp", "zeros.gated", "zeros.square_sums", "zeros.square_sums_mlp", "scratch.parts", "zeros.arrivals",
        "scratch.x_out", "scratch.squares_out", "scratch.stream_out", len(layers), "sizes.table_width",
        decoder.window if decoder.has_one_window else 0, float(first[0].attributes["norm_epsilon"]),
        float(first[2].attributes["scale"] * LOG2E))
    return Launch(f"tw::decode_layers<{', '.join(map(str, shape))}>", (Size(times=processors), Size(), Size()),
                  32 * WARPS, depth * warps_bytes + linears.shared_bytes, (arguments,), cooperative=True)


def _lm_head(program: Program, tactic: Tactic, s: Shapes, tokens: int) -> Launch:
    op = program.ops[-1]
    weight = program.weights[op.weights["weight"]]
    shape, name = units.Shape(weight), f"named.{weight.name}"
    given = (name, "scratch.x_out", "scratch.squares_out", f"{name}+{shape.bytes}" if shape.has_row_scales else "",
             float(op.attributes["norm_epsilon"]))
    return small_linear(op, program, tactic, given, (f"named.{op.outputs[0]}", "", "", "sizes.outputs"), s.hidden // 16)


def layer_pointers(ops: tuple[Op, ...]) -> tuple[str, ...]:
    """tw::LayerPointers of a layer."""
    qkv, rope, _, dense, fc_gate, proj = ops
    weights = [op.weights["weight"] for op in (qkv, dense, fc_gate, proj)]
    return tuple(f"named.{name}" for name in (*weights, qkv.weights["norm"], fc_gate.weights["norm"], rope.outputs[1]))
