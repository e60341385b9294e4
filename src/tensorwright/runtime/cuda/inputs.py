"""A step's arrays on the device: packed into one pinned piece, sent in one copy. It knows the batch's layout only.

The device has them once: steps follow each other there. The host has them twice, so that one step can be packed while
the copy of the last one waits for its turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tensorwright.program.ops import BATCH_INPUTS
from tensorwright.runtime.batch import Batch

ALIGNED_INTS = 4


@dataclass(frozen=True)
class Sizes:
    """What a step's launches and addresses follow from."""

    tokens: int
    sequences: int
    outputs: int
    table_width: int
    max_query_length: int
    is_decode: bool = False  # one token and one row of logits for every sequence, in order; padded to a bucket
    longest: int = 0  # tokens of the longest sequence of such a step, the new one included

    def of(self, name: str) -> int:
        """Numbers of a batch input."""
        if name == "block_tables":
            return self.sequences * self.table_width
        return {"token_ids": self.tokens, "positions": self.tokens, "slots": self.tokens,
                "output_rows": self.outputs}.get(name, self.sequences)

    def offsets(self) -> tuple[dict[str, int], int]:
        """Where each batch input begins, in ints, and where they end."""
        starts, end = {}, 0
        for name in BATCH_INPUTS:
            starts[name] = end
            end += -(-self.of(name) // ALIGNED_INTS) * ALIGNED_INTS
        return starts, end


class Inputs:
    """Device memory for the largest step, and twice the same in pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._turn = device, 0
        self._copied: list[Any] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]  # no types
        self._pinned: list[torch.Tensor]
        self._memory: torch.Tensor
        self._grow(1 << 14)

    def send(self, batch: Batch, sizes: Sizes) -> dict[str, int]:
        """Copy a batch, padded to `sizes`, on the current stream, and give the address of each array.

        Padding is of sequences without tokens, and of tokens whose keys and values go nowhere.
        """
        starts, end = sizes.offsets()
        if end > self._memory.shape[0]:
            self._grow(end)
        self._turn = 1 - self._turn
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        copied.synchronize()
        numbers = pinned.numpy()
        for name, start in starts.items():
            array = getattr(batch, name)
            into = numbers[start:start + sizes.of(name)]
            into.fill(-1 if name == "slots" else 0)
            if name == "block_tables":
                into.reshape(sizes.sequences, -1)[:array.shape[0], :array.shape[1]] = array
            else:
                into[:array.shape[0]] = array
        self._memory[:end].copy_(pinned[:end], non_blocking=True)
        copied.record()
        base = int(self._memory.data_ptr())
        return {name: base + 4 * start for name, start in starts.items()}

    @property
    def address(self) -> int:
        """Where they begin now: graphs that were recorded with another address are void."""
        return int(self._memory.data_ptr())

    def _grow(self, ints: int) -> None:
        torch.cuda.synchronize(self._device)  # a step may still read what is given up here
        self._pinned = [torch.zeros(ints, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._memory = torch.zeros(ints, dtype=torch.int32, device=self._device)


def sizes_of(batch: Batch) -> Sizes:
    """A step as it is."""
    return Sizes(batch.token_ids.shape[0], batch.query_starts.shape[0], batch.output_rows.shape[0],
                 batch.block_tables.shape[1], int(batch.query_lengths.max(initial=0)))


def decode_bucket(batch: Batch, buckets: tuple[int, ...], table_width: int) -> Sizes | None:
    """The padded step that a graph may stand for: one token and one row of logits for every sequence, in order."""
    count = batch.token_ids.shape[0]
    bucket = next((bucket for bucket in buckets if count <= bucket), None)
    if bucket is None or not (batch.query_lengths == 1).all() or batch.block_tables.shape[1] > table_width:
        return None
    if batch.output_rows.shape[0] != count or not (batch.output_rows == np.arange(count)).all():
        return None
    return Sizes(bucket, bucket, bucket, table_width, 1, is_decode=True, longest=int(batch.kv_lengths.max(initial=0)))
