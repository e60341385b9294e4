"""How a row of logits becomes a token: the NumPy reference that the native samplers are compared with.

The order: biases; repetition, presence and frequency penalties; then, at temperature 0, the largest logit (the lowest
id wins a tie). Otherwise temperature; top-k; on the probabilities that this leaves, min-p and top-p (both see the same
probabilities); what remains is drawn from by one uniform number through the inverse of its cumulative distribution,
in the order of falling probability (ties: the lower id first) where a filter is on, by token id where none is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.runtime.batch import Floats, Ints, SamplingRow

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): each input bit changes half of the output's."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1) with 24 bits, exact in float32: a function of its arguments and of nothing else."""
    state = 0
    for word in (seed, stream, position):
        state = _mix((state + word + 0x9E3779B97F4A7C15) & _MASK)
    return (state >> 40) * 2.0**-24


def adjusted(logits: Floats, row: SamplingRow) -> Floats:
    """A copy of one row of logits [V] with the row's biases and penalties."""
    result = logits.astype(np.float32)
    if len(row.biased):
        np.add.at(result, np.asarray(row.biased, np.intp), np.asarray(row.biases, np.float32))
    if len(row.seen):
        seen = np.asarray(row.seen, np.intp)
        counts = np.asarray(row.counts, np.float32)
        values, penalty = result[seen], np.float32(row.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(row.presence_penalty) * (counts > 0) + np.float32(row.frequency_penalty) * counts
        result[seen] = values
    return result


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log probabilities over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= np.maximum(shifted.max(axis=-1, keepdims=True), np.finfo(np.float64).min)  # all −inf stays −inf
    total = np.exp(shifted).sum(axis=-1, keepdims=True)
    shifted -= np.log(total, where=total > 0, out=np.zeros_like(total))
    return shifted


def choose(logits: Floats, rows: Sequence[SamplingRow]) -> tuple[Ints, Floats]:
    """A token per row of logits [R, V], and its log probability under the unchanged logits."""
    tokens = np.array([_choose(line, row) for line, row in zip(logits, rows, strict=True)], np.int32)
    log_probs = [_log_prob(line, token) for line, token in zip(logits, tokens, strict=True)]
    return tokens, np.array(log_probs, np.float32)


def _log_prob(logits: Floats, token: int) -> float:
    if not np.isfinite(logits[token]):
        return float("nan")
    highest = logits.max()
    total = np.exp(logits - highest).sum(dtype=np.float64)
    return float(np.float64(logits[token]) - highest - np.log(total))


def _choose(logits: Floats, row: SamplingRow) -> int:
    changed = adjusted(logits, row)
    highest = changed.max()
    if row.temperature == 0 or not np.isfinite(highest):  # every token forbidden, or logits that are no numbers
        return int(changed.argmax())
    scaled = (changed.astype(np.float64) - highest) / row.temperature
    if row.top_k == 0 and row.top_p >= 1 and row.min_p == 0:
        return _draw(np.exp(scaled), row.uniform)
    order = np.argsort(-scaled, kind="stable")
    if row.top_k:
        order = order[: row.top_k]
    probabilities = np.exp(scaled[order])
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    kept = (before < row.top_p) & (probabilities >= row.min_p * probabilities[0])
    return int(order[_draw(probabilities[kept], row.uniform)])


def _draw(weights: NDArray[np.float64], fraction: float) -> int:
    """The first index whose cumulative weight passes the fraction of the sum."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, fraction * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))
