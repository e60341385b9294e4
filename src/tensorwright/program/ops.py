"""The ops: what each kind reads, writes, weighs and computes. This table is the specification.

Shapes: T tokens of the step on one flat axis, S sequences, R rows that get logits, H hidden size. Activations are
float32 on the CPU target. `verify` checks programs against the table; `reference` computes it in NumPy.

Batch inputs, the same buffers in every program: token_ids, positions and slots [T]; query_starts, query_lengths and
kv_lengths [S]; block_tables [S, width]; output_rows [R]; all int32. Sequence s owns the tokens
query_starts[s] .. + query_lengths[s] − 1, and these are its last query_lengths[s] positions of kv_lengths[s].
The slot of a token is block · block_size + offset, in every layer's cache.

Caches, per layer: `layers.N.kv` [blocks, 2, kv_heads, block_size, head_size] (keys, then values), and for int8
`layers.N.kv_scales` [blocks, 2, kv_heads, block_size] float32: one scale per token and head, max|x| / 127. A cache of
float8_e4m3 holds the numbers themselves, cut off at ±448.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpSpec:
    """Names of an op's operands in order. A name with a trailing ? may be absent; optional ones come last."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    meaning: str = ""


BATCH_INPUTS = ("token_ids", "positions", "slots", "query_starts", "query_lengths", "kv_lengths",
                "block_tables", "output_rows")

OPS: dict[str, OpSpec] = {
    "embedding": OpSpec(("token_ids",), ("y",), ("table",), (),
                        "y[t] = table[token_ids[t]]; table [V, H]"),
    "rms_norm": OpSpec(("x",), ("y",), ("weight",), ("epsilon", "head_size"),
                       "y = x / sqrt(mean(x²) + epsilon) · weight, over the row, or over each head of head_size > 0"),
    "linear": OpSpec(("x", "residual?"), ("y",), ("weight", "bias?", "norm?"),
                     ("activation_group", "float8_rows", "weight_bits", "norm_epsilon", "gate"),
                     "x' = rms_norm(x) if norm; x' = f(x[:, :K]) · x[:, K:] if gate names f; "
                     "activation_group g > 0: x' is rounded to int8 per token and g inputs (scale max|x'| / 127); "
                     "float8_rows n > 0: where there are n rows or more, x' is rounded to float8_e4m3 per row (scale "
                     "max|x'| / 448), and the weight to weight_bits > 0 significant bits; "
                     "y = x' · weightᵀ + bias + residual; weight [N, K]"),
    "rope": OpSpec(("x", "positions"), ("y",), ("inverse_frequencies",), ("head_size", "attention_factor"),
                   "each head: the first 2F numbers turned in pairs (i, i + F) by positions · inverse_frequencies[i]; "
                   "cos and sin are multiplied by attention_factor; F = len(inverse_frequencies)"),
    "cache_write": OpSpec(("k", "v", "slots", "kv", "kv_scales?"), ("kv", "kv_scales?"), (),
                          ("num_kv_heads", "head_size"), "keys and values into their slots; a slot < 0 is skipped"),
    "attention": OpSpec(("q", "query_starts", "query_lengths", "kv_lengths", "block_tables", "kv", "kv_scales?"),
                        ("y",), (), ("num_heads", "num_kv_heads", "head_size", "scale", "window", "activation_bits"),
                        "causal softmax(scale · q·k)·v over the sequence's blocks; head h reads kv head "
                        "h // (num_heads / num_kv_heads); window w > 0: the last w positions only, itself included; "
                        "activation_bits 16: products may take 16-bit fixed-point operands"),
    "activation": OpSpec(("x",), ("y",), (), ("function",), "silu, gelu (erf) or gelu_tanh"),
    "multiply": OpSpec(("a", "b"), ("y",), (), (), "a · b"),
    "add": OpSpec(("a", "b"), ("y",), (), (), "a + b"),
    "slice": OpSpec(("x",), ("y",), (), ("start", "size"), "columns start .. start + size of x"),
    "gather_rows": OpSpec(("x", "output_rows"), ("y",), (), (), "y[r] = x[output_rows[r]]"),
    "all_reduce": OpSpec(("x",), ("y",), (), (), "sum over ranks, added in rank order: the same bits on every rank"),
    "all_gather": OpSpec(("x",), ("y",), (), (), "columns of all ranks side by side"),
    "rope_cache": OpSpec(("qkv", "positions", "slots", "kv", "kv_scales?"), ("q", "kv", "kv_scales?"),
                         ("inverse_frequencies", "q_norm?", "k_norm?"),
                         ("num_heads", "num_kv_heads", "head_size", "attention_factor", "norm_epsilon"),
                         "split qkv; norm each head of q and k if given; rope both; cache_write k and v; give q"),
}

ATTRIBUTE_DEFAULTS: dict[str, object] = {
    "activation_group": 0, "float8_rows": 0, "weight_bits": 0, "norm_epsilon": 0.0, "gate": "", "head_size": 0,
    "attention_factor": 1.0, "window": 0, "activation_bits": 0}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
