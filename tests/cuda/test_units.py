"""Packed weights of GPU linears: the way back is exact, and numbers lie where the kernels look for them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tensorwright.builder.measure import random_tensor
from tensorwright.kernels.cuda import units
from tensorwright.kernels.interface import Tensor
from tensorwright.program.program import Weight


def tensor_of(weight: Weight, seed: int = 0) -> Tensor:
    random, (rows, inputs) = np.random.default_rng(seed), weight.shape
    if not weight.is_quantized:
        return Tensor(random.standard_normal(weight.shape).astype(units.DTYPES[weight.dtype]))
    codes = random.integers(0, 256, (rows, inputs // 2 if weight.dtype == "int4" else inputs)).astype(np.uint8)
    scales = random.standard_normal((rows, inputs // weight.group_size) if weight.group_size > 0 else rows)
    scales = scales.astype(units.DTYPES[weight.scale_dtype])
    if weight.dtype == "float8_e4m3":
        return Tensor((codes & 0xF7).view(ml_dtypes.float8_e4m3fn), scales)  # no NaN
    return Tensor(codes if weight.dtype == "int4" else codes.view(np.int8), scales)


@pytest.mark.parametrize(("dtype", "group", "shape", "layout"), [
    ("int4", 128, (1024, 256), units.ROPE), ("int4", 32, (50, 96), units.IN_ORDER),
    ("int8", -1, (96, 200), units.GATED), ("float8_e4m3", -1, (256, 200), units.ROPE),
    ("int4", -1, (40, 130), units.IN_ORDER), ("int8", 64, (2000, 64), units.IN_ORDER),
    ("float16", 0, (33, 65), units.IN_ORDER), ("bfloat16", 0, (64, 256), units.GATED)])
def test_unpacking_is_the_inverse_of_packing(dtype: str, group: int, shape: tuple[int, int], layout: str) -> None:
    weight = Weight("w", shape, dtype, group, "float16" if group else "")
    tensor = tensor_of(weight)
    back = units.unpack(weight, units.pack(weight, tensor, layout), layout)
    np.testing.assert_array_equal(back.values, tensor.values)
    if tensor.scales is not None:
        assert back.scales is not None
        np.testing.assert_array_equal(back.scales.reshape(tensor.scales.shape), tensor.scales)


def test_a_lane_finds_its_rows_and_inputs() -> None:
    """native/weights.cuh: piece (load, lane) of int4 codes: quarters 2 · load and 2 · load + 1 of rows g and g + 8."""
    weight = Weight("w", (16, 128), "int4", 128, "float16")
    tensor = tensor_of(weight)
    codes = np.stack((tensor.values & 15, tensor.values >> 4), axis=-1).reshape(16, 128)
    words = units.pack(weight, tensor, units.IN_ORDER)[:1024].view(np.uint32).reshape(2, 32, 4)
    for load, lane, place in ((0, 0, 0), (0, 13, 1), (1, 31, 2), (1, 6, 3)):
        quarter, row = 2 * load + place // 2, lane // 4 + 8 * (place % 2)
        eight = codes[row, 32 * quarter + 8 * (lane % 4):][:8]
        nibbles = [int(words[load, lane, place]) >> 4 * n & 15 for n in range(8)]
        assert nibbles == eight[[0, 2, 4, 6, 1, 3, 5, 7]].tolist()


@pytest.mark.parametrize(("dtype", "bias"), [("int8", 128), ("float8_e4m3", 0)])
def test_bytes_of_two_rows_share_a_piece(dtype: str, bias: int) -> None:
    """native/weights.cuh: piece (quarter, lane): eight inputs of row g, then of row g + 8."""
    weight = Weight("w", (16, 128), dtype, -1, "float16")
    tensor = tensor_of(weight)
    pieces = units.pack(weight, tensor, units.IN_ORDER)[:2048].reshape(4, 32, 2, 8)
    for quarter, lane, half in ((0, 0, 0), (2, 13, 1), (3, 31, 0)):
        eight = tensor.values[lane // 4 + 8 * half, 32 * quarter + 8 * (lane % 4):][:8].view(np.uint8)
        assert (pieces[quarter, lane, half] ^ bias).tolist() == eight.tolist()


def test_what_is_measured_holds_numbers() -> None:
    """Products of NaN are as fast as any, but say nothing of what a tactic leaves."""
    tensor = random_tensor(Weight("w", (64, 256), "float8_e4m3", -1, "float16"), np.random.default_rng(0))
    assert np.isfinite(tensor.values.astype(np.float32)).all()


@pytest.mark.parametrize("layout", [units.ROPE, units.GATED])
def test_pairs_lie_eight_rows_apart_in_a_tile(layout: str) -> None:
    order = units.row_order(layout, 512).reshape(-1, 2, 8)
    distance = 64 if layout == units.ROPE else 256
    assert (order[:, 1] - order[:, 0] == distance).all()
    assert sorted(order.reshape(-1).tolist()) == list(range(512))
