"""Makes the records that callers get from the state of a request. It decides nothing."""

from __future__ import annotations

from time import monotonic
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorwright.runtime.request import Request, TokenSequence
from tensorwright.runtime.results import FinishReason, Generated, Result

LOGITS_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def generated(sequence: TokenSequence, reason: FinishReason, logits_dtype: str) -> Generated:
    """The record of a sequence that has ended; its rows of logits are let go."""
    parameters = sequence.request.parameters
    logits = None
    if parameters.return_generation_logits:
        rows = np.stack(sequence.logits) if sequence.logits else np.zeros((0, 0), np.float32)
        logits = rows.astype(LOGITS_DTYPES[logits_dtype], copy=False)
        sequence.logits.clear()
    return Generated(
        token_ids=tuple(sequence.output),
        text=sequence.text,
        finish_reason=reason,
        log_probs=tuple(sequence.log_probs) if parameters.return_log_probs else None,
        cumulative_log_prob=sequence.cumulative_log_prob,
        generation_logits=logits,
    )


def result_of(request: Request, logits_dtype: str) -> Result:
    """The record of a request that has ended."""
    now = monotonic()
    return Result(
        request_id=request.id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        sequences=tuple(request.finished[index] for index in sorted(request.finished)),
        context_logits=_context_logits(request, logits_dtype),
        num_cached_tokens=request.num_cached_tokens or 0,
        time_to_first_token_s=(request.first_token_at or now) - request.submitted_at,
        total_s=now - request.submitted_at,
        error=request.error,
    )


def _context_logits(request: Request, logits_dtype: str) -> NDArray[Any] | None:
    if request.context_logits is None:
        return None
    rows: NDArray[np.float32] = request.context_logits[: request.num_context_rows]
    return rows.astype(LOGITS_DTYPES[logits_dtype], copy=False)
