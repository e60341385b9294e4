"""Random weights for sizing and benchmarks: seeded, quantised codes made directly. It reads nothing but a plan.

One random tile is written again and again from other starting points. Scales are such that a product of random codes
with unit activations has unit size, so hidden states stay finite over any number of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorwright.checkpoint.plan import Plan, PlannedWeight
from tensorwright.checkpoint.tensor_file import Array, TensorFileWriter
from tensorwright.quantization.scheme import FLOAT8

_TILE = 1 << 22
_STRIDE = 1_000_003  # a prime: tensors start at different places of the tile
_CODE_STD = {"uint8": (255 / 12) ** 0.5, "int8": ((255 ** 2 - 1) / 12) ** 0.5, FLOAT8.name: 1.0}  # int4's mean is −0.5


def write_dummy(plan: Plan, writer: TensorFileWriter, seed: int, report: Callable[[int, str], None]) -> None:
    """Fills one rank's file."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal(_TILE, np.float32)
    plain = normal.astype(plan.dtype)
    tiles = {"int8": random.integers(-127, 128, _TILE, np.int8), "uint8": random.integers(0, 256, _TILE, np.uint8),
             FLOAT8.name: normal.astype(FLOAT8)}
    for index, weight in enumerate(plan.weights):
        start = index * _STRIDE % _TILE
        if weight.scheme is not None:
            codes = weight.scheme.code_dtype.name
            report(_fill(writer, weight.spec.name, np.roll(tiles[codes], -start)), weight.spec.name)
            scale = weight.shape[1] ** -0.5 / _CODE_STD[codes]
            report(_fill(writer, weight.scale_name, np.full(_TILE, scale, np.float32).astype(plan.dtype)), "")
        else:
            report(_fill(writer, weight.spec.name, _plain(weight, np.roll(plain, -start), plan.dtype)),
                   weight.spec.name)


def _plain(weight: PlannedWeight, tile: Array, dtype: np.dtype[Any]) -> Array:
    """Norms are 1, biases 0, the table has unit numbers, and matrices unit rows."""
    kind = weight.spec.kind
    if kind in ("norm", "bias"):
        return np.full(weight.shape, 1 if kind == "norm" else 0, dtype)
    if kind == "embedding":
        return tile
    return np.asarray((tile.astype(np.float32) * np.float32(weight.shape[1] ** -0.5)).astype(dtype))


def _fill(writer: TensorFileWriter, name: str, tile: Array) -> int:
    """Writes a tensor as repetitions of the tile; gives its size in bytes."""
    size = writer.entries[name].num_bytes
    data = tile.reshape(-1).view(np.uint8)
    for offset in range(0, size, len(data)):
        writer.write_bytes(name, offset, data[:size - offset])
    return size
