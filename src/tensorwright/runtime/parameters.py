"""What a caller may ask of a generation. Checked here once; nothing here knows how it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tensorwright.errors import UsageError

_FINITE = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty")


@dataclass(frozen=True)
class SamplingParameters:
    """Token counts and the usual knobs. temperature 0 is greedy; above 0 it samples, with nothing else needed."""

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    seed: int = 0  # the same seed gives the same tokens, whatever else is in the batch
    num_return_sequences: int | None = None  # None: one, or with beams all of them
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: int = 1  # beams: 1 stop when enough have ended, 0 when no better can come, other: until max_tokens
    end_ids: tuple[int, ...] | None = None  # None: every eos id of the model
    stop: tuple[str, ...] = ()  # matched on decoded text and cut off
    bad_words: tuple[str, ...] = ()
    stop_token_ids: tuple[tuple[int, ...], ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    return_log_probs: bool = False
    return_context_logits: bool = False
    return_generation_logits: bool = False

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be 1 or more": self.max_tokens >= 1,
            "min_tokens must be 0 or more": self.min_tokens >= 0,
            "temperature must be 0 or more": self.temperature >= 0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be from 0 to 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "no_repeat_ngram_size must be 0 (off) or more": self.no_repeat_ngram_size >= 0,
            "beam_width must be 1 or more": self.beam_width >= 1,
            "num_return_sequences must be 1 or more": self.num_sequences >= 1,
            "seed must be 0 or more": self.seed >= 0,
            **{f"{name} must be a finite number": math.isfinite(getattr(self, name)) for name in _FINITE},
        }
        for message, holds in checks.items():
            if not holds:
                name = message.split(" ", 1)[0]
                raise UsageError(f"{message}; got {getattr(self, name)}")

    @property
    def num_sequences(self) -> int:
        """Sequences that the request ends with."""
        return self.beam_width if self.num_return_sequences is None else self.num_return_sequences
