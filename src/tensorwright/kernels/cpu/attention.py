"""Attention over KV blocks (native/attention.h): decode reads the cache once, prefill works in tiles."""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import NATIVE_TYPES, PlainKernel, attribute, cache_of, float_bits, supports_cache
from tensorwright.kernels.cpu.rope import CACHE_BYTES
from tensorwright.kernels.interface import Cost, Source, Tactic, Target
from tensorwright.program.program import Op, Program

# Of native/attention.h.
MAX_SPLITS, SPLIT_SEQUENCES, MAX_LANES, PARTIAL_EXTRA = 8, 64, 16, 16


class Attention(PlainKernel):
    """Causal softmax(scale · q·k)·v over caches of any supported dtype.

    In float32; with activation_bits 16, on CPUs with VNNI and for caches below float32, the products of 12 rows and
    more (prefill), and those of few rows with int8 keys, take 16-bit fixed-point operands (native/attention_pairs.h).

    The bits of a sequence's result depend on the sequence, its chunk, and whether the step has more than 64 sequences;
    not on the number of workers.
    """

    name = "attention"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Any head size; query heads must divide by kv heads."""
        return (super().supports(op, program, target) and supports_cache(op, program)
                and op.attributes["num_heads"] % op.attributes["num_kv_heads"] == 0)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::attention<number, heads, kv_heads, head_size, block_size, window, scale, bits>."""
        a, cache = op.attributes, cache_of(op, program)
        arguments = (NATIVE_TYPES[cache.dtype], a["num_heads"], a["num_kv_heads"], a["head_size"], cache.shape[3],
                     attribute(op, "window"), float_bits(a["scale"]), attribute(op, "activation_bits"))
        return Source(("attention.h",), f"tw::attention<{', '.join(map(str, arguments))}>::run")

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """Partial results of the ranges that long decode sequences are cut into."""
        heads, size = int(op.attributes["num_heads"]), int(op.attributes["head_size"])
        row = -(-size // MAX_LANES) * MAX_LANES + PARTIAL_EXTRA
        return 4 * min(num_tokens, SPLIT_SEQUENCES) * heads * MAX_SPLITS * row

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Keys and values of `kv_tokens` positions once; q and y; four operations per position, head and number."""
        a = op.attributes
        number = CACHE_BYTES[cache_of(op, program).dtype]
        width = a["num_heads"] * a["head_size"]
        cached = 2 * kv_tokens * a["num_kv_heads"] * (a["head_size"] * number + (4 if number == 1 else 0))
        return Cost(float(cached + 8 * num_tokens * width), 4.0 * kv_tokens * width)
