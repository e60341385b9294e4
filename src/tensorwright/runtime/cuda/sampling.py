"""How tokens are to be drawn, packed for the device: the structures of kernels/cuda/native/draw.cuh. It draws none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tensorwright.runtime.batch import SamplingRow
from tensorwright.runtime.cuda.inputs import Staging

SAMPLING = np.dtype([("row", np.int32), ("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32),
                     ("min_p", np.float32), ("uniform", np.uint32), ("repetition", np.float32),
                     ("presence", np.float32), ("frequency", np.float32), ("first", np.int32), ("biased", np.int32),
                     ("seen", np.int32)])
ADJUSTMENT = np.dtype([("token", np.int32), ("value", np.float32)])


class Samplings:
    """The settings of one draw after the other, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._staging = Staging(device, 1 << 10)

    def send(self, lines: Sequence[int], rows: Sequence[SamplingRow]) -> tuple[int, int]:
        """Copy them on the current stream; gives the addresses of tw::Sampling and tw::Adjustment.

        `lines`: the row of logits that each token is drawn from.
        """
        samplings, adjustments = pack(lines, rows)
        parts = [part.view(np.int32) for part in (samplings, adjustments)]
        size = sum(part.shape[0] for part in parts)
        np.concatenate(parts, out=self._staging.begin(size))
        address = self._staging.send(size)
        return address, address + samplings.nbytes


def pack(lines: Sequence[int], rows: Sequence[SamplingRow]) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Arrays of SAMPLING, one for each row, and of ADJUSTMENT: each row's biases, then its tokens with their counts."""
    samplings, start = np.zeros(len(rows), SAMPLING), 0
    pieces: list[NDArray[np.void]] = [np.zeros(0, ADJUSTMENT)]
    for index, (line, row) in enumerate(zip(lines, rows, strict=True)):
        samplings[index] = (line, row.temperature, min(row.top_k, 2**31 - 1), row.top_p, row.min_p,
                            int(row.uniform * 2.0**32), row.repetition_penalty, row.presence_penalty,
                            row.frequency_penalty, start, len(row.biased), len(row.seen))
        for tokens, values in ((row.biased, row.biases), (row.seen, row.counts)):
            if len(tokens):
                piece = np.zeros(len(tokens), ADJUSTMENT)
                piece["token"], piece["value"] = tokens, values
                pieces.append(piece)
                start += len(tokens)
    return samplings, np.concatenate(pieces)


def is_greedy(row: SamplingRow) -> bool:
    """Whether the token is simply that of the largest logit."""
    return row.temperature == 0 and not len(row.biased) and not len(row.seen)
