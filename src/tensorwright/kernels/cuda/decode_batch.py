"""A decode step of 8 to 64 sequences on sm_90: embedding, all layers in one kernel (native/decode_batch.cuh), lm_head.

It is a stretch. What the kernel leaves for the lm_head, and how that multiplies, is as in the chain of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorwright.kernels.cuda.attention import LOG2E
from tensorwright.kernels.cuda.decode import MAX_LAYERS, layer_pointers
from tensorwright.kernels.cuda.decode_chain import BATCHED, embed_launch, linear_input, program_weight
from tensorwright.kernels.cuda.decode_wgmma import TARGET, WgmmaTile, wgmma_linear, wgmma_tile
from tensorwright.kernels.cuda.decoder import HEAD, Decoder, Shapes
from tensorwright.kernels.cuda.launch import GpuSource, Launch, Size, Stretch
from tensorwright.kernels.cuda.linear import native_weights
from tensorwright.kernels.cuda.targets import PROCESSORS, SHARED_BYTES
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Program

ROW_TILES = (2, 1)  # of a warp; two warpgroups multiply. Taller blocks read the tokens less often.
WARPGROUPS, WARPS, STEP_UNITS, MIN_STAGES, MOST_STAGES = 2, 8, 1, 3, 9
MOST_PARTS = 12  # of a row block, which a warp holds at once


@dataclass(frozen=True)
class _Batch:
    """The kernel for a number of sequences, on a GPU of so many processors."""

    shapes: Shapes
    tokens: int
    processors: int
    row_tiles: int

    @property
    def linears(self) -> tuple[WgmmaTile, ...]:
        """How blocks cut qkv, output projection, gate and up, down."""
        s = self.shapes
        sizes = (((s.heads + 2 * s.kv_heads) * HEAD, s.hidden), (s.hidden, s.heads * HEAD), (2 * s.ffn, s.hidden),
                 (s.hidden, s.ffn))
        return tuple(WgmmaTile(replace(s.weight, shape=size), self.tokens, WARPGROUPS, self.row_tiles, STEP_UNITS)
                     for size in sizes)

    @property
    def team(self) -> int:
        """Warps that attend together."""
        return WARPS if self.tokens * self.shapes.kv_heads <= self.processors else 4

    @property
    def static_bytes(self) -> int:
        """At most what the kernel declares: of attention, sums of squares, and the rest."""
        group = self.shapes.heads // self.shapes.kv_heads
        rows = max(tile.weight.shape[0] for tile in (self.linears[0], self.linears[1]))
        squares = -(-rows // 16 // self.processors) * self.tokens * 4
        return WARPS * group * (HEAD * 4 + 8) + WARPS // self.team * (group * HEAD * 2 + 32) + squares + 2048

    @property
    def stages(self) -> int:
        """As many as fit."""
        return min(MOST_STAGES, (SHARED_BYTES[TARGET] - self.static_bytes) // self.linears[0].stage_bytes)

    @property
    def slots(self) -> int:
        """Batch::SLOTS: row blocks that a block has a part of."""
        qkv, dense, _, proj = self.linears
        return max(-(-tile.steps // self.processors) // tile.block_steps + 2 for tile in (qkv, dense, proj))

    @property
    def fits(self) -> bool:
        """Whether whole steps cover all weights and every block has some."""
        s, (qkv, dense, _, proj) = self.shapes, self.linears
        parts = [-(-tile.block_steps * self.processors // tile.steps) + 1 for tile in (qkv, dense, proj) if tile.steps]
        return (all(tile.is_whole and tile.steps >= self.processors for tile in self.linears)
                and max(parts) <= MOST_PARTS and self.stages >= MIN_STAGES and s.heads // s.kv_heads <= 8)

    @property
    def function(self) -> str:
        """The kernel's name."""
        s = self.shapes
        shape = (native_weights(s.weight), self.tokens, s.hidden, s.heads, s.kv_heads, s.ffn, s.block_size, WARPGROUPS,
                 self.row_tiles, STEP_UNITS, self.stages, self.processors)
        return f"tw::decode_batch<{', '.join(map(str, shape))}>"


def batch_stretches(decoder: Decoder, program: Program, target: Target) -> tuple[Stretch, ...]:
    """One for each number of sequences that the kernel and the target are made for."""
    if target.name != TARGET or len(decoder.layers) > MAX_LAYERS or decoder.shapes.cache != decoder.shapes.number:
        return ()
    sources = {tokens: batch_source(decoder, program, target, tokens, PROCESSORS[TARGET]) for tokens in BATCHED}
    return tuple(Stretch(0, len(program.ops), tokens, PROCESSORS[TARGET], source, decoder.window)
                 for tokens, source in sources.items() if source is not None)


def batch_source(decoder: Decoder, program: Program, target: Target, tokens: int, processors: int) -> GpuSource | None:
    """The launches on a GPU of so many processors; None: the shapes do not fit."""
    candidates = (_Batch(decoder.shapes, tokens, processors, tiles) for tiles in ROW_TILES)
    batch = next((batch for batch in candidates if batch.fits), None)
    lm_head = wgmma_tile(program_weight(program.ops[-1], program), tokens, target, processors)
    if batch is None or lm_head is None:
        return None
    launches = (embed_launch(decoder, program, f"tw::CoreOrder<{tokens}>", tokens, processors),
                _layers(batch, decoder, program), _lm_head(lm_head, program, processors),
                Launch("tw::count_step", threads=1, arguments=("zeros.step",)))
    s, part = decoder.shapes, batch.linears[0].rows * tokens * 4
    chunks = tokens + -(-processors * (WARPS // batch.team) // s.kv_heads)
    sums = processors * tokens * 4
    scratch = {"stream": tokens * s.hidden * 4, "x": tokens * s.hidden * 2, "x_mlp": tokens * s.hidden * 2,
               "q": tokens * s.heads * HEAD * 2, "attended": tokens * s.heads * HEAD * 2, "gated": tokens * s.ffn * 2,
               "squares": sums, "squares_mlp": sums, "rotation": tokens * (HEAD // 2) * 8,
               "attention_parts": chunks * s.heads * (HEAD + 2) * 4}
    return GpuSource(
        ("decode_chain.cuh", "decode_batch.cuh"), "", launches,
        scratch=(("head_parts", Size("processors", times=lm_head.part_bytes)),
                 *((name, Size(times=size)) for name, size in scratch.items())),
        zeros=(("step", 256), ("done", len(decoder.layers) * 5 * 4), ("parts", processors * batch.slots * part),
               ("attention_arrivals", tokens * s.kv_heads * 4), ("head_arrivals", 1 << 14)),
        tables=(("layers", tuple(pointer for ops in decoder.layers for pointer in layer_pointers(ops))),))


def _layers(batch: _Batch, decoder: Decoder, program: Program) -> Launch:
    first = decoder.layers[0]
    arguments = (
        "tables.layers", f"named.{program.ops[-1].weights['norm']}", "batch.slots", "batch.kv_lengths",
        "batch.block_tables", "scratch.rotation", "zeros.step", "zeros.done", "zeros.parts", "scratch.stream",
        "scratch.x", "scratch.q", "scratch.attended", "scratch.x_mlp", "scratch.gated", "scratch.squares",
        "scratch.squares_mlp", "scratch.attention_parts", "zeros.attention_arrivals", len(decoder.layers),
        "sizes.table_width", float(first[0].attributes["norm_epsilon"]), float(first[2].attributes["scale"] * LOG2E))
    return Launch(batch.function, (Size(times=batch.processors), Size(), Size()), 128 * (WARPGROUPS + 1),
                  batch.stages * batch.linears[0].stage_bytes, (arguments,))


def _lm_head(tile: WgmmaTile, program: Program, partial_sums: int) -> Launch:
    op = program.ops[-1]
    return wgmma_linear(tile, partial_sums, f"tw::EachToken<tw::Rows<tw::InOrder, {tile.weight.shape[0]}>>",
                        (linear_input(op, program, "x", "squares"), (f"named.{op.outputs[0]}", "", "", "sizes.outputs"),
                         ("scratch.head_parts", "zeros.head_arrivals")))
