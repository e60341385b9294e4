"""Beam search over log probabilities. It knows scores and lengths; blocks and sequences are the caller's.

A finished beam's score is the sum of its log probabilities divided by length ** length_penalty, where length counts
generated tokens, the end token included. The log probabilities are those of the model after biases and penalties;
temperature and top-k, top-p, min-p play no part: beam search does not draw.

The algorithm is that of the sequence-to-sequence literature (Wu et al. 2016, section 7) with the stopping rules that
users know from transformers: early_stopping 1 stops when as many beams as asked have ended; 0 also goes on while a
running beam would, at its present length, beat the worst of them; anything else goes on until max_tokens, or until no
running beam can come to a better score there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.runtime.results import FinishReason


@dataclass(frozen=True)
class Candidate:
    """A running beam and the token that may continue it; `score` is the sum of log probabilities then."""

    parent: int
    token: int
    log_prob: float
    score: float


@dataclass(frozen=True)
class Hypothesis:
    """A beam that has ended; `final_score` is normalised by length."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    final_score: float
    finish_reason: FinishReason


@dataclass
class BeamSearch:
    """The state of one request's search beside its running beams."""

    width: int
    length_penalty: float
    early_stopping: int
    max_tokens: int
    candidates_per_beam: int = 2  # at least one more than there are end tokens
    ended: list[Hypothesis] = field(default_factory=list)  # the best first, at most `width`

    def advance(self, scores: Sequence[float], log_probs: NDArray[Any], length: int,
                ends: Callable[[Candidate], Hypothesis | None]) -> list[Candidate]:
        """The beams that go on, the best first.

        Args:
            scores: sum of log probabilities of each running beam.
            log_probs: [running beams, vocabulary], the log probability of each next token.
            length: generated tokens of a beam with its next token.
            ends: the hypothesis that a candidate ends in, or None when it goes on.
        """
        running: list[Candidate] = []
        for rank, candidate in enumerate(self._best(scores, log_probs)):
            hypothesis = ends(candidate)
            if hypothesis is None:
                running.append(candidate)
            elif rank < self.width:
                self.add(hypothesis)
            if len(running) == self.width:
                break
        return running if running and not self._is_done(running[0].score, length) else []

    def add(self, hypothesis: Hypothesis) -> None:
        """Keep a beam that has ended, if it is among the best."""
        self.ended.append(hypothesis)
        self.ended.sort(key=lambda kept: -kept.final_score)
        del self.ended[self.width :]

    def final_score(self, score: float, length: int) -> float:
        """A sum of log probabilities, normalised by length."""
        return float(score / length**self.length_penalty)

    def _best(self, scores: Sequence[float], log_probs: NDArray[Any]) -> list[Candidate]:
        """The best continuations over all beams; ties: the earlier beam, then the lower token."""
        count = self.candidates_per_beam * self.width
        totals = log_probs + np.asarray(scores, np.float64)[:, None]
        flat = totals.ravel()
        top = np.argpartition(-flat, min(count, flat.size - 1))[:count] if flat.size > count else np.arange(flat.size)
        top = top[np.lexsort((top, -flat[top]))]
        parents, tokens = np.divmod(top[np.isfinite(flat[top])], log_probs.shape[1])
        return [Candidate(parent, token, float(log_probs[parent, token]), float(totals[parent, token]))
                for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)]

    def _is_done(self, best_running: float, length: int) -> bool:
        if len(self.ended) < self.width:
            return False
        if self.early_stopping == 1:
            return True
        at_the_end = self.early_stopping != 0 and self.length_penalty > 0
        attainable = self.final_score(best_running, self.max_tokens if at_the_end else length)
        return self.ended[-1].final_score >= attainable
