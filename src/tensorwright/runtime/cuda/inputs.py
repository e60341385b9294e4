"""A step's arrays on the device: packed into one pinned piece, sent in one copy. It knows the batch's layout only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tensorwright.program.ops import BATCH_INPUTS
from tensorwright.runtime.batch import Batch, Ints

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


class Staging:
    """Memory of the device, and pinned memory of the same size to fill it from.

    Once is enough: while one step runs its copy has ended, so that the next one can be packed.
    """

    def __init__(self, device: torch.device, ints: int) -> None:
        self._device = device
        self._copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch: no types
        self._pinned: torch.Tensor
        self._memory: torch.Tensor
        self._grow(ints)

    def begin(self, ints: int) -> Ints:
        """Pinned memory to be filled, with whatever stands there, once the last copy has ended."""
        self._copied.synchronize()
        if ints > self._memory.shape[0]:
            self._grow(ints)
        numbers: NDArray[np.int32] = self._pinned.numpy()
        return numbers[:ints]

    def send(self, ints: int) -> int:
        """Copy what was filled, on the current stream; gives its address on the device."""
        self._memory[:ints].copy_(self._pinned[:ints], non_blocking=True)
        self._copied.record()
        return self.address

    @property
    def address(self) -> int:
        """Where it begins on the device now."""
        return int(self._memory.data_ptr())

    def _grow(self, ints: int) -> None:
        torch.cuda.synchronize(self._device)  # a step may still read what is given up here
        self._pinned = torch.zeros(ints, dtype=torch.int32, pin_memory=True)
        self._memory = torch.zeros(ints, dtype=torch.int32, device=self._device)


class Inputs:
    """The batch's arrays of one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self._staging = Staging(device, 1 << 14)

    def send(self, batch: Batch, sizes: Sizes) -> dict[str, int]:
        """Copy a batch, padded to `sizes`, on the current stream, and give the address of each array.

        Padding is of sequences without tokens, and of tokens whose keys and values go nowhere.
        """
        starts, end = sizes.offsets()
        numbers = self._staging.begin(end)
        for name, start in starts.items():
            array = getattr(batch, name)
            into = numbers[start:start + sizes.of(name)]
            into.fill(-1 if name == "slots" else 0)
            if name == "block_tables":
                into.reshape(sizes.sequences, -1)[:array.shape[0], :array.shape[1]] = array
            else:
                into[:array.shape[0]] = array
        base = self._staging.send(end)
        return {name: base + 4 * start for name, start in starts.items()}

    @property
    def address(self) -> int:
        """Where they begin now: graphs that were recorded with another address are void."""
        return self._staging.address


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
