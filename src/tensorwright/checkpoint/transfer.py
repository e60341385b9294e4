"""Moves weights from a model folder into checkpoint files, in row blocks on a few threads, quantising on the way.

It knows one block at a time, so memory stays at a few blocks per thread. It knows neither plans of folders nor JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from tensorwright.checkpoint.model_folder import ModelFolder
from tensorwright.checkpoint.plan import PlannedWeight
from tensorwright.checkpoint.sharding import Piece
from tensorwright.checkpoint.tensor_file import Array, TensorFileWriter
from tensorwright.errors import ModelError
from tensorwright.quantization.scheme import Caster, Quantizer

BLOCK_BYTES = 4 << 20
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
class Block:
    """Some rows of a source that go to one tensor of the rank."""

    weight: PlannedWeight
    piece: Piece
    rows: range


@dataclass(frozen=True)
class Transfer:
    """Where from, where to, and how: the parts that all weights of a rank share."""

    folder: ModelFolder
    writer: TensorFileWriter
    dtype: np.dtype[Any]
    quantizer: Quantizer
    caster: Caster
    num_threads: int

    def move(self, tensors: Iterable[tuple[PlannedWeight, tuple[Piece, ...]]],
             report: Callable[[int, str], None]) -> Iterator[tuple[PlannedWeight, Distance]]:
        """Moves tensors block by block, in order; gives each block's distance. Raises ModelError for bad numbers.

        A thread asks the system for the block that it will get after this one before it works on this one, so that
        reading overlaps with quantising.
        """
        blocks = [Block(weight, piece, rows) for weight, pieces in tensors for piece in pieces
                  for rows in self._rows(piece)]
        with ThreadPoolExecutor(self.num_threads) as pool:
            try:
                futures = [pool.submit(self._move, block, later)
                           for block, later in zip_longest(blocks, blocks[self.num_threads:])]
                for block, future in zip(blocks, futures, strict=True):
                    num_bytes, distance = future.result()
                    report(num_bytes, block.weight.spec.name)
                    yield block.weight, distance
            finally:
                pool.shutdown(cancel_futures=True)

    def _rows(self, piece: Piece) -> Iterator[range]:
        entry = self.folder.entry(piece.source.name)
        step = max(1, BLOCK_BYTES // max(1, entry.num_bytes // entry.shape[0]))
        for start in range(piece.rows.start, piece.rows.stop, step):
            yield range(start, min(start + step, piece.rows.stop))

    def _move(self, block: Block, later: Block | None) -> tuple[int, Distance]:
        weight, piece, rows = block.weight, block.piece, block.rows
        if later is not None:
            self.folder.prefetch_rows(later.piece.source.name, later.rows.start, later.rows.stop)
        values = self.folder.read_rows(piece.source.name, rows.start, rows.stop)
        if piece.columns is not None and len(piece.columns) != values.shape[1]:
            values = values[:, piece.columns.start:piece.columns.stop]
        target = piece.target_row + rows.start - piece.rows.start
        if weight.scheme is None:
            self.writer.write(weight.spec.name, self._cast(values, piece.source.name), target)
            return values.nbytes, Distance()
        result = self.quantizer(values, weight.scheme, self.dtype)
        if not result.is_finite:
            raise _not_finite(piece.source.name)
        if self.dtype == np.float16 and not np.isfinite(result.scales).all():
            raise _too_large(piece.source.name)
        self.writer.write(weight.spec.name, result.codes, target)
        self.writer.write(weight.scale_name, result.scales, target)
        return values.nbytes, Distance(result.squared_error, result.squared_norm)

    def _cast(self, values: Array, name: str) -> Array:
        try:
            return self.caster(values, self.dtype)
        except ValueError as cause:
            raise _not_finite(name) from cause
        except OverflowError as cause:
            raise _too_large(name) from cause


def _not_finite(name: str) -> ModelError:
    return ModelError(f"tensor {name} holds NaN or infinity, expected finite weights: the upload or the training is "
                      "damaged", mend="fetch the model again and compare its checksums")


def _too_large(name: str) -> ModelError:
    return ModelError(f"tensor {name} holds numbers beyond float16's largest, 65504", mend=_AS_BFLOAT16)
