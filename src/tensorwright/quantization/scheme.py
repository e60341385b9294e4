"""What a quantised matrix is: the scheme, the result, and the neutral layout of int4 codes. It computes no scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
"""4 bits of exponent, 3 of mantissa, no infinities, up to 448 (Micikevicius et al., 2022)."""


@dataclass(frozen=True)
class Scheme:
    """Symmetric codes of 4 or 8 bits, one scale per `group_size` inputs of an output row, or per row (−1).

    Groups of int4 get their scale from a search; one scale per row is the row's largest magnitude over 8 (int4, as
    upstream does), 127 (int8) or 448 (`is_float`: codes of 8 bits are float8_e4m3 numbers).
    """

    bits: Literal[4, 8]
    group_size: int = -1
    is_float: bool = False

    @property
    def code_dtype(self) -> np.dtype[Any]:
        """Of stored codes."""
        return FLOAT8 if self.is_float else np.dtype(np.uint8 if self.bits == 4 else np.int8)

    def num_groups(self, columns: int) -> int:
        """Scales per row. Raises ValueError where the columns do not divide."""
        if self.group_size != -1 and columns % self.group_size:
            raise ValueError(f"{columns} columns are not a multiple of the group size {self.group_size}")
        return 1 if self.group_size == -1 else columns // self.group_size

    def code_columns(self, columns: int) -> int:
        """Bytes of codes per row."""
        return columns // 2 if self.bits == 4 else columns


@dataclass(frozen=True)
class Quantized:
    """A matrix in the neutral layout: uint8 [out, in/2], or int8 or float8_e4m3 [out, in]; scales [out, groups].

    `squared_error` and `squared_norm` are sums over the matrix, of its distance to the quantised one and of itself.
    `is_finite` is False when the source held NaN or infinity; the rest has no meaning then.
    """

    codes: Array
    scales: Array
    squared_error: float
    squared_norm: float
    is_finite: bool


Quantizer = Callable[[Array, Scheme, "np.dtype[Any]"], Quantized]
"""(matrix [out, in] of float32, float16 or bfloat16; scheme; dtype of the stored scales) -> Quantized."""

Caster = Callable[[Array, "np.dtype[Any]"], Array]
"""(floats, float dtype) -> the same numbers in it, rounded to nearest even; the array itself where it has that dtype.

Raises ValueError for NaN and infinity, OverflowError for finite numbers beyond the dtype's range.
"""


def pack_int4(codes: Array) -> Array:
    """Codes −8 … 7 [out, in] to bytes [out, in/2]: the even input in the low nibble, each as code + 8."""
    shifted = (codes + 8).astype(np.uint8)
    return np.asarray(shifted[:, 0::2] | (shifted[:, 1::2] << 4))


def unpack_int4(packed: Array) -> Array:
    """The inverse of `pack_int4`: int8 [out, in]."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    codes[:, 0::2] = (packed & 15).astype(np.int8) - 8
    codes[:, 1::2] = (packed >> 4).astype(np.int8) - 8
    return codes


def dequantize(codes: Array, scales: Array) -> Array:
    """The float32 matrix [out, in] that codes (packed when uint8) and scales [out, groups] stand for."""
    plain = unpack_int4(codes) if codes.dtype == np.uint8 else codes
    grouped = plain.astype(np.float32).reshape(*scales.shape, -1)
    return np.asarray((grouped * scales.astype(np.float32)[:, :, None]).reshape(plain.shape))
