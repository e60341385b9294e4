"""Batches by hand and comparisons of logits, for tests of whole engines. It knows no test framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.runtime.batch import Batch


def prompt_batch(token_ids: Sequence[int], *, block_size: int, cached: int = 0, first_block: int = 0,
                 all_logits: bool = True) -> Batch:
    """One sequence's tokens from position `cached` on; its blocks follow each other from `first_block`."""
    count = len(token_ids)
    positions = np.arange(cached, count, dtype=np.int32)
    width = -(-count // block_size)
    rows = np.arange(count - cached, dtype=np.int32)
    return Batch(
        token_ids=np.asarray(token_ids[cached:], np.int32), positions=positions,
        slots=(positions + first_block * block_size).astype(np.int32), query_starts=np.zeros(1, np.int32),
        query_lengths=np.array([count - cached], np.int32), kv_lengths=np.array([count], np.int32),
        block_tables=np.arange(first_block, first_block + width, dtype=np.int32)[None],
        output_rows=rows if all_logits else rows[-1:])


def relative_error(given: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest difference, relative to the largest number wanted."""
    difference = np.abs(np.asarray(given, np.float64) - np.asarray(wanted, np.float64)).max()
    return float(difference / np.abs(np.asarray(wanted, np.float64)).max())


def root_mean_square_error(given: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Root mean square of the difference, relative to that of the wanted numbers."""
    difference = np.asarray(given, np.float64) - np.asarray(wanted, np.float64)
    return float(np.sqrt(np.mean(difference**2) / np.mean(np.asarray(wanted, np.float64) ** 2)))
