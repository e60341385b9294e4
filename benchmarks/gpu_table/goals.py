"""What is asked of an int4 engine of Mistral-Nemo's shape on one H200, and what vLLM reached there: data, no code.

Figures are named as `worker.py` names them. vLLM's are its own `LLM.generate` with prompt token ids, dummy weights,
FlashAttention 3 and CUDA graphs; TPOT = (time of 257 tokens − time of 1) / 256, medians of 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peers.bars import OURS, Bar

PEER = {"name": "vLLM 0.24.0", "date": "2026-11-22", "machine": "one H200, the same machine type",
        "int4": "groups of 128 (Machete), 16-bit lm_head", "fp8": "Cutlass, one scale per tensor"}


@dataclass(frozen=True)
class Goal:
    """A row of the table. `peers`: vLLM with int4 and fp8 weights. Times of a step are in ms."""

    figure: str
    title: str
    unit: str
    peers: Mapping[str, float]
    must: float
    aim: float
    high_is_good: bool = True

    def bar(self, value: float | None) -> Bar:
        """With our figure; None: it could not be measured."""
        values = dict(self.peers) if value is None else {**self.peers, OURS: value}
        return Bar(self.title, self.unit, values, self.must, self.aim, self.high_is_good)


def _step(batch: int, input_len: int, int4: float, fp8: float, must: float, aim: float) -> Goal:
    return Goal(f"tpot:{batch}:{input_len}", f"TPOT, batch {batch}, {input_len:,} in", "ms",
                {"vllm_int4": int4, "vllm_fp8": fp8}, must, aim, high_is_good=False)


GOALS = (
    _step(1, 128, 5.14, 4.94, 2.6, 2.0),
    _step(1, 4096, 5.32, 5.11, 2.8, 2.2),
    _step(16, 128, 5.34, 5.09, 3.4, 2.6),
    _step(64, 128, 8.57, 6.18, 6.0, 4.5),
    Goal("prefill:16:1024", "prefill, 16 × 1,024", "tok/s", {"vllm_int4": 30400, "vllm_fp8": 47300}, 27000, 30000),
    Goal("serving:128:512:256", "128 requests, 512 in / 256 out, at most 64 at once", "tok/s",
         {"vllm_int4": 4647, "vllm_fp8": 6532}, 6000, 9000),
)
FP8_PREFILL = Goal("prefill:16:1024", "prefill, 16 × 1,024, fp8 engine", "tok/s", {"vllm_fp8": 47300}, 48000, 56000)
FIRST_TOKEN = Goal("first_token", "start to first token, engine on local disk, file cached", "s",
                   {"vllm_int4": 20}, 8, 4, high_is_good=False)  # 20 to 63 s with a warm cache, 173 s cold
CONVERT_BUILD = Goal("convert_build", "convert + build from 16-bit weights", "s", {}, 240, 120, high_is_good=False)


def value_of(goal: Goal, figures: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Our figure in the goal's unit, out of a worker's answers."""
    found = figures.get(goal.figure, {})
    if "tokens_s" not in found:
        return None
    return 1e3 * float(found["tpot_s"]) if goal.unit == "ms" else float(found["tokens_s"])
