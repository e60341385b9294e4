"""Random weights in the place of a checkpoint's, for benchmarks: `build --dummy_weights`. It reads no file.

Weights of one shape are one tensor, packed once, so that a model of many layers takes as long as one layer. Numbers are
such that hidden states keep their size over any number of layers.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import ml_dtypes
import numpy as np

from tensorwright.kernels.cpu.layouts import DTYPES
from tensorwright.kernels.interface import Array, Tensor
from tensorwright.program.program import Weight

TILE = 1 << 22  # random numbers; larger tensors repeat them
CODE_STD = {"int4": ((15**2 - 1) / 12) ** 0.5, "int8": ((255**2 - 1) / 12) ** 0.5,  # of uniform codes −7..7, −127..127
            "float8_e4m3": 100.0}  # of normal ones, as far from 448 as a row's largest


class DummySource:
    """`builder.pack.WeightSource`. Norms are 1, biases 0, the embedding has unit numbers and matrices unit rows."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        nibbles = random.integers(1, 16, (2, TILE), np.uint8)
        normal = random.standard_normal(TILE, np.float32)
        self._tiles: dict[str, Array] = {
            "int4": nibbles[0] | nibbles[1] << 4, "int8": random.integers(-127, 128, TILE, np.int8), "": normal,
            "float8_e4m3": np.clip(normal * np.float32(100), -448, 448).astype(ml_dtypes.float8_e4m3fn)}

    def alike(self, weight: Weight) -> Hashable:
        """Weights of one value have the same numbers."""
        return replace(weight, name=_kind(weight), parts=())

    def __call__(self, weight: Weight) -> Tensor:
        """The weight in the neutral layout."""
        kind = _kind(weight)
        if kind in ("norm", "bias"):
            return Tensor(np.full(weight.shape, float(kind == "norm"), DTYPES[weight.dtype]))
        rows, inputs = weight.shape
        if not weight.is_quantized:
            factor = np.float32(1 if kind == "embedding" else inputs**-0.5)
            return Tensor(np.resize((self._tiles[""] * factor).astype(DTYPES[weight.dtype]), weight.shape))
        codes = np.resize(self._tiles[weight.dtype], (rows, inputs // 2 if weight.dtype == "int4" else inputs))
        groups = inputs // weight.group_size if weight.group_size > 0 else 1
        scale = inputs**-0.5 / CODE_STD[weight.dtype]
        return Tensor(codes, np.full((rows, groups), scale, DTYPES[weight.scale_dtype]))


def _kind(weight: Weight) -> str:
    """By the names that models give: norm, bias, embedding or matrix."""
    if len(weight.shape) == 1:
        return "bias" if weight.name.endswith(".bias") else "norm"
    return "embedding" if weight.name.endswith("vocab_embedding") else "matrix"
