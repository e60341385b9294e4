"""A step's logits, on the device until somebody wants to see them. Most steps only want the greedy choice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tensorwright.runtime.batch import Floats, Ints


class DeviceLogits:
    """`runtime.batch.Logits`: rows [R, V] of float32, and the choice that the step has already made of each."""

    def __init__(self, values: torch.Tensor, chosen: Floats) -> None:
        """`chosen`: tw::Chosen on the host, [R, 4]: the token's bits, log probability, sum of the row."""
        self.values, self._chosen = values, chosen

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, V)."""
        return tuple(self.values.shape)

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Floats | DeviceLogits:
        """A row or a range of them on the host; rows of a list stay where they are."""
        if isinstance(rows, (int, slice)):
            return np.asarray(self.values[rows].cpu().numpy())
        chosen = self._chosen[list(rows)]
        return DeviceLogits(self.values[torch.tensor(list(rows), device=self.values.device)], chosen)

    def sum(self, *, axis: int) -> Floats:
        """Of each row: what tells whether all of it is finite. `axis` is 1."""
        return np.asarray(self._chosen[:, 2])

    @property
    def greedy(self) -> tuple[Ints, Floats]:
        """Tokens and log probabilities [R]."""
        return self._chosen[:, 0].copy().view(np.int32), self._chosen[:, 1].copy()

    def __array__(self, dtype: object = None, copy: bool | None = None) -> Floats:
        """All of them on the host."""
        return np.asarray(self.values.cpu().numpy())
