"""From samples to medians, ratios and bars: what was reached beside what was asked for. It runs no engine.

A decode step must read every weight but the embedding table once, and the cached keys and values of every sequence:
these bytes, a step's time and the bandwidth that was measured around it make the share of the limit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = {"tensorwright": "Tensorwright", "llama.cpp": "llama.cpp", "openvino": "OpenVINO"}
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


@dataclass(frozen=True)
class Bar:
    """A figure of every engine, and what was asked of the first: at least, or at most where low is good."""

    title: str
    values: Mapping[str, float]
    must: float | None
    aim: float | None
    high_is_good: bool = True
    unit: str = "tok/s"

    @property
    def result(self) -> str:
        """Which bar the first engine reached; the aim counts only with what must be."""
        value = self.values.get("tensorwright")
        if value is None or self.must is None:
            return "not judged"
        if not self._reaches(value, self.must):
            return "missed"
        return "aim" if self.aim is not None and self._reaches(value, self.aim) else "must"

    @property
    def ratio(self) -> float | None:
        """How many times the better peer; where low is good, the better peer's figure over ours."""
        peers = [value for name, value in self.values.items() if name != "tensorwright"]
        value = self.values.get("tensorwright")
        if value is None or not peers:
            return None
        return value / max(peers) if self.high_is_good else min(peers) / value

    def _reaches(self, value: float, bar: float) -> bool:
        return value >= bar if self.high_is_good else value <= bar


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


def bars(found: Medians, config: Mapping[str, Any], *, is_small: bool, length: int, weight_bytes: int) -> Iterator[Bar]:
    """The table of bars; limits in seconds and bytes hold for the small model, ratios for every one."""
    batches = sorted({batch for by_batch in found.values() for batch in by_batch})
    first = batches[0] if batches else 1
    prefill = _figure(found, first, "prefill_tok_s")
    yield Bar("prefill", prefill, _largest({"openvino": 1.0, "llama.cpp": 2.6}, prefill),
              _largest({"openvino": 1.2, "llama.cpp": 2.6}, prefill))
    for batch in batches:
        decode = _figure(found, batch, "decode_tok_s")
        must, aim = {1: (1.25, None), 8: (1.6, 2.0), 16: (1.5, 1.8)}.get(batch, (None, None))
        yield Bar(f"decode, batch {batch}", decode, _times(must, decode),
                  _limit(found, batch) if batch == 1 else _times(aim, decode))
    for batch in batches:
        exact = weight_bytes + batch * length * kv_bytes(config, FORMATS["tensorwright"])
        must = 0.75 if batch == 1 and is_small else (exact + 120e6) / 1e9
        memory = {name: value / 1e9 for name, value in _figure(found, batch, "peak_memory_bytes").items()}
        yield Bar(f"peak memory, batch {batch}", memory, must, min(must, (exact + 60e6) / 1e9), False, "GB")
    yield Bar("open to first token", _figure(found, first, "open_to_first_token_s"), 0.35 if is_small else None,
              0.2 if is_small else None, False, "s")


def markdown(table: Sequence[Bar]) -> str:
    """The bars as a table; every number carries three digits."""
    lines = ["| | llama.cpp | OpenVINO | Tensorwright | against the better | must | aim | reached |",
             "|---|---|---|---|---|---|---|---|"]
    for bar in table:
        cells = [_number(bar.values.get(name)) for name in ("llama.cpp", "openvino", "tensorwright")]
        ratio = "–" if bar.ratio is None else f"{bar.ratio:.2f} ×"
        goals = [_number(goal) for goal in (bar.must, bar.aim)]
        lines.append("| " + " | ".join([f"{bar.title}, {bar.unit}", *cells, ratio, *goals, bar.result]) + " |")
    return "\n".join(lines)


def _figure(found: Medians, batch: int, figure: str) -> dict[str, float]:
    return {name: by_batch[batch][figure] for name, by_batch in found.items() if batch in by_batch}


def _largest(factors: Mapping[str, float], values: Mapping[str, float]) -> float | None:
    return max((factor * values[name] for name, factor in factors.items() if name in values), default=None)


def _times(factor: float | None, values: Mapping[str, float]) -> float | None:
    peers = [value for name, value in values.items() if name != "tensorwright"]
    return factor * max(peers) if factor is not None and peers else None


def _limit(found: Medians, batch: int) -> float | None:
    """Tokens per second at 0.95 of the bandwidth limit."""
    ours = found.get("tensorwright", {}).get(batch)
    return None if ours is None else 0.95 * ours["decode_tok_s"] / ours["limit_share"]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
