"""Moves weights from a model folder into checkpoint files, in row blocks on a few threads, quantising on the way.

It knows one block at a time, so memory stays at a few blocks per thread. It knows neither plans of folders nor JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, wait
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tensorwright.checkpoint.model_folder import ModelFolder
from tensorwright.checkpoint.plan import PlannedWeight
from tensorwright.checkpoint.sharding import Piece
from tensorwright.checkpoint.tensor_file import Array, TensorFileWriter
from tensorwright.errors import ModelError
from tensorwright.quantization.scheme import Quantizer

BLOCK_BYTES = 8 << 20
_EXPONENT_BITS = {np.dtype(np.float16): np.uint16(0x7C00), np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80)}
_AS_BFLOAT16 = "convert with --dtype bfloat16"


@dataclass(frozen=True)
class Distance:
    """Squared error and squared norm, summed over any number of blocks."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(self.squared_error + other.squared_error, self.squared_norm + other.squared_norm)

    @property
    def relative(self) -> float:
        """‖w − ŵ‖ / ‖w‖; 0 for a matrix of zeros."""
        return float((self.squared_error / self.squared_norm) ** 0.5) if self.squared_norm else 0.0


@dataclass(frozen=True)
class Transfer:
    """Where from, where to, and how: the parts that all weights of a rank share."""

    folder: ModelFolder
    writer: TensorFileWriter
    dtype: np.dtype[Any]
    quantizer: Quantizer
    pool: Executor

    def move(self, weight: PlannedWeight, pieces: tuple[Piece, ...], report: Callable[[int, str], None]) -> Distance:
        """One tensor of the rank, all its blocks in parallel. Raises ModelError naming a tensor with bad numbers."""
        futures = [self.pool.submit(self._block, weight, piece, rows)
                   for piece in pieces for rows in self._blocks(piece)]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        total = Distance()
        for future in futures:
            if future in done:
                num_bytes, distance = future.result()
                report(num_bytes, weight.spec.name)
                total += distance
        return total

    def _blocks(self, piece: Piece) -> Iterator[range]:
        entry = self.folder.entry(piece.source.name)
        step = max(1, BLOCK_BYTES // max(1, entry.num_bytes // entry.shape[0]))
        for start in range(piece.rows.start, piece.rows.stop, step):
            yield range(start, min(start + step, piece.rows.stop))

    def _block(self, weight: PlannedWeight, piece: Piece, rows: range) -> tuple[int, Distance]:
        values = self.folder.read_rows(piece.source.name, rows.start, rows.stop)
        if piece.columns is not None and len(piece.columns) != values.shape[1]:
            values = values[:, piece.columns.start:piece.columns.stop]
        target = piece.target_row + rows.start - piece.rows.start
        if weight.scheme is None:
            self.writer.write(weight.spec.name, cast(values, self.dtype, piece.source.name), target)
            return values.nbytes, Distance()
        result = self.quantizer(values, weight.scheme, self.dtype)
        if not result.is_finite:
            raise _not_finite(piece.source.name)
        if self.dtype == np.float16 and not np.isfinite(result.scales).all():
            raise _too_large(piece.source.name)
        self.writer.write(weight.spec.name, result.codes, target)
        self.writer.write(weight.scale_name, result.scales, target)
        return values.nbytes, Distance(result.squared_error, result.squared_norm)


def cast(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Values in another float dtype. Raises ModelError for NaN, infinity, and numbers beyond float16's range."""
    bits = _EXPONENT_BITS.get(values.dtype)
    if not np.isfinite(values).all() if bits is None else ((values.view(np.uint16) & bits) == bits).any():
        raise _not_finite(name)
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):  # looked for below
        result = values.astype(np.float32).astype(dtype)
    if np.isinf(result).any():
        raise _too_large(name)
    return np.asarray(result)


def _not_finite(name: str) -> ModelError:
    return ModelError(f"tensor {name} holds NaN or infinity, expected finite weights: the upload or the training is "
                      "damaged", mend="fetch the model again and compare its checksums")


def _too_large(name: str) -> ModelError:
    return ModelError(f"tensor {name} holds numbers beyond float16's largest, 65504", mend=_AS_BFLOAT16)
