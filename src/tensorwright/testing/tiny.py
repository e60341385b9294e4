"""Tiny random models of every family, as whole Hugging Face folders. It knows their files, and uses no torch.

Weights are scaled so that hidden states stay near unit size and the logits of a random model are far from ties.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorwright.checkpoint.tensor_file import write_tensors
from tensorwright.testing.byte_tokenizer import CHAT_TEMPLATE, write_tokenizer

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                  "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class TinyModel:
    """What to write. head_size 32 with 4 heads of 128: set it apart from hidden_size / num_heads to test that."""

    family: Family = "mistral"
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    intermediate_size: int = 256
    vocab_size: int = 320
    max_position_embeddings: int = 512
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    tied_embeddings: bool = False
    attention_bias: bool = False  # llama and qwen3; qwen2 always has it on q, k and v
    mlp_bias: bool = False  # llama only
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)  # e.g. {"rope_type": "linear", "factor": 2.0}
    sliding_window: int | None = None
    max_window_layers: int = 0  # qwen2 and qwen3: the first layer with a window
    end_ids: tuple[int, ...] = (2,)
    config_style: Literal[4, 5] = 5  # of transformers: rope_theta and torch_dtype, or rope_parameters and dtype
    num_shards: int = 1
    seed: int = 0


def write_model(folder: Path, model: TinyModel | None = None) -> Path:
    """Writes config.json, safetensors and tokenizer files into `folder` (created when missing) and returns it."""
    model = model or TinyModel()
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config(model))
    end_ids = model.end_ids[0] if len(model.end_ids) == 1 else list(model.end_ids)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": end_ids})
    write_tokenizer(folder, model.vocab_size)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_weights(folder, tensors(model), model.num_shards)
    return folder


def config(model: TinyModel) -> dict[str, Any]:
    """The model's config.json, in the style of transformers 4 or 5."""
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model.family]], "model_type": model.family, "hidden_act": "silu",
        "vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size, "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": model.tied_embeddings, "bos_token_id": 1, "eos_token_id": model.end_ids[0],
    }
    if model.family in ("llama", "qwen3"):
        values["attention_bias"] = model.attention_bias
    if model.family == "llama":
        values["mlp_bias"] = model.mlp_bias
    if model.family != "llama":
        values["sliding_window"] = model.sliding_window
    if model.family.startswith("qwen"):
        values |= {"use_sliding_window": model.sliding_window is not None, "max_window_layers": model.max_window_layers}
    if model.config_style == 4:
        return values | {"torch_dtype": model.dtype, "rope_theta": model.rope_theta,
                         "rope_scaling": dict(model.rope_scaling) or None}
    rope = {"rope_type": "default", "rope_theta": model.rope_theta, **model.rope_scaling}
    return values | {"dtype": model.dtype, "rope_parameters": rope}


def tensors(model: TinyModel) -> dict[str, NDArray[Any]]:
    """Random weights by their Hugging Face names, in the model's dtype."""
    random = np.random.default_rng(model.seed)
    dtype = np.dtype(ml_dtypes.bfloat16 if model.dtype == "bfloat16" else model.dtype)

    def normal(*shape: int, std: float) -> NDArray[Any]:
        return (random.standard_normal(shape, np.float32) * np.float32(std)).astype(dtype)

    def norm(size: int) -> NDArray[Any]:
        return (1 + 0.1 * random.standard_normal(size, np.float32)).astype(dtype)

    hidden = model.hidden_size
    biased = {"attention": model.attention_bias and model.family in ("llama", "qwen3"),
              "qkv": model.family == "qwen2", "mlp": model.mlp_bias and model.family == "llama"}
    weights = {"model.embed_tokens.weight": normal(model.vocab_size, hidden, std=0.2 if model.tied_embeddings else 1.0),
               "model.norm.weight": norm(hidden)}
    if not model.tied_embeddings:
        weights["lm_head.weight"] = normal(model.vocab_size, hidden, std=3 * hidden ** -0.5)
    for layer in range(model.num_layers):
        for name, (rows, columns) in _matrices(model).items():
            weights[f"model.layers.{layer}.{name}.weight"] = normal(rows, columns, std=1.5 * columns ** -0.5)
            projection = name.split(".")[1]
            if biased["attention" if name.startswith("self_attn") else "mlp"] or (
                    biased["qkv"] and projection in ("q_proj", "k_proj", "v_proj")):
                weights[f"model.layers.{layer}.{name}.bias"] = normal(rows, std=0.2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = norm(hidden)
        if model.family == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"model.layers.{layer}.self_attn.{name}.weight"] = norm(model.head_size)
    return weights


def _matrices(model: TinyModel) -> dict[str, tuple[int, int]]:
    query, key = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    return {"self_attn.q_proj": (query, model.hidden_size), "self_attn.k_proj": (key, model.hidden_size),
            "self_attn.v_proj": (key, model.hidden_size), "self_attn.o_proj": (model.hidden_size, query),
            "mlp.gate_proj": (model.intermediate_size, model.hidden_size),
            "mlp.up_proj": (model.intermediate_size, model.hidden_size),
            "mlp.down_proj": (model.hidden_size, model.intermediate_size)}


def write_weights(folder: Path, weights: Mapping[str, NDArray[Any]], num_shards: int = 1) -> None:
    """Writes model.safetensors, or shards with their model.safetensors.index.json."""
    if num_shards == 1:
        write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
        return
    names = list(weights)
    homes = {name: f"model-{i * num_shards // len(names) + 1:05}-of-{num_shards:05}.safetensors"
             for i, name in enumerate(names)}
    for home in sorted(set(homes.values())):
        write_tensors(folder / home, {name: weights[name] for name in names if homes[name] == home}, {"format": "pt"})
    _write_json(folder / "model.safetensors.index.json",
                {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": homes})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
