"""Rotary embedding and the cache write, alone and fused (native/rope.h)."""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import (
    NATIVE_TYPES,
    PlainKernel,
    attribute,
    cache_of,
    columns,
    float_bits,
    supports_cache,
)
from tensorwright.kernels.interface import Cost, Source, Tactic, Target
from tensorwright.program.program import Op, Program

HEADER = ("rope.h",)
CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class Rope(PlainKernel):
    """Turns each head of x. Angles in double; sine and cosine once per token and worker."""

    name = "rope"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::rope<heads, head_size, pairs, factor>."""
        size = op.attributes["head_size"]
        heads = columns(program.buffers[op.inputs[0]]) // size
        return Source(HEADER, f"tw::rope<{heads}, {size}, {_pairs(op, program)}, {_factor(op)}>::run")


class CacheWrite(PlainKernel):
    """Keys and values into their slots; slots below 0 are skipped."""

    name = "cache_write"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Caches of float32, float16, bfloat16, and int8 with scales."""
        return super().supports(op, program, target) and supports_cache(op, program)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::cache_write<number, kv_heads, head_size, block_size>."""
        return Source(HEADER, f"tw::cache_write<{_cache(op, program)}>::run")

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Reads k and v, writes the cache."""
        return _write_cost(op, program, num_tokens, 0)


class RopeCache(PlainKernel):
    """Splits qkv, norms and turns heads, writes the cache, gives q: one pass over qkv."""

    name = "rope_cache"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """As CacheWrite; query heads must divide by kv heads."""
        return (super().supports(op, program, target) and supports_cache(op, program)
                and op.attributes["num_heads"] % op.attributes["num_kv_heads"] == 0)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::rope_cache<number, heads, kv_heads, head_size, block_size, pairs, factor, epsilon>."""
        number, *sizes = _cache(op, program).split(", ")
        arguments = (number, str(op.attributes["num_heads"]), *sizes, str(_pairs(op, program)), _factor(op),
                     float_bits(attribute(op, "norm_epsilon")))
        return Source(HEADER, f"tw::rope_cache<{', '.join(arguments)}>::run")

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Reads qkv, writes q and the cache."""
        return _write_cost(op, program, num_tokens, op.attributes["num_heads"])


def _pairs(op: Op, program: Program) -> int:
    return program.weights[op.weights["inverse_frequencies"]].shape[0]


def _factor(op: Op) -> str:
    return float_bits(attribute(op, "attention_factor"))


def _cache(op: Op, program: Program) -> str:
    cache = cache_of(op, program)
    kv_heads, size = op.attributes["num_kv_heads"], op.attributes["head_size"]
    return f"{NATIVE_TYPES[cache.dtype]}, {kv_heads}, {size}, {cache.shape[3]}"


def _write_cost(op: Op, program: Program, num_tokens: int, num_heads: int) -> Cost:
    size, kv_heads = op.attributes["head_size"], op.attributes["num_kv_heads"]
    written = 2 * kv_heads * size * CACHE_BYTES[cache_of(op, program).dtype]
    return Cost(float(num_tokens * (8 * kv_heads * size + written + 8 * num_heads * size)),
                6.0 * num_tokens * (num_heads + kv_heads) * size)
