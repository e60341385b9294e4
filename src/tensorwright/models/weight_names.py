"""Every weight of a decoder: upstream's name, the Hugging Face tensors it is made of, their shapes, how ranks cut it.

It knows names and shapes only, no files and no numbers. Upstream's trap: `fc` is the activated half (gate_proj), and
`gate` the linear half (up_proj).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tensorwright.models.config import ModelConfig

Cut = Literal["none", "rows", "columns", "vocabulary"]
"""rows: each source's rows over the ranks (heads stay whole); columns: the inputs; vocabulary: rows, padded."""

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
"""Buffers of old uploads that are computed, not learnt."""


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor and its expected shape."""

    name: str
    shape: tuple[int, ...]
    is_kv: bool = False  # its heads are repeated when there are fewer of them than ranks


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of the checkpoint: rows of `sources` joined in order. `kind` groups them in reports."""

    name: str
    sources: tuple[Source, ...]
    cut: Cut
    kind: str
    quantizable: bool = False
    layer: int | None = None


@dataclass(frozen=True)
class _Linear:
    """A matrix of every layer: upstream's name, sources with their rows, columns, cut, and ModelConfig's bias field."""

    name: str
    sources: tuple[tuple[str, str], ...]
    columns: str
    cut: Cut
    bias: str


_LINEARS = (
    _Linear("attention.qkv", (("self_attn.q_proj", "query"), ("self_attn.k_proj", "kv"), ("self_attn.v_proj", "kv")),
            "hidden", "rows", "qkv_bias"),
    _Linear("attention.dense", (("self_attn.o_proj", "hidden"),), "query", "columns", "dense_bias"),
    _Linear("mlp.fc", (("mlp.gate_proj", "intermediate"),), "hidden", "rows", "mlp_bias"),
    _Linear("mlp.gate", (("mlp.up_proj", "intermediate"),), "hidden", "rows", "mlp_bias"),
    _Linear("mlp.proj", (("mlp.down_proj", "hidden"),), "intermediate", "columns", "mlp_bias"),
)
_NORMS = (("input_layernorm", "input_layernorm", "hidden"), ("post_layernorm", "post_attention_layernorm", "hidden"))
_QK_NORMS = (("attention.q_layernorm", "self_attn.q_norm", "head"),
             ("attention.k_layernorm", "self_attn.k_norm", "head"))


def weights(config: ModelConfig, *, write_lm_head: bool) -> Iterator[WeightSpec]:
    """All tensors in the order of the computation. A tied lm_head is a copy of the table where it is written at all."""
    table = (config.vocab_size, config.hidden_size)
    yield WeightSpec("transformer.vocab_embedding.weight", (Source("model.embed_tokens.weight", table),), "none",
                     "embedding")
    for layer in range(config.num_layers):
        yield from _layer(config, layer)
    yield WeightSpec("transformer.ln_f.weight", (Source("model.norm.weight", (config.hidden_size,)),), "none", "norm")
    if write_lm_head:
        source = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
        yield WeightSpec("lm_head.weight", (Source(source, table),), "vocabulary", "lm_head")


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {"hidden": config.hidden_size, "intermediate": config.intermediate_size, "head": config.head_size,
            "query": config.num_heads * config.head_size, "kv": config.num_kv_heads * config.head_size}


def _layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    sizes = _sizes(config)
    ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
    for name, source, size in _NORMS + (_QK_NORMS if config.qk_norm else ()):
        yield WeightSpec(f"{ours}.{name}.weight", (Source(f"{theirs}.{source}.weight", (sizes[size],)),), "none",
                         "norm", layer=layer)
    for linear in _LINEARS:
        kind = linear.name.split(".")[1]
        columns = sizes[linear.columns]
        yield WeightSpec(f"{ours}.{linear.name}.weight", tuple(
            Source(f"{theirs}.{name}.weight", (sizes[rows], columns), rows == "kv") for name, rows in linear.sources),
            linear.cut, kind, True, layer)
        if getattr(config, linear.bias):
            yield WeightSpec(f"{ours}.{linear.name}.bias", tuple(
                Source(f"{theirs}.{name}.bias", (sizes[rows],), rows == "kv") for name, rows in linear.sources),
                "rows" if linear.cut == "rows" else "none", "bias", layer=layer)
