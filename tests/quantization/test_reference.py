"""Properties of the NumPy quantiser and of the packed layout."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from tensorwright.quantization.reference import quantize
from tensorwright.quantization.scheme import Scheme, dequantize, pack_int4, unpack_int4

FLOAT16, FLOAT32, BFLOAT16 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
FLOAT8 = Scheme(8, is_float=True)
INTEGERS = (Scheme(4, 32), Scheme(4, 64), Scheme(4, 128), Scheme(4), Scheme(8))
SCHEMES = (*INTEGERS, FLOAT8)
finite = st.floats(-1e4, 1e4, width=32)
matrices = arrays(np.float32, st.tuples(st.integers(1, 4), st.sampled_from((128, 256))), elements=finite)


def error(weight: NDArray[Any], scheme: Scheme, scales: np.dtype[Any] = FLOAT32) -> float:
    result = quantize(weight, scheme, scales)
    return float(np.square(weight.astype(np.float64) - dequantize(result.codes, result.scales)).sum())


@given(arrays(np.int8, st.tuples(st.integers(1, 5), st.sampled_from((2, 32, 66))), elements=st.integers(-8, 7)))
def test_packing_loses_nothing(codes: NDArray[Any]) -> None:
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == (codes.shape[0], codes.shape[1] // 2)
    np.testing.assert_array_equal(unpack_int4(packed), codes)


def test_even_inputs_are_in_the_low_nibble() -> None:
    np.testing.assert_array_equal(pack_int4(np.array([[-8, 7, 0, 1]], np.int8)), [[0xF0, 0x98]])


@settings(deadline=None)
@given(matrices, st.sampled_from(INTEGERS))
def test_numbers_are_off_by_half_a_step_at_most_unless_cut_off_at_an_end(weight: NDArray[Any],
                                                                        scheme: Scheme) -> None:
    result = quantize(weight, scheme, FLOAT32)
    codes = unpack_int4(result.codes) if scheme.bits == 4 else result.codes
    steps = np.repeat(np.abs(result.scales), weight.shape[1] // result.scales.shape[1], axis=1)
    off = np.abs(weight - dequantize(result.codes, result.scales))
    inside = (codes > -8) & (codes < 7) if scheme.bits == 4 else np.ones_like(codes, bool)
    assert (off <= steps * 0.5001 + 1e-30)[inside].all()
    assert (np.abs(weight) >= off)[~inside].all()


@settings(deadline=None)
@given(matrices, st.sampled_from((FLOAT16, BFLOAT16, FLOAT32)))
def test_float8_is_off_by_a_sixteenth_at_most(weight: NDArray[Any], scales: np.dtype[Any]) -> None:
    """Half of the last place of three bits, or of the smallest numbers; a scale rounded down cuts off a bit more."""
    result = quantize(weight, FLOAT8, scales)
    assert np.isfinite(result.codes.astype(np.float32)).all()
    scale = result.scales.astype(np.float32)
    exact = np.abs(weight).max(axis=1, keepdims=True) / np.float32(448)
    cut = 448 * np.maximum(exact - scale, 0)
    off = np.abs(weight - dequantize(result.codes, result.scales))
    assert (off <= np.maximum(np.abs(weight) / 16, scale * 2.0**-10) * 1.0001 + cut + 1e-30).all()


@settings(deadline=None)
@given(arrays(np.uint8, (3, 64), elements=st.integers(0, 255).filter(lambda code: code & 127 != 127)))
def test_float8_matrices_come_back(codes: NDArray[Any]) -> None:
    """What is float8 times a power of two already, with 448 in each row, loses nothing."""
    codes[:, 0] = 126
    weight = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.125)
    result = quantize(weight, FLOAT8, FLOAT16)
    assert (result.scales == 0.125).all()
    np.testing.assert_array_equal(dequantize(result.codes, result.scales), weight)


@settings(deadline=None)
@given(matrices, st.floats(1, 1000, width=32))
def test_a_larger_row_has_no_smaller_scale(weight: NDArray[Any], factor: float) -> None:
    for scheme in (Scheme(8), FLOAT8):
        small, large = (quantize(w, scheme, FLOAT32).scales for w in (weight, weight * np.float32(factor)))
        assert (large >= small).all()


@settings(deadline=None)
@given(matrices, st.sampled_from((32, 64, 128)))
def test_search_is_never_worse_than_plain_rounding(weight: NDArray[Any], group: int) -> None:
    found = error(weight, Scheme(4, group))
    groups = weight.reshape(-1, group).astype(np.float64)
    for divisor in (7, 8):
        largest = np.abs(groups).max(-1, keepdims=True)
        scale = np.where(largest < 2.0 ** -100, 1, largest / divisor)
        plain = np.square(groups - np.clip(np.rint(groups / scale), -8, 7) * scale).sum()
        assert found <= plain * (1 + 1e-5) + 1e-30


@settings(deadline=None)
@given(matrices, st.sampled_from(SCHEMES))
def test_reported_error_and_norm_are_the_measured_ones(weight: NDArray[Any], scheme: Scheme) -> None:
    result = quantize(weight, scheme, FLOAT32)
    assert result.squared_error == pytest.approx(error(weight, scheme), rel=1e-4, abs=1e-20)
    assert result.squared_norm == pytest.approx(float(np.square(weight.astype(np.float64)).sum()), rel=1e-6, abs=1e-20)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scales", [FLOAT16, BFLOAT16, FLOAT32])
def test_normal_weights_keep_the_error_that_their_bits_allow(scheme: Scheme, scales: np.dtype[Any]) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256), np.float32) * np.float32(0.02)
    result = quantize(weight, scheme, scales)
    relative = (result.squared_error / result.squared_norm) ** 0.5
    assert result.scales.dtype == scales
    assert relative < {  # plain rounding of groups of 128 has 0.117
        (4, 32): 0.083, (4, 64): 0.091, (4, 128): 0.098, (4, -1): 0.113,
                       (8, -1): 0.0265 if scheme.is_float else 0.0075}[scheme.bits, scheme.group_size]


def test_int8_codes_stay_symmetric() -> None:
    weight = np.random.default_rng(1).standard_normal((32, 128), np.float32)
    codes = quantize(weight, Scheme(8), FLOAT16).codes
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    assert np.abs(codes).max() == 127


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    result = quantize(np.zeros((2, 128), np.float32), scheme, FLOAT16)
    assert not dequantize(result.codes, result.scales).any()
    assert not np.signbit(result.scales.astype(np.float32)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_seen(bad: float) -> None:
    weight = np.ones((4, 128), np.float32)
    weight[3, 7] = bad
    assert not quantize(weight, Scheme(4, 32), FLOAT32).is_finite
    assert not quantize(weight, FLOAT8, FLOAT32).is_finite


def test_scales_beyond_float16_show_as_infinite() -> None:
    result = quantize(np.full((1, 128), 1e7, np.float32), Scheme(4), FLOAT16)
    assert np.isinf(result.scales).all()


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="96 columns"):
        quantize(np.ones((1, 96), np.float32), Scheme(4, 64), FLOAT32)
