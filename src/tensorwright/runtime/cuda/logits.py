"""A step's logits and what was drawn from them: on the device until somebody wants to see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tensorwright.runtime.batch import Drawn, Floats


class DeviceLogits:
    """`runtime.batch.Logits`: rows [R, V] of float32 that a stream writes."""

    def __init__(self, values: torch.Tensor, stream: Any, rows: Sequence[int] | None = None) -> None:
        """`rows`: of the values, in this order; None: all of them."""
        self._values, self._stream, self._rows = values, stream, rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, V)."""
        return len(self), int(self._values.shape[1])

    def __len__(self) -> int:
        return int(self._values.shape[0]) if self._rows is None else len(self._rows)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Floats | DeviceLogits:
        """A row or a range of them on the host, once they are there; rows of a list stay where they are."""
        if not isinstance(rows, (int, slice)):
            return DeviceLogits(self._values, self._stream, [self._row(row) for row in rows])
        with torch.cuda.stream(self._stream):
            return np.asarray(self.lines[rows].cpu().numpy())

    def __array__(self, dtype: object = None, copy: bool | None = None) -> Floats:
        """All of them on the host."""
        return np.asarray(self[:])

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the step, in their order."""
        return self._rows is None

    @property
    def lines(self) -> torch.Tensor:
        """The rows on the device."""
        return self._values if self._rows is None else self._values[torch.tensor(self._rows)]

    def _row(self, row: int) -> int:
        return row if self._rows is None else self._rows[row]


class Results:
    """What was drawn: tw::Chosen on the device, and twice on the host, for two draws that are not asked for yet."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.memory = torch.zeros((count, 4), dtype=torch.float32, device=device)
        self._pinned = [torch.zeros((count, 4), dtype=torch.float32, pin_memory=True) for _ in range(2)]
        self._copied: list[Any] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]  # no types
        self._turn = 0

    def put(self, tokens: torch.Tensor, log_probs: torch.Tensor, sums: torch.Tensor) -> None:
        """Replace the first of them: int64, float32, float32 [R]."""
        into = self.memory[:tokens.shape[0]]
        into[:, 0] = tokens.to(torch.int32).view(torch.float32)
        into[:, 1], into[:, 2] = log_probs, sums

    def send(self, count: int) -> LateDraw:
        """Copy the first of them to the host, on the current stream."""
        self._turn = 1 - self._turn
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        pinned[:count].copy_(self.memory[:count], non_blocking=True)
        copied.record()
        return LateDraw(pinned[:count], copied)


class LateDraw:
    """`runtime.batch.Draw`: pinned memory that a stream is still to fill."""

    def __init__(self, pinned: torch.Tensor, copied: Any) -> None:
        self._pinned, self._copied = pinned, copied

    def result(self) -> Drawn:
        """The tokens, once they are there."""
        self._copied.synchronize()
        chosen = self._pinned.numpy().copy()
        return Drawn(chosen[:, 0].copy().view(np.int32), chosen[:, 1], np.isfinite(chosen[:, 2]))
