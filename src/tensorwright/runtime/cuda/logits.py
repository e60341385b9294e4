"""A step's logits and what was drawn from them: on the device until somebody wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tensorwright.runtime.batch import Drawn, Floats


class DeviceLogits:
    """`runtime.batch.Logits`: rows [R, V] of float32 that a stream writes."""

    def __init__(self, values: torch.Tensor, stream: Any, rows: Sequence[int] | None = None) -> None:
        """`rows`: of the values, in this order; None: all of them."""
        self.values, self._stream = values, stream
        self.rows = range(values.shape[0]) if rows is None else rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, V)."""
        return len(self), int(self.values.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Floats | DeviceLogits:
        """A row or a range of them on the host, once they are there; rows of a list stay where they are."""
        if not isinstance(rows, (int, slice)):
            return DeviceLogits(self.values, self._stream, [self.rows[row] for row in rows])
        wanted = self.rows[rows]
        with torch.cuda.stream(self._stream):
            return np.asarray(self.values[wanted if isinstance(wanted, int) else list(wanted)].cpu().numpy())

    def __array__(self, dtype: object = None, copy: bool | None = None) -> Floats:
        """All of them on the host."""
        return np.asarray(self[:])

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the step, in their order."""
        return isinstance(self.rows, range)


class Results:
    """What was chosen and drawn: tw::Chosen on the device, and what was drawn twice on the host, for two draws that are
    not asked for yet.
    """

    def __init__(self, device: torch.device, check: Callable[[], None]) -> None:
        """`check` raises if a step that has ended must not be believed."""
        self._device, self._turn, self._check = device, 0, check
        self._copied: list[Any] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]  # no types
        self._chosen = self._drawn = torch.zeros((0, 4), dtype=torch.float32, device=device)
        self._pinned: list[torch.Tensor] = []

    def grow(self, count: int) -> None:
        """Memory for so many rows. What was drawn last stays: the next step may be waiting for it."""
        before = self._drawn
        self._chosen, self._drawn = (torch.zeros((count, 4), dtype=torch.float32, device=self._device)
                                     for _ in range(2))
        self._drawn[:before.shape[0]].copy_(before[:count])
        self._pinned = [torch.zeros((count, 4), dtype=torch.float32, pin_memory=True) for _ in range(2)]

    @property
    def chosen(self) -> int:
        """Where the greedy choice of each row of logits is."""
        return int(self._chosen.data_ptr())

    @property
    def drawn(self) -> int:
        """Where the tokens are that were drawn last."""
        return int(self._drawn.data_ptr())

    def send(self, count: int) -> LateDraw:
        """Copy the first that were drawn to the host, on the current stream."""
        self._turn = 1 - self._turn
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        pinned[:count].copy_(self._drawn[:count], non_blocking=True)
        copied.record()
        return LateDraw(pinned[:count], copied, self._check)


class LateDraw:
    """`runtime.batch.Draw`: pinned memory that a stream is still to fill."""

    def __init__(self, pinned: torch.Tensor, copied: Any, check: Callable[[], None]) -> None:
        self._pinned, self._copied, self._check = pinned, copied, check

    def result(self) -> Drawn:
        """The tokens, once they are there."""
        try:
            self._copied.synchronize()
        finally:  # a driver that fails because another rank's memory is gone says less than the check
            self._check()
        chosen = self._pinned.numpy().copy()
        return Drawn(chosen[:, 0].copy().view(np.int32), chosen[:, 1], np.isfinite(chosen[:, 2]))
