"""Packed weights of GPU linears, and the way back. native/weights.cuh reads the same; it knows bytes, not ops.

A weight [N, K], padded with zeros to [16 n, 128 k], is n · k units of 16 rows and 128 inputs, each in the order that
the tensor core wants (native/weights.cuh draws it), followed by its scales; with one scale per row, all scales follow
the last unit. Rows are ordered so that what an epilogue combines lies 8 rows apart in a tile of 16:

- "units": as they come.
- "units.rope": numbers d and d + 64 of heads of 128.
- "units.gated": row i of the first half and row i of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorwright.kernels.interface import Array, Tensor
from tensorwright.program.program import Weight

UNIT_ROWS, UNIT_INPUTS, HEAD = 16, 128, 128
CODE_BYTES = {"int4": 1024, "int8": 2048, "float8_e4m3": 2048, "float16": 4096, "bfloat16": 4096}
BYTES = ("int8", "float8_e4m3")  # dtypes of one byte a code
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
IN_ORDER, ROPE, GATED = "units", "units.rope", "units.gated"
_BIAS = {"int8": 128, "float8_e4m3": 0}  # flips the sign bit: a stored int8 code is the code plus 128
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring inputs each nibble of a word holds, lowest first
_CHUNK_TILES = 64  # packed at a time, so that a large weight needs little memory beside itself


@dataclass(frozen=True)
class Shape:
    """Sizes of a packed weight, in bytes unless named otherwise."""

    weight: Weight

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.weight.shape[0] // UNIT_ROWS)

    @property
    def units(self) -> int:
        """Units of a tile."""
        return -(-self.weight.shape[1] // UNIT_INPUTS)

    @property
    def group(self) -> int:
        """Inputs that share a scale inside a unit; 0: units hold none."""
        return max(0, self.weight.group_size)

    @property
    def has_row_scales(self) -> bool:
        """Whether each row has one scale."""
        return self.weight.is_quantized and not self.group

    @property
    def code_bytes(self) -> int:
        """Codes of a unit."""
        return CODE_BYTES[self.weight.dtype]

    @property
    def unit_bytes(self) -> int:
        """A unit with its scales."""
        return self.code_bytes + (UNIT_INPUTS // self.group * UNIT_ROWS * 2 if self.group else 0)

    @property
    def bytes(self) -> int:
        """All units; row scales begin here."""
        return self.tiles * self.units * self.unit_bytes


def row_order(layout: str, rows: int) -> NDArray[np.int64]:
    """The natural row of each packed row."""
    packed = np.arange(rows)
    half, number = packed % UNIT_ROWS // 8, packed % 8
    if layout == ROPE:
        return np.asarray(packed // HEAD * HEAD + half * (HEAD // 2) + packed // UNIT_ROWS % 8 * 8 + number)
    if layout == GATED:
        return np.asarray(half * (rows // 2) + packed // UNIT_ROWS * 8 + number)
    return packed


def pack(weight: Weight, tensor: Tensor, layout: str) -> Array:
    """Units, then the scales of whole rows where there are any."""
    shape = Shape(weight)
    rows = weight.shape[0]
    order = row_order(layout, rows)
    packed = np.empty((shape.tiles, shape.units, shape.unit_bytes), np.uint8)
    scales = None if tensor.scales is None else np.ascontiguousarray(tensor.scales).view(np.uint16).reshape(rows, -1)
    for first in range(0, shape.tiles, _CHUNK_TILES):
        chosen = order[first * UNIT_ROWS:(first + _CHUNK_TILES) * UNIT_ROWS]
        tiles = min(_CHUNK_TILES, shape.tiles - first)
        codes = _padded(_codes(weight, tensor.values[chosen]), tiles, shape.units * UNIT_INPUTS, _zero(weight))
        into = packed[first:first + tiles]
        into[..., :shape.code_bytes] = _unit_codes(weight.dtype, codes)
        if scales is not None and shape.group:
            part = _padded(scales[chosen], tiles, shape.units * UNIT_INPUTS // shape.group, 0)
            into[..., shape.code_bytes:] = _unit_scales(part, shape.units)
    if scales is None or shape.group:
        return packed.reshape(-1)
    row_scales = _padded(scales[order], shape.tiles, 1, 0)
    return np.concatenate([packed.reshape(-1), row_scales.reshape(-1).view(np.uint8)])


def unpack(weight: Weight, packed: Array, layout: str) -> Tensor:
    """The exact inverse of `pack`."""
    shape = Shape(weight)
    rows, inputs = weight.shape
    units = packed[:shape.bytes].reshape(shape.tiles, shape.units, shape.unit_bytes)
    back = np.empty(rows, np.int64)
    back[row_order(layout, rows)] = np.arange(rows)
    codes = _codes_of_units(weight.dtype, np.ascontiguousarray(units[..., :shape.code_bytes]))[back, :inputs]
    if not weight.is_quantized:
        return Tensor(codes.view(DTYPES[weight.dtype]))
    if shape.group:
        words = np.ascontiguousarray(units[..., shape.code_bytes:]).view(np.uint16)
        cut = words.reshape(shape.tiles, shape.units, UNIT_INPUTS // shape.group, 8, 2).transpose(0, 4, 3, 1, 2)
        scales = cut.reshape(shape.tiles * UNIT_ROWS, -1)[back, :inputs // shape.group]
    else:
        scales = packed[shape.bytes:].view(np.uint16)[back]
    numbers = np.ascontiguousarray(scales).view(DTYPES[weight.scale_dtype])
    if weight.dtype in BYTES:
        return Tensor(codes.view(ml_dtypes.float8_e4m3fn if weight.dtype == "float8_e4m3" else np.int8), numbers)
    return Tensor(codes[:, 0::2] | codes[:, 1::2] << 4, numbers)


def _zero(weight: Weight) -> int:
    """The code of 0."""
    return 8 if weight.dtype == "int4" else 0


def _codes(weight: Weight, values: Array) -> Array:
    """One number an input: int4 as 0..15, or the bits of what is larger."""
    if weight.dtype == "int4":
        return np.asarray(np.stack((values & 15, values >> 4), axis=-1).reshape(values.shape[0], -1))
    return np.ascontiguousarray(values).view(np.uint8 if weight.dtype in BYTES else np.uint16)


def _padded(numbers: Array, tiles: int, columns: int, zero: int) -> Array:
    """Rows and columns up to whole units."""
    rows = tiles * UNIT_ROWS
    if numbers.shape == (rows, columns):
        return numbers
    result = np.full((rows, columns), zero, numbers.dtype)
    result[:numbers.shape[0], :numbers.shape[1]] = numbers
    return result


def _unit_codes(dtype: str, codes: Array) -> Array:
    """Bytes [tiles, units, bytes of codes] from one number an input."""
    rows, inputs = codes.shape
    if CODE_BYTES[dtype] == 4096:  # moved in pieces of eight numbers
        eights = np.ascontiguousarray(codes).view(np.complex128).reshape(rows // UNIT_ROWS, 2, 8, -1, 4, 4)
        order = np.ascontiguousarray(eights.transpose(0, 3, 4, 1, 2, 5))  # tile, unit, quarter, half, lane
        return order.view(np.uint8).reshape(rows // UNIT_ROWS, inputs // UNIT_INPUTS, -1)
    cut = codes.reshape(rows // UNIT_ROWS, 2, 8, inputs // UNIT_INPUTS, 4, 4, 8)  # tile, half, g, unit, quarter, t
    lanes = cut.transpose(0, 3, 4, 2, 5, 1, 6).reshape(rows // UNIT_ROWS, inputs // UNIT_INPUTS, 4, 32, 2, 8)
    if dtype == "int4":
        words = np.zeros(lanes.shape[:-1], np.uint32)
        for place, number in enumerate(_NIBBLES):
            words |= lanes[..., number].astype(np.uint32) << np.uint32(4 * place)
        pieces = words.reshape(*words.shape[:2], 2, 2, 32, 2).transpose(0, 1, 2, 4, 3, 5)
    else:
        pieces = lanes ^ np.uint8(_BIAS[dtype])
    return np.ascontiguousarray(pieces).view(np.uint8).reshape(rows // UNIT_ROWS, inputs // UNIT_INPUTS, -1)


def _codes_of_units(dtype: str, units: Array) -> Array:
    """The inverse of `_unit_codes`."""
    tiles, count = units.shape[:2]
    if dtype == "int4":
        words = units.view(np.uint32).reshape(tiles, count, 2, 32, 2, 2).transpose(0, 1, 2, 4, 3, 5)
        words = words.reshape(tiles, count, 4, 32, 2)
        lanes: Array = np.empty((*words.shape, 8), np.uint8)
        for place, number in enumerate(_NIBBLES):
            lanes[..., number] = words >> np.uint32(4 * place) & np.uint32(15)
    elif dtype in BYTES:
        lanes = (units ^ np.uint8(_BIAS[dtype])).reshape(tiles, count, 4, 32, 2, 8)
    else:
        lanes = units.view(np.uint16).reshape(tiles, count, 4, 2, 32, 8).transpose(0, 1, 2, 4, 3, 5)
    cut = lanes.reshape(tiles, count, 4, 8, 4, 2, 8).transpose(0, 5, 3, 1, 2, 4, 6)
    return cut.reshape(tiles * UNIT_ROWS, count * UNIT_INPUTS)


def _unit_scales(scales: Array, units: int) -> Array:
    """Bytes [tiles, units, bytes of scales]: of each group, rows g and g + 8 side by side."""
    tiles = scales.shape[0] // UNIT_ROWS
    order = scales.reshape(tiles, 2, 8, units, -1).transpose(0, 3, 4, 2, 1)
    return np.ascontiguousarray(order).view(np.uint8).reshape(tiles, units, -1)
