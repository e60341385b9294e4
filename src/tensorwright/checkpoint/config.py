"""A checkpoint's config.json: upstream's fields, to and from `CheckpointConfig`. It knows no weights.

Fields that upstream lacks: dense_bias, sliding_window, windowed_layers, end_ids, producer. A quantised lm_head shows in
`exclude_modules`: upstream's default list without `*lm_head`. With FP8_PER_CHANNEL_PER_TOKEN all matrices of the layers
are float8, attention's too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

from tensorwright import __version__
from tensorwright.errors import CheckpointError
from tensorwright.models.config import ModelConfig, Rope

Algorithm = Literal["W8A16", "W4A16", "FP8_PER_CHANNEL_PER_TOKEN"]
KvCache = Literal["INT8", "FP8"]
GROUP_SIZES = (32, 64, 128, -1)
_EXCLUDED = ("*router", "*vocab_embedding", "*position_embedding", "*block_embedding")


@dataclass(frozen=True)
class Quantization:
    """What is quantised, and how. group_size −1: one scale per output channel (always so but for W4A16's layers).

    A quantised lm_head is float8 where the layers are, else int8. An FP8 cache has the scale 1.
    """

    algorithm: Algorithm | None = None
    group_size: int = -1
    kv_cache: KvCache | None = None
    quantize_lm_head: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint folder's facts. `model.dtype` is the dtype in which unquantised weights are stored."""

    model: ModelConfig
    quantization: Quantization = Quantization()
    tp_size: int = 1
    end_ids: tuple[int, ...] = ()

    @property
    def has_lm_head(self) -> bool:
        """Whether lm_head is a tensor of its own; else the embedding table is used."""
        return not self.model.tied_embeddings or self.quantization.quantize_lm_head


def to_json(config: CheckpointConfig) -> dict[str, Any]:
    """The contents of config.json."""
    model, quantization = config.model, config.quantization
    rope = model.rope
    return {
        "producer": {"name": "tensorwright", "version": __version__},
        "architecture": model.architecture, "dtype": model.dtype, "logits_dtype": "float32",
        "vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
        "head_size": model.head_size, "intermediate_size": model.intermediate_size, "hidden_act": model.activation,
        "norm_epsilon": model.norm_epsilon, "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": model.max_position_embeddings, "rotary_base": rope.theta,
        "rotary_scaling": None if rope.kind == "default" else {"rope_type": rope.kind, **rope.scaling},
        "rotary_embedding_dim": rope.rotary_size or model.head_size, "qk_layernorm": model.qk_norm,
        "attn_bias": model.qkv_bias, "dense_bias": model.dense_bias, "mlp_bias": model.mlp_bias,
        "sliding_window": model.sliding_window or None,
        "windowed_layers": None if model.windowed_layers is None else list(model.windowed_layers),
        "tie_word_embeddings": model.tied_embeddings, "use_parallel_embedding": False, "embedding_sharding_dim": 0,
        "share_embedding_table": False, "end_ids": list(config.end_ids),
        "mapping": {"world_size": config.tp_size, "tp_size": config.tp_size, "pp_size": 1, "gpus_per_node": 8},
        "quantization": {
            "quant_algo": quantization.algorithm, "kv_cache_quant_algo": quantization.kv_cache,
            "group_size": quantization.group_size, "smoothquant_val": None, "clamp_val": None,
            "has_zero_point": False, "pre_quant_scale": False,
            "exclude_modules": list(_EXCLUDED) if quantization.quantize_lm_head else None},
    }


def from_json(values: Mapping[str, Any]) -> CheckpointConfig:
    """The inverse of `to_json`. Raises CheckpointError for a field that is missing or that cannot be meant."""
    try:
        mapping = values.get("mapping") or {}
        return CheckpointConfig(_model(values), _quantization(values.get("quantization") or {}),
                                int(mapping.get("tp_size", 1)), tuple(values.get("end_ids") or ()))
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        what = f"field {cause} is missing" if isinstance(cause, KeyError) else str(cause)
        raise CheckpointError(f"config.json of the checkpoint is not understood: {what}",
                              mend="tensorwright convert --model_dir M --output_dir C") from cause


def _model(values: Mapping[str, Any]) -> ModelConfig:
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    windowed = values.get("windowed_layers")
    if values["dtype"] not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {values['dtype']!r}, expected float32, float16 or bfloat16")
    return ModelConfig(
        architecture=values["architecture"], dtype=values["dtype"], vocab_size=values["vocab_size"],
        hidden_size=hidden, num_layers=values["num_hidden_layers"], num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads, head_size=values.get("head_size") or hidden // heads,
        intermediate_size=values["intermediate_size"], max_position_embeddings=values["max_position_embeddings"],
        norm_epsilon=values.get("norm_epsilon", 1e-5), activation=values.get("hidden_act", "silu"), rope=_rope(values),
        qkv_bias=values.get("attn_bias", False), dense_bias=values.get("dense_bias", values.get("attn_bias", False)),
        mlp_bias=values.get("mlp_bias", False), qk_norm=values.get("qk_layernorm", False),
        sliding_window=values.get("sliding_window") or 0, windowed_layers=None if windowed is None else tuple(windowed),
        tied_embeddings=values.get("tie_word_embeddings", False))


def _rope(values: Mapping[str, Any]) -> Rope:
    scaling = dict(values.get("rotary_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    size = values.get("rotary_embedding_dim") or 0
    return Rope(values.get("rotary_base", 10000.0), kind, 0 if size == values.get("head_size") else size, scaling)


def _quantization(values: Mapping[str, Any]) -> Quantization:
    algorithm, kv_cache = values.get("quant_algo"), values.get("kv_cache_quant_algo")
    group_size = values.get("group_size", -1)
    if (algorithm not in (None, *get_args(Algorithm)) or kv_cache not in (None, *get_args(KvCache))
            or group_size not in GROUP_SIZES):
        raise ValueError(f"quant_algo {algorithm}, kv_cache_quant_algo {kv_cache}, group_size {group_size}; expected "
                         f"{', '.join(get_args(Algorithm))} or null, {' or '.join(get_args(KvCache))} or null, and one "
                         f"of {GROUP_SIZES}")
    excluded = values.get("exclude_modules")
    quantized = excluded is not None and not any(fnmatch("lm_head", pattern) for pattern in excluded)
    return Quantization(algorithm, group_size, kv_cache, quantized)


def read_config(directory: Path) -> CheckpointConfig:
    """A checkpoint folder's config.json. Raises CheckpointError."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise CheckpointError(f"{directory} is not a finished checkpoint: {path.name} cannot be read "
                              f"({cause.strerror}); it is written last", mend="tensorwright convert --model_dir M "
                              f"--output_dir {directory}") from cause
    except ValueError as cause:
        raise CheckpointError(f"{path} is not JSON: {cause}", mend="tensorwright convert --model_dir M --output_dir "
                              f"{directory}") from cause
    if not isinstance(values, dict) or "quantization" not in values:
        raise CheckpointError(f"{path} is not a checkpoint's config.json: it has no field quantization",
                              mend="give the folder that convert wrote (its --output_dir), not the model folder")
    return from_json(values)
