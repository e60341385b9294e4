"""One decoder for all Llama-like families: from a `ModelConfig` to a program of plain, unfused ops.

It knows the architecture and upstream's tensor names. It knows no quantisation, no ranks, no fusion and no machine:
passes bring those in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tensorwright.models.config import ModelConfig
from tensorwright.models.rope import attention_factor, inverse_frequencies
from tensorwright.program.program import Buffer, Dim, Op, Part, Program, Weight


@dataclass
class _Writer:
    """Collects ops; every method adds one and gives the name of its output."""

    config: ModelConfig
    buffers: dict[str, Buffer] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def weight(self, name: str, shape: tuple[int, ...], dtype: str, part: Part | None = None) -> str:
        if name not in self.weights:
            self.weights[name] = Weight(name, shape, dtype, parts=(part or Part(name, 0, shape[0]),))
        return name

    def op(self, name: str, kind: str, inputs: tuple[str, ...], columns: int, weights: dict[str, str] | None = None,
           rows: Dim = "tokens", **attributes: Any) -> str:
        output = f"{name}.y"
        self.buffers[output] = Buffer(output, (rows, columns), "float32")
        self.ops.append(Op(name, kind, inputs, (output,), weights or {}, attributes))
        return output

    def linear(self, name: str, x: str, shape: tuple[int, int], tensor: str, *, start: int = 0, bias: bool = False,
               rows: Dim = "tokens") -> str:
        part = Part(tensor, start, shape[0])
        weights = {"weight": self.weight(f"{name}.weight", shape, self.config.dtype, part)}
        if bias:
            bias_part = Part(f"{tensor}.bias", start, shape[0])
            weights["bias"] = self.weight(f"{name}.bias", (shape[0],), "float32", bias_part)
        return self.op(name, "linear", (x,), shape[0], weights, rows, activation_group=0, float8_rows=0, weight_bits=0,
                       norm_epsilon=0.0, gate="")

    def norm(self, name: str, x: str, tensor: str, columns: int, head_size: int = 0) -> str:
        weight = self.weight(tensor, (head_size or columns,), "float32")
        return self.op(name, "rms_norm", (x,), columns, {"weight": weight}, epsilon=self.config.norm_epsilon,
                       head_size=head_size)


def build_program(config: ModelConfig, *, kv_dtype: str, tokens_per_block: int) -> Program:
    """The whole model as one program. kv_dtype: of the cache (`verify.py`); blocks hold that many tokens."""
    writer = _Writer(config)
    _add_inputs(writer)
    frequencies = inverse_frequencies(config.rope, config.head_size)
    writer.weights["rope.inverse_frequencies"] = Weight("rope.inverse_frequencies", (len(frequencies),), "float32",
                                                        values=frequencies)
    table = writer.weight("transformer.vocab_embedding", (config.vocab_size, config.hidden_size), config.dtype)
    x = writer.op("embedding", "embedding", ("token_ids",), config.hidden_size, {"table": table})
    for layer in range(config.num_layers):
        x = _add_attention(writer, layer, x, kv_dtype, tokens_per_block)
        x = _add_mlp(writer, layer, x)
    x = writer.op("output_rows", "gather_rows", (x, "output_rows"), config.hidden_size, rows="outputs")
    weight = writer.weight("transformer.ln_f", (config.hidden_size,), "float32")
    x = writer.op("ln_f", "rms_norm", (x,), config.hidden_size, {"weight": weight}, "outputs",
                  epsilon=config.norm_epsilon, head_size=0)
    tensor = "transformer.vocab_embedding" if config.tied_embeddings else "lm_head"
    logits = writer.linear("lm_head", x, (config.vocab_size, config.hidden_size), tensor, rows="outputs")
    writer.buffers[logits] = Buffer(logits, ("outputs", config.vocab_size), "float32", "output")
    return Program(writer.buffers, writer.weights, tuple(writer.ops))


def _add_inputs(writer: _Writer) -> None:
    for name in ("token_ids", "positions", "slots"):
        writer.buffers[name] = Buffer(name, ("tokens",), "int32", "input")
    for name in ("query_starts", "query_lengths", "kv_lengths"):
        writer.buffers[name] = Buffer(name, ("sequences",), "int32", "input")
    writer.buffers["block_tables"] = Buffer("block_tables", ("sequences", "block_table"), "int32", "input")
    writer.buffers["output_rows"] = Buffer("output_rows", ("outputs",), "int32", "input")


def _add_caches(writer: _Writer, layer: int, dtype: str, tokens_per_block: int) -> tuple[str, ...]:
    config = writer.config
    shape: tuple[Dim, ...] = ("blocks", 2, config.num_kv_heads, tokens_per_block)
    kv, scales = f"layers.{layer}.kv", f"layers.{layer}.kv_scales"
    writer.buffers[kv] = Buffer(kv, (*shape, config.head_size), dtype, "cache")
    if dtype != "int8":
        return (kv,)
    writer.buffers[scales] = Buffer(scales, shape, "float32", "cache")
    return (kv, scales)


def _add_attention(writer: _Writer, layer: int, x: str, kv_dtype: str, tokens_per_block: int) -> str:
    """The residual stream after attention: x + dense(attention(rope(norm(q)), rope(norm(k)), v)) of layer norm x."""
    c = writer.config
    name, tensor = f"layers.{layer}.attention", f"transformer.layers.{layer}.attention"
    q_size, kv_size = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    h = writer.norm(f"layers.{layer}.input_layernorm", x, f"transformer.layers.{layer}.input_layernorm", c.hidden_size)
    parts: dict[str, str] = {}
    start = 0
    for role, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        parts[role] = writer.linear(f"{name}.{role}", h, (size, c.hidden_size), f"{tensor}.qkv", start=start,
                                    bias=c.qkv_bias)
        start += size
    for role, size in (("q", q_size), ("k", kv_size)):
        if c.qk_norm:
            parts[role] = writer.norm(f"{name}.{role}_norm", parts[role], f"{tensor}.{role}_layernorm", size,
                                      c.head_size)
        parts[role] = writer.op(f"{name}.{role}_rope", "rope", (parts[role], "positions"), size,
                                {"inverse_frequencies": "rope.inverse_frequencies"}, head_size=c.head_size,
                                attention_factor=attention_factor(c.rope))
    caches = _add_caches(writer, layer, kv_dtype, tokens_per_block)
    writer.ops.append(Op(f"{name}.cache_write", "cache_write", (parts["k"], parts["v"], "slots", *caches), caches,
                         {}, {"num_kv_heads": c.num_kv_heads, "head_size": c.head_size}))
    y = writer.op(f"{name}.attention", "attention", (parts["q"], "query_starts", "query_lengths", "kv_lengths",
                                                     "block_tables", *caches), q_size,
                  num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_size=c.head_size,
                  scale=1 / math.sqrt(c.head_size), window=c.window(layer), activation_bits=0)
    y = writer.linear(f"{name}.dense", y, (c.hidden_size, q_size), f"{tensor}.dense", bias=c.dense_bias)
    return writer.op(f"{name}.residual", "add", (x, y), c.hidden_size)


def _add_mlp(writer: _Writer, layer: int, x: str) -> str:
    """The residual stream after the MLP: x + proj(f(fc(h)) · gate(h)), h = norm x.

    Names are upstream's: fc is the activated half, gate the linear one.
    """
    c = writer.config
    name, tensor = f"layers.{layer}.mlp", f"transformer.layers.{layer}.mlp"
    wide = (c.intermediate_size, c.hidden_size)
    h = writer.norm(f"layers.{layer}.post_layernorm", x, f"transformer.layers.{layer}.post_layernorm", c.hidden_size)
    fc = writer.linear(f"{name}.fc", h, wide, f"{tensor}.fc", bias=c.mlp_bias)
    gate = writer.linear(f"{name}.gate", h, wide, f"{tensor}.gate", bias=c.mlp_bias)
    fc = writer.op(f"{name}.activation", "activation", (fc,), c.intermediate_size, function=c.activation)
    y = writer.op(f"{name}.product", "multiply", (fc, gate), c.intermediate_size)
    y = writer.linear(f"{name}.proj", y, (c.hidden_size, c.intermediate_size), f"{tensor}.proj", bias=c.mlp_bias)
    return writer.op(f"{name}.residual", "add", (x, y), c.hidden_size)
