"""From samples to medians, and from these to the bars that compare engines. It runs no engine.

A decode step must read every weight but the embedding table once, and the cached keys and values of every sequence:
these bytes, a step's time and the bandwidth that was measured around it make the share of the limit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers.bars import OURS, Bar

MEDIANS = ("open_s", "open_to_first_token_s", "prefill_tok_s", "decode_tok_s", "limit_share", "peak_memory_bytes")

Medians = Mapping[str, Mapping[int, Mapping[str, float]]]  # engine, batch, figure


@dataclass(frozen=True)
class Format:
    """Bits for each weight, scales included; of the KV cache, bits for each number and bytes for each head."""

    weight_bits: float
    lm_head_bits: float
    kv_bits: int
    kv_head_bytes: int = 0


FORMATS = {
    "tensorwright": Format(4 + 16 / 128, 8, 16),
    "llama.cpp": Format(4 + 16 / 32, 8 + 16 / 32, 16),
    "openvino": Format(4 + 16 / 128, 8, 8, kv_head_bytes=8),
}


def kv_bytes(config: Mapping[str, Any], form: Format) -> float:
    """Bytes of the KV cache for one token."""
    heads = 2 * config["num_hidden_layers"] * config["num_key_value_heads"]
    return float(heads * (config["head_dim"] * form.kv_bits / 8 + form.kv_head_bytes))


def step_bytes(config: Mapping[str, Any], form: Format, kv_tokens: float) -> float:
    """Bytes that a decode step must read, with so many tokens cached in all."""
    hidden, head = config["hidden_size"], config["head_dim"]
    attention = 2 * hidden * head * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"]
    layers: float = config["num_hidden_layers"] * layer * form.weight_bits
    weights: float = layers + config["vocab_size"] * hidden * form.lm_head_bits
    return weights / 8 + kv_tokens * kv_bytes(config, form)


def medians(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """By engine, batch size and figure; measurements that failed have no say."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for sample in samples:
        if "error" not in sample:
            groups.setdefault((sample["engine"], sample["batch"]), []).append(sample)
    result: dict[str, dict[int, dict[str, float]]] = {}
    for (engine, batch), group in groups.items():
        result.setdefault(engine, {})[batch] = {
            figure: statistics.median(sample[figure] for sample in group) for figure in MEDIANS}
    return result


def speed_bars(found: Medians) -> Iterator[Bar]:
    """Tokens per second: ratios to the peers, which hold for every model and number of threads."""
    batches = sorted({batch for by_batch in found.values() for batch in by_batch})
    prefill = _figure(found, batches[0], "prefill_tok_s") if batches else {}
    yield Bar("prefill", "tok/s", prefill, _largest({"openvino": 1.0, "llama.cpp": 2.6}, prefill),
              _largest({"openvino": 1.2, "llama.cpp": 2.6}, prefill))
    for batch in batches:
        decode = _figure(found, batch, "decode_tok_s")
        must, aim = {1: (1.25, None), 8: (1.6, 2.0), 16: (1.5, 1.8)}.get(batch, (None, None))
        yield Bar(f"decode, batch {batch}", "tok/s", decode, _times(must, decode),
                  _limit(found, batch) if batch == 1 else _times(aim, decode))


def memory_bars(found: Medians, config: Mapping[str, Any], *, is_small: bool, length: int,
                weight_bytes: int) -> Iterator[Bar]:
    """Peak memory, and the time to open. Limits in seconds, and one in bytes, hold for the small model only."""
    batches = sorted({batch for by_batch in found.values() for batch in by_batch})
    for batch in batches:
        exact = weight_bytes + batch * length * kv_bytes(config, FORMATS[OURS])
        must = 0.75 if batch == 1 and is_small else (exact + 120e6) / 1e9
        memory = {name: value / 1e9 for name, value in _figure(found, batch, "peak_memory_bytes").items()}
        yield Bar(f"peak memory, batch {batch}", "GB", memory, must, min(must, (exact + 60e6) / 1e9), False)
    if batches:
        yield Bar("open to first token of a 16-token prompt", "s", _figure(found, batches[0], "open_to_first_token_s"),
                  0.35 if is_small else None, 0.2 if is_small else None, False)


def _figure(found: Medians, batch: int, figure: str) -> dict[str, float]:
    return {name: by_batch[batch][figure] for name, by_batch in found.items() if batch in by_batch}


def _largest(factors: Mapping[str, float], values: Mapping[str, float]) -> float | None:
    return max((factor * values[name] for name, factor in factors.items() if name in values), default=None)


def _times(factor: float | None, values: Mapping[str, float]) -> float | None:
    peers = [value for name, value in values.items() if name != OURS]
    return factor * max(peers) if factor is not None and peers else None


def _limit(found: Medians, batch: int) -> float | None:
    """Tokens per second at 0.95 of the bandwidth limit."""
    ours = found.get(OURS, {}).get(batch)
    return None if ours is None else 0.95 * ours["decode_tok_s"] / ours["limit_share"]
