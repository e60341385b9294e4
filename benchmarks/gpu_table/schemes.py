"""The engines that are measured: how each is converted, and what a decode step of it must read. It runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpu import COMMON, SHAPES

CONFIG = {**COMMON, **SHAPES["nemo"], "architectures": ["MistralForCausalLM"], "model_type": "mistral",
          "sliding_window": None, "rope_theta": 1e6, "max_position_embeddings": 131072}
LIMITS = ("--max_batch_size", 64, "--max_seq_len", 4480, "--max_num_tokens", 4096)
WEIGHT_ONLY = ("--use_weight_only", "--weight_only_precision")


@dataclass(frozen=True)
class Scheme:
    """A name for people, flags of convert besides --dtype float16, and how large the engine is at 40 layers."""

    title: str
    convert: tuple[str, ...]
    gigabytes: int


HEADLINE = "int4"
SCHEMES: Mapping[str, Scheme] = {
    HEADLINE: Scheme("int4, groups of 128", (*WEIGHT_ONLY, "int4"), 9),
    "int4_lm_head_int8": Scheme("int4, lm_head int8", (*WEIGHT_ONLY, "int4", "--quantize_lm_head"), 8),
    "int4_kv_fp8": Scheme("int4, fp8 KV cache", (*WEIGHT_ONLY, "int4", "--fp8_kv_cache"), 9),
    "fp8": Scheme("fp8 (W8A8)", ("--use_fp8_rowwise",), 15),
    "fp8_all": Scheme("fp8 (W8A8), lm_head and KV cache fp8", ("--use_fp8_rowwise", "--quantize_lm_head",
                                                              "--fp8_kv_cache"), 14),
    "int8": Scheme("int8 (W8A16)", (*WEIGHT_ONLY, "int8"), 15),
    "float16": Scheme("float16", (), 26),
}


def step_bytes(memory: Mapping[str, Any], batch: int, mean_context: float) -> float:
    """What a decode step must read once: every weight but the embedding table, and each sequence's keys and values."""
    weights: float = memory["weight_bytes"] - memory["embedding_bytes"]
    return weights + batch * mean_context * float(memory["kv_bytes_per_token"])


def shares(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each decode figure: bytes of a step, the shortest time for them at the measured read rate, and its share."""
    limits, memory = figures.get("limits", {}), figures.get("memory", {})
    if "read_bytes_s" not in limits or "weight_bytes" not in memory:
        return {}
    found = {}
    for name, figure in figures.items():
        if "tpot_s" in figure:
            read = step_bytes(memory, int(name.split(":")[1]), figure["mean_context"])
            limit_s = read / limits["read_bytes_s"]
            found[name] = {"step_bytes": read, "bytes_s": read / figure["tpot_s"], "limit_s": limit_s,
                           "share": limit_s / figure["tpot_s"]}
    return found
