"""A decode step of 1 to 64 sequences in five launches a layer: qkv with rope and cache write, attention, output
projection with residual, gate and up with their product, down with residual.

It is a stretch. Activations are 16-bit and in the order that the next linear reads; the residual stream is float32, and
each norm's division comes after the product, by the sum of squares that the epilogue before it left. From 8 sequences
on, linears are those of decode_wgmma.py where they take all of the program's shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.attention import decode_attention_launch
from tensorwright.kernels.cuda.decode_wgmma import WgmmaTile, wgmma_linear, wgmma_tile
from tensorwright.kernels.cuda.decoder import HEAD, Decoder, Shapes
from tensorwright.kernels.cuda.elementwise import NATIVE_TYPES
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch, Size, Stretch
from tensorwright.kernels.cuda.linear import Linear, native_weights, small_linear
from tensorwright.kernels.cuda.targets import SHARED_BYTES
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Op, Program, Weight

SMALL, BATCHED = (1, 2, 4), (8, 16, 32, 64)  # sequences, by the linear that runs them
WARPS, X_STAGES, STATIC_SHARED = 8, 3, 6 << 10  # of native/linear_batched.cuh
BLOCK_ROWS, MOST_PROCESSORS = units.UNIT_ROWS * WARPS, 192
BLOCKS_OF_ATTENTION = 1056


@dataclass(frozen=True)
class _Chain:
    """A program at a number of sequences."""

    program: Program
    target: Target
    decoder: Decoder
    tokens: int

    @property
    def shapes(self) -> Shapes:
        """Of the layers."""
        return self.decoder.shapes

    @property
    def number(self) -> str:
        """The C++ type of activations."""
        return NATIVE_TYPES[self.shapes.number]

    @property
    def order(self) -> str:
        """The C++ type of their order."""
        return f"tw::{'CoreOrder' if self.tiles else 'InputOrder'}<{self.tokens}>"

    @cached_property
    def linears(self) -> tuple[Op, ...]:
        """A layer's four, and the lm_head."""
        return tuple(op for op in (*self.decoder.layers[0], self.program.ops[-1]) if op.kind == "linear")

    @cached_property
    def tiles(self) -> dict[Weight, WgmmaTile]:
        """How wgmma_linear takes each weight; none: it does not take all of them."""
        weights = [replace(program_weight(op, self.program), name="", parts=()) for op in self.linears]
        found = {} if self.tokens in SMALL else {
            weight: wgmma_tile(weight, self.tokens, self.target) for weight in weights}
        return {weight: tile for weight, tile in found.items() if tile is not None} if all(found.values()) else {}

    def tile(self, op: Op) -> WgmmaTile | None:
        """How wgmma_linear takes the op's weight."""
        return self.tiles.get(replace(program_weight(op, self.program), name="", parts=()))

    def partial_sums(self, squares: str) -> int:
        """Of squares, that the output projection (`squares_mlp`) or another one leaves: one for a block of rows."""
        tile = self.tile(self.linears[1 if squares == "squares_mlp" else 3])
        rows = units.UNIT_ROWS if self.tokens in SMALL else BLOCK_ROWS if tile is None else tile.rows
        return self.shapes.hidden // rows


def chain_stretches(decoder: Decoder, program: Program, target: Target) -> tuple[Stretch, ...]:
    """One for each number of sequences whose kernels fit the shapes and the target."""
    chains = [_Chain(program, target, decoder, tokens) for tokens in (*SMALL, *BATCHED)]
    sources = {chain.tokens: _source(chain) for chain in chains if _fits(chain)}
    return tuple(Stretch(0, len(program.ops), tokens, 0, source)
                 for tokens, source in sources.items() if source is not None)


def _fits(chain: _Chain) -> bool:
    shapes = [program_weight(op, chain.program).shape for op in chain.linears]
    return (all(rows % BLOCK_ROWS == 0 and inputs % units.UNIT_INPUTS == 0 for rows, inputs in shapes)
            and (chain.tokens in SMALL or all(_steps(shape) >= MOST_PROCESSORS for shape in shapes))
            and min(map(chain.partial_sums, ("squares", "squares_mlp"))) >= WARPS
            and chain.shapes.heads // chain.shapes.kv_heads <= 8)


def _steps(shape: tuple[int, ...]) -> int:
    """Of batched_linear, which are dealt out to its blocks: each must have one, or the last sum is never made."""
    return shape[0] // BLOCK_ROWS * (shape[1] // units.UNIT_INPUTS)


def _source(chain: _Chain) -> GpuSource | None:
    s, tokens, program = chain.shapes, chain.tokens, chain.program
    lm_head = program.ops[-1]
    norms = [*(ops[0].weights["norm"] for ops in chain.decoder.layers), lm_head.weights["norm"]]
    launches: list[Launch | None] = [
        embed_launch(chain.decoder, program, chain.order, tokens, chain.partial_sums("squares"))]
    for ops, next_norm in zip(chain.decoder.layers, norms[1:], strict=True):
        launches += _layer(chain, ops, next_norm)
    logits = ("named." + lm_head.outputs[0], "", "", "sizes.outputs")
    rows = f"tw::Rows<tw::InOrder, {program_weight(lm_head, program).shape[0]}>"
    launches.append(_linear(chain, lm_head, "x", f"tw::EachToken<{rows}>" if chain.tiles else rows, logits, "squares"))
    whole = tuple(launch for launch in launches if launch is not None)
    if len(whole) < len(launches):
        return None
    headers = ("decode_chain.cuh", *(["linear_wgmma.cuh"] if chain.tiles else []))
    return GpuSource(headers, "", whole, scratch=tuple(_scratch(chain).items()),
                     zeros=(("arrivals", 1 << 14), ("attention_arrivals", tokens * s.kv_heads * 4)))


def embed_launch(decoder: Decoder, program: Program, order: str, tokens: int, partial_sums: int) -> Launch:
    """From token ids to the stream, the first layer's input in that order, its sums of squares, and the angles."""
    embedding, first, s = program.ops[0], decoder.layers[0], decoder.shapes
    angles = ("batch.token_ids", "batch.positions", f"named.{embedding.weights['table']}",
              f"named.{first[1].weights['inverse_frequencies']}", "scratch.rotation")
    return Launch(f"tw::embed<{NATIVE_TYPES[s.number]}, {order}, {tokens}, {s.hidden}, {partial_sums}>",
                  (Size(times=tokens), Size(), Size()), arguments=(angles, _residual(first[0].weights["norm"], "")))


def _layer(chain: _Chain, ops: tuple[Op, ...], next_norm: str) -> list[Launch | None]:
    s, number, tokens = chain.shapes, chain.number, chain.tokens
    qkv, rope, attention, dense, fc_gate, proj = ops
    cache = f"named.{rope.outputs[1]}"
    added = f"tw::Residual<{number}, {tokens}, {s.hidden}>"
    stored = NATIVE_TYPES[s.cache]
    turned = f"tw::RopeAndCache<{number}, {stored}, {tokens}, {s.heads}, {s.kv_heads}, {s.block_size}>"
    gated = f"tw::Gated<{number}, {tokens}>"
    if chain.tiles:
        added, gated = added.replace("Residual", "ResidualBlock"), gated.replace("Gated", "GatedBlock")
        turned = f"tw::RopeAndCacheBlock<{number}, {stored}, {s.heads}, {s.kv_heads}, {s.block_size}>"
    return [
        _linear(chain, qkv, "x", turned, ("scratch.q", cache, "batch.slots", "scratch.rotation"), "squares"),
        _attention(chain, attention, cache),
        _linear(chain, dense, "attended", added, _residual(fc_gate.weights["norm"], "_mlp"), ""),
        _linear(chain, fc_gate, "x_mlp", gated, ("scratch.gated",), "squares_mlp"),
        _linear(chain, proj, "gated", added, _residual(next_norm, ""), "")]


def _attention(chain: _Chain, op: Op, cache: str) -> Launch:
    arguments = ("scratch.q", cache, "batch.block_tables", "batch.kv_lengths", "scratch.attended",
                 "scratch.attention_parts", "zeros.attention_arrivals", "sizes.table_width")
    return decode_attention_launch(op, chain.program, chain.target, chain.tokens, chain.order, _chunks(chain),
                                   arguments, chain.shapes.number)


def _linear(chain: _Chain, op: Op, x: str, output_type: str, output: tuple[Argument, ...],
            squares: str) -> Launch | None:
    """`squares`: the sums that norm the input; "": it is not normed. None: it does not fit into shared memory."""
    weight = program_weight(op, chain.program)
    shape, given = units.Shape(weight), linear_input(op, chain.program, x, squares)
    sums = chain.partial_sums(squares) if squares else 0
    if (tile := chain.tile(op)) is not None:
        return wgmma_linear(tile, sums, output_type, (given, output, ("scratch.parts", "zeros.arrivals")))
    if chain.tokens in SMALL:
        tactics = Linear().tactics(op, chain.program, chain.target)
        tactic = next((t for t in tactics if t.parameters.get("tokens") == chain.tokens), None)
        return None if tactic is None else small_linear(op, chain.program, tactic, given, output, sums, output_type)
    is_light = chain.tokens <= 16 and weight.is_quantized
    per_processor = 2 if is_light and _steps(weight.shape) >= 2 * MOST_PROCESSORS else 1
    stages = _stages(shape, chain, per_processor)
    if stages is None:
        per_processor, stages = 1, _stages(shape, chain, 1)
    if stages is None:
        return None
    function = (f"tw::batched_linear<{native_weights(weight)}, {weight.shape[0]}, {weight.shape[1]}, {chain.tokens}, "
                f"1, {stages}, {X_STAGES}, {sums}, {per_processor}, {output_type}>")
    return Launch(function, (Size("processors", times=per_processor), Size(), Size()), 32 * (WARPS + 1),
                  _shared_bytes(shape, chain.tokens, stages), (given, output, ("scratch.parts", "zeros.arrivals")))


def linear_input(op: Op, program: Program, x: str, squares: str) -> tuple[Argument, ...]:
    """tw::LinearInput, over scratch memory of these names."""
    weight = program_weight(op, program)
    shape, name = units.Shape(weight), f"named.{weight.name}"
    epsilon = float(op.attributes["norm_epsilon"]) if squares else 0.0
    scales = f"{name}+{shape.bytes}" if shape.has_row_scales else ""
    return name, f"scratch.{x}", f"scratch.{squares}" if squares else "", scales, epsilon


def _stages(shape: units.Shape, chain: _Chain, per_processor: int) -> int | None:
    """Of each warp's ring: six, or as many as fit."""
    room = SHARED_BYTES[chain.target.name] // per_processor - STATIC_SHARED
    return next((stages for stages in (6, 5, 4, 3, 2) if _shared_bytes(shape, chain.tokens, stages) <= room), None)


def _shared_bytes(shape: units.Shape, tokens: int, stages: int) -> int:
    """BatchedShape::SHARED_BYTES of native/linear_batched.cuh."""
    return WARPS * stages * shape.unit_bytes + X_STAGES * units.UNIT_INPUTS * tokens * 2


def _chunks(chain: _Chain) -> int:
    """Pieces that long sequences are cut into, so that there are enough blocks."""
    return max(2, BLOCKS_OF_ATTENTION // (chain.shapes.kv_heads * chain.tokens))


def _residual(norm: str, which: str) -> tuple[Argument, ...]:
    """tw::Residual: the stream, and what the next linear reads."""
    return ("scratch.stream", f"scratch.x{which}", f"named.{norm}", f"scratch.squares{which}")


def _scratch(chain: _Chain) -> dict[str, Size]:
    s, tokens, group = chain.shapes, chain.tokens, chain.shapes.heads // chain.shapes.kv_heads
    sums = tokens * s.hidden // units.UNIT_ROWS * 4
    parts = 2 * 2 * WARPS * (tokens // 8) * 32 * 16  # for each processor: two of each block, of which it has up to two
    parts = max((tile.part_bytes for tile in chain.tiles.values()), default=parts)
    sizes = {"stream": tokens * s.hidden * 4, "x": tokens * s.hidden * 2, "x_mlp": tokens * s.hidden * 2,
             "squares": sums, "squares_mlp": sums, "q": tokens * s.heads * HEAD * 2,
             "attended": tokens * s.heads * HEAD * 2, "gated": tokens * s.ffn * 2, "rotation": tokens * (HEAD // 2) * 8,
             "attention_parts": tokens * s.kv_heads * _chunks(chain) * group * (HEAD + 2) * 4}
    return {"parts": Size("processors", times=max(parts, 16)),
            **{name: Size(times=size) for name, size in sizes.items()}}


def program_weight(op: Op, program: Program) -> Weight:
    """A linear's weight."""
    return program.weights[op.weights["weight"]]
