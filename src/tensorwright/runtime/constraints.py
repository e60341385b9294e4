"""What a request forbids or favours, as biases and counts for the sampler. It draws no tokens.

Biased are: logit_bias; end ids until min_tokens are there; bad words; and what would repeat an n-gram. The repetition
penalty counts prompt and output, presence and frequency penalties the output only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tensorwright.runtime.batch import Ints, SamplingRow
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.sampling import uniform
from tensorwright.runtime.words import BadWords, banned_by_ngrams

FORBIDDEN = float("-inf")
"""The bias of a token that must not come next."""


class TokenCounts:
    """The distinct tokens of a sequence and how often each was generated; adding one costs the same at any length."""

    def __init__(self, prompt_token_ids: Sequence[int], max_tokens: int) -> None:
        distinct = list(dict.fromkeys(prompt_token_ids))
        self._index = {token: index for index, token in enumerate(distinct)}
        self._tokens = np.zeros(len(distinct) + max_tokens, np.int32)
        self._tokens[: len(distinct)] = distinct
        self._counts = np.zeros_like(self._tokens)

    def add(self, token: int) -> None:
        """Count a generated token."""
        index = self._index.setdefault(token, len(self._index))
        self._tokens[index] = token
        self._counts[index] += 1

    def copy(self) -> TokenCounts:
        """An independent copy, for a sequence that forks."""
        twin = TokenCounts.__new__(TokenCounts)
        twin._index = dict(self._index)
        twin._tokens, twin._counts = self._tokens.copy(), self._counts.copy()
        return twin

    @property
    def seen(self) -> Ints:
        """Each distinct token once."""
        return self._tokens[: len(self._index)]

    @property
    def counts(self) -> Ints:
        """How often each token of `seen` was generated."""
        return self._counts[: len(self._index)]


class Constraints:
    """The biases of one request, as a function of a sequence's tokens."""

    def __init__(self, parameters: SamplingParameters, end_ids: frozenset[int],
                 bad_words: Sequence[Sequence[int]]) -> None:
        self._parameters = parameters
        self._until_minimum = dict.fromkeys(sorted(end_ids), FORBIDDEN)
        self._bad_words = BadWords(bad_words)
        self.counts_tokens = (parameters.repetition_penalty, parameters.presence_penalty,
                              parameters.frequency_penalty) != (1.0, 0.0, 0.0)
        self.follow_tokens = (self.counts_tokens or parameters.no_repeat_ngram_size > 0
                              or any(len(sequence) > 1 for sequence in bad_words))

    def biases(self, tokens: Sequence[int], num_generated: int) -> Mapping[int, float]:
        """What is added to the logits of the token after `tokens`."""
        found = dict(self._parameters.logit_bias)
        if num_generated < self._parameters.min_tokens:
            found |= self._until_minimum
        banned = self._bad_words.banned(tokens)
        banned += banned_by_ngrams(tokens, self._parameters.no_repeat_ngram_size)
        return found | dict.fromkeys(banned, FORBIDDEN) if banned else found

    def row(self, tokens: Sequence[int], num_generated: int, stream: int, counts: TokenCounts | None,
            num_expected: int = 0) -> SamplingRow:
        """How the token after `tokens` is to be drawn. The random number depends on seed, stream and position only.

        So many tokens that nobody knows yet may stand between, if these constraints do not `follow_tokens`.
        """
        parameters, biases = self._parameters, self.biases(tokens, num_generated + num_expected)
        return SamplingRow(
            temperature=parameters.temperature,
            top_k=parameters.top_k,
            top_p=parameters.top_p,
            min_p=parameters.min_p,
            repetition_penalty=parameters.repetition_penalty,
            presence_penalty=parameters.presence_penalty,
            frequency_penalty=parameters.frequency_penalty,
            uniform=uniform(parameters.seed, stream, len(tokens) + num_expected) if parameters.temperature else 0.0,
            seen=counts.seen if counts else (),
            counts=counts.counts if counts else (),
            biased=tuple(biases),
            biases=tuple(biases.values()),
        )
