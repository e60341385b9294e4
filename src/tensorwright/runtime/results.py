"""What a caller gets back. Plain records; how they come about is the loop's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Generated:
    """One sequence that has ended. An end token or stop tokens are among `token_ids`, but not in `text`."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    log_probs: tuple[float, ...] | None  # natural logarithms, one per token
    cumulative_log_prob: float
    generation_logits: NDArray[Any] | None  # [tokens, vocabulary] in the engine's logits_dtype


@dataclass(frozen=True)
class Result:
    """A request that has ended. `error` says why, where a sequence's finish_reason is "error"."""

    request_id: int
    prompt: str
    prompt_token_ids: tuple[int, ...]
    sequences: tuple[Generated, ...]  # beams: the best first
    context_logits: NDArray[Any] | None  # [prompt tokens, vocabulary] in the engine's logits_dtype
    num_cached_tokens: int
    time_to_first_token_s: float
    total_s: float
    error: str | None


@dataclass(frozen=True)
class Update:
    """News of one sequence. `text` may lag behind `token_ids`: half characters and half stop words are held back.

    Beams come as one update per sequence at the end, since a beam's text can change until then.
    """

    request_id: int
    sequence: int
    text: str  # what is new
    token_ids: tuple[int, ...]  # what is new
    log_probs: tuple[float, ...] | None  # of the new tokens
    finished: bool  # the whole request
    finish_reason: FinishReason | None  # of this sequence
    result: Result | None  # when the whole request has finished
