"""A decode step of one or two sequences in three launches: all layers, lm_head, count (native/decode_layers.cuh).

It is a stretch: another way to run the whole program, over the weights as their own kernels packed them.
"""

from __future__ import annotations

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.attention import LOG2E
from tensorwright.kernels.cuda.decoder import HEAD, Decoder, Shapes
from tensorwright.kernels.cuda.launch import GpuSource, Launch, Size, Stretch
from tensorwright.kernels.cuda.linear import Linear, native_weights, small_linear
from tensorwright.kernels.cuda.targets import PROCESSORS, SHARED_BYTES
from tensorwright.kernels.interface import Tactic, Target
from tensorwright.program.program import Op, Program

WARPS, STAGE_CODES, MAX_LAYERS, KEY_CHUNK = 12, 4096, 48, 256  # of native/decode_layers.cuh; bytes of a stage
STATIC_SHARED = 8 << 10  # barriers, pointers, keys and what else the kernel declares
MOST_SLOTS = {1: 43, 2: 28}  # stages on their way, by sequences: more gain nothing


def layer_stretches(decoder: Decoder, program: Program, target: Target) -> tuple[Stretch, ...]:
    """One for each number of sequences that the kernel and the target are made for."""
    processors = PROCESSORS.get(target.name)
    if processors is None or len(decoder.layers) > MAX_LAYERS:
        return ()
    sources = {tokens: _source(program, target, decoder, tokens, processors)
               for tokens in MOST_SLOTS if _fits(decoder.shapes, tokens, processors)}
    limit = 0 if decoder.has_one_window else decoder.window
    return tuple(Stretch(0, len(program.ops), tokens, processors, source, limit)
                 for tokens, source in sources.items() if source is not None)


def _stage_units(shapes: Shapes) -> int:
    return STAGE_CODES // units.Shape(shapes.weight).code_bytes


def _fits(shapes: Shapes, tokens: int, processors: int) -> bool:
    """What the kernel asserts of its shapes; each kv head of each sequence has a block."""
    group = shapes.heads // shapes.kv_heads
    widest = max(shapes.ffn, shapes.hidden)
    widths = (shapes.hidden, shapes.heads * HEAD, shapes.ffn)
    return (KEY_CHUNK % shapes.block_size == 0 and tokens * shapes.kv_heads <= processors
            and all(width % (_stage_units(shapes) * units.UNIT_INPUTS) == 0 for width in widths)
            and shapes.hidden * tokens % 1024 == 0 and shapes.hidden * tokens <= 32 * 32 * WARPS and group <= 8
            and WARPS * group * HEAD * 4 <= widest * tokens * 2)


def _source(program: Program, target: Target, decoder: Decoder, tokens: int, processors: int) -> GpuSource | None:
    lm_head, layers, s = program.ops[-1], decoder.layers, decoder.shapes
    tactic = next((t for t in Linear().tactics(lm_head, program, target) if t.parameters.get("tokens") == tokens), None)
    if tactic is None:
        return None
    chunks, group = processors // (tokens * s.kv_heads), s.heads // s.kv_heads
    words = {"x": s.hidden // 2, "q": s.heads * 64, "kv": 2 * s.kv_heads * 64, "attended": s.heads * 64,
             "x_mlp": s.hidden // 2, "gated": s.ffn // 2, "square_sums": s.hidden // 16,
             "square_sums_mlp": s.hidden // 16}
    launches = (_layers_launch(program, decoder, target, tokens, processors), _lm_head(program, tactic, s, tokens),
                Launch("tw::count_step", threads=1, arguments=("zeros.step",)))
    return GpuSource(
        ("decode_layers.cuh", "linear.cuh"), "", launches,
        scratch=(("parts", Size(times=tokens * s.kv_heads * chunks * group * (HEAD + 2) * 4)),
                 ("x_out", Size(times=tokens * s.hidden * 2)), ("squares_out", Size(times=tokens * s.hidden // 16 * 4)),
                 ("stream_out", Size(times=tokens * s.hidden * 4))),
        zeros=(("step", 256), ("arrivals", tokens * s.kv_heads * 4),
               *((name, count * tokens * 8) for name, count in words.items())),
        tables=(("layers", tuple(pointer for ops in layers for pointer in layer_pointers(ops))),))


def _layers_launch(program: Program, decoder: Decoder, target: Target, tokens: int, processors: int) -> Launch:
    layers, s = decoder.layers, decoder.shapes
    widest = max(s.ffn, s.hidden)
    linears = (((s.heads + 2 * s.kv_heads) * HEAD, s.hidden), (s.hidden, s.heads * HEAD), (2 * s.ffn, s.hidden),
               (s.hidden, s.ffn))
    weight, stage_units = units.Shape(s.weight), _stage_units(s)
    stages = max(-(-rows // 16 // processors) * (inputs // 128 // stage_units) for rows, inputs in linears)
    fixed = widest * tokens * 2 + stages * tokens * 64 + widest // (weight.group or units.UNIT_INPUTS) * 32
    stage_bytes = stage_units * weight.unit_bytes
    slots = min(MOST_SLOTS[tokens], (SHARED_BYTES[target.name] - STATIC_SHARED - fixed) // stage_bytes)
    shape = (native_weights(s.weight), tokens, s.hidden, s.heads, s.kv_heads, s.ffn, s.block_size, slots, WARPS,
             processors)
    embedding, first, lm_head = program.ops[0], layers[0], program.ops[-1]
    arguments = (
        "tables.layers", f"named.{lm_head.weights['norm']}", f"named.{embedding.weights['table']}", "batch.token_ids",
        "batch.positions", "batch.slots", "batch.kv_lengths", "batch.block_tables",
        f"named.{first[1].weights['inverse_frequencies']}", "zeros.step", "zeros.x", "zeros.q", "zeros.kv",
        "zeros.attended", "zeros.x_mlp", "zeros.gated", "zeros.square_sums", "zeros.square_sums_mlp", "scratch.parts",
        "zeros.arrivals", "scratch.x_out", "scratch.squares_out", "scratch.stream_out", len(layers),
        "sizes.table_width", decoder.window if decoder.has_one_window else 0,
        float(first[0].attributes["norm_epsilon"]), float(first[2].attributes["scale"] * LOG2E))
    return Launch(f"tw::decode_layers<{', '.join(map(str, shape))}>", (Size(times=processors), Size(), Size()),
                  32 * WARPS, slots * stage_bytes + fixed, (arguments,))


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
