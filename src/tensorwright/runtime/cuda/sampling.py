"""`runtime.sampling` on the device, with torch: one token a row, whatever its parameters. It knows only logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tensorwright.runtime.batch import SamplingRow


def choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 and log probabilities float32 [R], of logits float32 [R, V]; nothing waits for the device."""
    tokens = logits.argmax(dim=1)
    for index, row in enumerate(rows):
        if not is_greedy(row):
            tokens[index] = _choose(_adjusted(logits[index], row), row)
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    log_probs = (chosen.double() - logits.double().logsumexp(dim=1)).float()
    return tokens, torch.where(chosen.isfinite(), log_probs, torch.nan)


def is_greedy(row: SamplingRow) -> bool:
    """Whether the token is simply that of the largest logit."""
    return row.temperature == 0 and not len(row.biased) and not len(row.seen)


def _adjusted(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """A copy with biases and penalties."""
    result = logits.clone()
    device = logits.device
    if len(row.biased):
        result.index_add_(0, torch.tensor([int(i) for i in row.biased], device=device),
                          torch.tensor([float(b) for b in row.biases], dtype=torch.float32, device=device))
    if len(row.seen):
        seen = torch.tensor([int(i) for i in row.seen], device=device)
        counts = torch.tensor([int(c) for c in row.counts], dtype=torch.float32, device=device)
        values = result[seen]
        values = torch.where(values > 0, values / row.repetition_penalty, values * row.repetition_penalty)
        result[seen] = values - (row.presence_penalty * (counts > 0) + row.frequency_penalty * counts)
    return result


def _choose(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """The reference's order: temperature, top-k, then min-p and top-p of the same probabilities, then the draw."""
    if row.temperature == 0:
        return logits.argmax()
    scaled = (logits.double() - logits.max().double()) / row.temperature
    scaled = torch.nan_to_num(scaled, nan=0.0, neginf=-torch.inf)
    if row.top_k == 0 and row.top_p >= 1 and row.min_p == 0:
        return _draw(scaled.exp(), row.uniform)
    ordered, order = scaled.sort(descending=True, stable=True)
    if row.top_k:
        ordered, order = ordered[:row.top_k], order[:row.top_k]
    probabilities = ordered.exp()
    probabilities = probabilities / probabilities.sum()
    before = probabilities.cumsum(0) - probabilities
    kept = (before < row.top_p) & (probabilities >= row.min_p * probabilities[0])
    return order[_draw(torch.where(kept, probabilities, 0.0), row.uniform)]


def _draw(weights: torch.Tensor, fraction: float) -> torch.Tensor:
    """The first index whose cumulative weight passes the fraction of the sum."""
    cumulative = weights.cumsum(0)
    index = torch.searchsorted(cumulative, fraction * cumulative[-1:], right=True)[0]
    last = torch.where(weights > 0, torch.arange(weights.shape[0], device=weights.device), 0).max()
    return torch.minimum(index, last)
