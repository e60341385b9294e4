"""Rotary embedding with the cache write, and attention over the cache (native/rope.cuh, native/attention.cuh)."""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import PlainKernel, attribute, cache_of, supports_cache
from tensorwright.kernels.cuda.elementwise import NATIVE_TYPES
from tensorwright.kernels.cuda.launch import Launch, Size, gpu_source
from tensorwright.kernels.interface import Cost, Source, Tactic, Target
from tensorwright.program.program import Op, Program

ROWS = 64  # of native/attention.cuh: pairs of a token and a query head
LARGEST_HEAD = 256


def _supports(op: Op, program: Program) -> bool:
    """16-bit, int8 and float8 caches; query heads must divide by kv heads."""
    return (supports_cache(op, program, NATIVE_TYPES)
            and op.attributes["num_heads"] % op.attributes["num_kv_heads"] == 0)


def _item_bytes(op: Op, program: Program) -> int:
    """Of a number in the cache."""
    return 1 if cache_of(op, program).dtype in ("int8", "float8_e4m3") else 2


class RopeCache(PlainKernel):
    """Splits qkv, norms and turns heads, writes the cache, gives q: one pass over qkv. Angles in double."""

    name = "rope_cache"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Any head size up to 256."""
        return (super().supports(op, program, target) and _supports(op, program)
                and op.attributes["head_size"] <= LARGEST_HEAD)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::rope_cache<number, heads, kv_heads, head_size, block_size, pairs>."""
        a, cache = op.attributes, cache_of(op, program)
        pairs = program.weights[op.weights["inverse_frequencies"]].shape[0]
        shape = (NATIVE_TYPES[cache.dtype], a["num_heads"], a["num_kv_heads"], a["head_size"], cache.shape[3], pairs)
        scales = "inputs.kv_scales" if cache.dtype == "int8" else ""
        arguments = ("inputs.qkv", "inputs.positions", "inputs.slots", "outputs.q", "inputs.kv", scales,
                     "weights.inverse_frequencies", "weights.q_norm", "weights.k_norm",
                     float(attribute(op, "attention_factor")), float(attribute(op, "norm_epsilon")))
        return gpu_source(("rope.cuh",), Launch(f"tw::rope_cache<{', '.join(map(str, shape))}>",
                                                (Size("rows"), Size(), Size()), 256, 0, (arguments,)))

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Reads qkv, writes q and the cache."""
        a, number = op.attributes, _item_bytes(op, program)
        heads, kv_heads, size = a["num_heads"], a["num_kv_heads"], a["head_size"]
        return Cost(float(num_tokens * size * (8 * heads + 8 * kv_heads + 2 * kv_heads * number)),
                    6.0 * num_tokens * (heads + kv_heads) * size)


class Attention(PlainKernel):
    """Causal softmax(scale · q·k)·v over caches of 16 and 8 bits: products of 16-bit numbers, sums in float32."""

    name = "attention"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Head sizes that are multiples of 16, up to 256."""
        size = op.attributes["head_size"] if op.kind == self.name else 0
        return (super().supports(op, program, target) and _supports(op, program) and size % 16 == 0
                and 0 < size <= LARGEST_HEAD)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::attention<type, number, heads, kv_heads, head_size, block_size, window>."""
        a, cache = op.attributes, cache_of(op, program)
        stored = NATIVE_TYPES[cache.dtype]
        shape = ("tw::half" if _item_bytes(op, program) == 1 else stored, stored, a["num_heads"], a["num_kv_heads"],
                 a["head_size"], cache.shape[3], attribute(op, "window"))
        group = a["num_heads"] // a["num_kv_heads"]
        blocks = Size("max_query_length", per=max(1, ROWS // group), times=-(-group // ROWS))
        grid = (blocks, Size(times=a["num_kv_heads"]), Size("sequences"))
        scales = "inputs.kv_scales" if cache.dtype == "int8" else ""
        arguments = ("inputs.q", "inputs.kv", scales, "inputs.query_starts", "inputs.query_lengths",
                     "inputs.kv_lengths", "inputs.block_tables", "outputs.y", "sizes.table_width", float(a["scale"]))
        return gpu_source(("attention.cuh",),
                          Launch(f"tw::attention<{', '.join(map(str, shape))}>", grid, 128, 0, (arguments,)))

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Keys and values of `kv_tokens` positions once; q and y; four operations per position, head and number."""
        a, number = op.attributes, _item_bytes(op, program)
        width, scale = a["num_heads"] * a["head_size"], 4 if cache_of(op, program).dtype == "int8" else 0
        cached = 2 * kv_tokens * a["num_kv_heads"] * (a["head_size"] * number + scale)
        return Cost(float(cached + 8 * num_tokens * width), 4.0 * kv_tokens * width)
