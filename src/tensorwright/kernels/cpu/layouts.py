"""Packed layouts of linear weights on CPUs, and the way back. It knows bytes, not ops or kernels.

A weight [N, K] is cut into panels of 64 outputs, the last one padded; a worker reads its panels as one stream.

- "dot64", for integer dot products: per panel, per block of inputs, 32-bit words [words][64]. A word holds 4 inputs
  of one output as bytes (int8, code + 128), or 8 inputs, 0 to 3 in the low and 4 to 7 in the high nibbles (int4).
- "input64", for float32 arithmetic: per panel [K][64] numbers; int8 codes + 128 likewise; int4 codes [K/2][64] bytes,
  low nibble = even input. Codes go in blocks here too.
- "float32": plain numbers, for biases and norms.

Where scales belong to groups, a block is a group and ends with its 64 scales; with one scale per output, blocks hold
128 inputs (fewer if K is less) and 64 scales end the panel. native/linear_integer.h and linear_float.h read the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tensorwright.kernels.interface import Array, Tensor
from tensorwright.program.program import Weight

PANEL = 64
DEFAULT_GROUP = 128
DTYPES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
                                           "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_Change = Callable[[Array], Array]

DOT = "dot64"
INPUT = "input64"
PLAIN = "float32"


@dataclass(frozen=True)
class Shape:
    """Where everything lies in a packed weight. Sizes are bytes unless named otherwise."""

    num_outputs: int
    num_inputs: int
    bits: int  # of a code, or of a number where there are no scales
    block_inputs: int
    scale_itemsize: int  # 0: no scales
    scales_blocks: bool  # else, if there are scales: one per output

    @property
    def num_panels(self) -> int:
        """Panels of 64 outputs."""
        return -(-self.num_outputs // PANEL)

    @property
    def num_blocks(self) -> int:
        """Blocks of inputs in a panel."""
        return -(-self.num_inputs // self.block_inputs)

    @property
    def code_bytes(self) -> int:
        """Codes or numbers of one block."""
        return PANEL * self.block_inputs * self.bits // 8

    @property
    def block_bytes(self) -> int:
        """One block, with its scales if it has any."""
        return self.code_bytes + (PANEL * self.scale_itemsize if self.scales_blocks else 0)

    @property
    def panel_bytes(self) -> int:
        """One panel, with the scales of its outputs if there are any."""
        return self.num_blocks * self.block_bytes + (0 if self.scales_blocks else PANEL * self.scale_itemsize)


def block_inputs(weight: Weight) -> int:
    """Inputs of a block: the group, or 128 (fewer if K is less, a multiple of 8); 1 for numbers without scales."""
    if not weight.is_quantized:
        return 1
    if weight.group_size > 0:
        return weight.group_size
    return min(DEFAULT_GROUP, -(-weight.shape[1] // 8) * 8)


def packed_shape(weight: Weight) -> Shape:
    """The packed form of a linear's weight; both layouts have the same sizes."""
    bits = {"int4": 4, "int8": 8}.get(weight.dtype) or DTYPES[weight.dtype].itemsize * 8
    itemsize = DTYPES[weight.scale_dtype].itemsize if weight.is_quantized else 0
    return Shape(weight.shape[0], weight.shape[1], bits, block_inputs(weight), itemsize,
                 weight.is_quantized and weight.group_size > 0)


def pack(weight: Weight, tensor: Tensor, layout: str) -> Array:
    """A weight's bytes in a layout, panel by panel: beside the result, memory for a few panels only."""
    if layout == PLAIN:
        return np.ascontiguousarray(tensor.values.astype(np.float32)).reshape(-1).view(np.uint8)
    shape = packed_shape(weight)
    packed = np.zeros((shape.num_panels, shape.panel_bytes), np.uint8)
    to_words = _words(weight, layout)[0]
    for panel, start in zip(packed, range(0, shape.num_outputs, PANEL), strict=True):
        rows = tensor.values[start:start + PANEL]
        blocks, scales = _views(shape, panel)
        rows = _padded(rows.view(np.uint8), shape) if weight.is_quantized else np.ascontiguousarray(rows)
        words = to_words(rows).reshape(len(rows), shape.num_blocks, -1)
        blocks.view(words.dtype).reshape(shape.num_blocks, -1, PANEL)[:, :, :len(rows)] = words.transpose(1, 2, 0)
        if tensor.scales is not None:
            part = np.ascontiguousarray(tensor.scales[start:start + PANEL]).view(np.uint8)
            part = part.reshape(len(rows), -1, shape.scale_itemsize)
            scales.reshape(scales.shape[0], PANEL, -1)[:, :len(rows)] = part.transpose(1, 0, 2)
    return packed.reshape(-1)


def unpack(weight: Weight, packed: Array, layout: str) -> Tensor:
    """The exact inverse of `pack`."""
    if layout == PLAIN:
        return Tensor(packed.view(np.float32).astype(DTYPES[weight.dtype]).reshape(weight.shape))
    shape = packed_shape(weight)
    outputs, inputs = weight.shape
    width = inputs * shape.bits // 8
    values = np.empty((outputs, width), np.uint8)
    num_scales = (shape.num_blocks if shape.scales_blocks else 1) if shape.scale_itemsize else 0
    all_scales = np.empty((outputs, num_scales, shape.scale_itemsize), np.uint8)
    from_words = _words(weight, layout)[1]
    for panel, start in zip(packed.reshape(shape.num_panels, -1), range(0, outputs, PANEL), strict=True):
        count = min(PANEL, outputs - start)
        blocks, scales = _views(shape, panel)
        words = blocks.view(_word(weight, layout)).reshape(shape.num_blocks, -1, PANEL)[:, :, :count]
        rows = np.ascontiguousarray(words.transpose(2, 0, 1)).reshape(count, -1)
        values[start:start + count] = from_words(rows).view(np.uint8)[:, :width]
        if num_scales:
            all_scales[start:start + count] = \
                scales.reshape(scales.shape[0], PANEL, -1)[:, :count].transpose(1, 0, 2)
    if not weight.is_quantized:
        return Tensor(values.view(DTYPES[weight.dtype]))
    numbers = all_scales.reshape(outputs, -1).view(DTYPES[weight.scale_dtype])
    return Tensor(values.view(np.int8) if weight.dtype == "int8" else values,
                  numbers if shape.scales_blocks else numbers.reshape(outputs))


def _views(shape: Shape, panel: Array) -> tuple[Array, Array]:
    """A panel's codes [blocks, bytes] and scales [blocks or 1, bytes], without copying."""
    body = shape.num_blocks * shape.block_bytes
    blocks = panel[:body].reshape(shape.num_blocks, shape.block_bytes)
    return (blocks[:, :shape.code_bytes],
            blocks[:, shape.code_bytes:] if shape.scales_blocks else panel[None, body:])


def _padded(codes: Array, shape: Shape) -> Array:
    """Rows of bytes of codes, with zero bytes up to whole blocks."""
    missing = shape.num_blocks * shape.block_inputs * shape.bits // 8 - codes.shape[1]
    return np.pad(codes, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(codes)


def _word(weight: Weight, layout: str) -> np.dtype[Any]:
    """The unit that lies side by side for the 64 outputs."""
    if weight.is_quantized:
        return np.dtype(np.uint32 if layout == DOT else np.uint8)
    return np.dtype(np.uint32 if weight.dtype == "float32" else np.uint16)


def _words_of_8(rows: Array) -> Array:
    """Bytes of two neighbouring int4 inputs -> words with inputs 0 to 3 low and 4 to 7 high: two swaps of a shuffle."""
    words: Array = rows.view(np.uint32).copy()
    _swap(words, 8, 0x0000FF00)
    _swap(words, 4, 0x00F000F0)
    return words


def _bytes_of_8(words: Array) -> Array:
    """The inverse: each swap undoes itself."""
    words = words.copy()
    _swap(words, 4, 0x00F000F0)
    _swap(words, 8, 0x0000FF00)
    return words


def _swap(words: Array, shift: int, mask: int) -> None:
    """Exchange the bits under `mask` with those `shift` above them, in place."""
    difference = (words ^ (words >> np.uint32(shift))) & np.uint32(mask)
    words ^= difference ^ (difference << np.uint32(shift))


def _flip_signs_to_words(rows: Array) -> Array:
    return (rows ^ np.uint8(128)).view(np.uint32)


def _flip_signs(rows: Array) -> Array:
    return rows.view(np.uint8) ^ np.uint8(128)


def _bytes(rows: Array) -> Array:
    return rows


def _words(weight: Weight, layout: str) -> tuple[_Change, _Change]:
    """Neutral rows to words, and back."""
    if not weight.is_quantized:
        return lambda rows: rows.view(_word(weight, layout)), _bytes
    return {("int4", DOT): (_words_of_8, _bytes_of_8), ("int8", DOT): (_flip_signs_to_words, _flip_signs),
            ("int4", INPUT): (_bytes, _bytes), ("int8", INPUT): (_flip_signs, _flip_signs)}[weight.dtype, layout]
