"""The C++ quantiser gives the reference's bits."""

from __future__ import annotations

import contextlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from tensorwright.kernels.cpu.compile import compile_shared
from tensorwright.kernels.cpu.load import load_library
from tensorwright.kernels.cpu.targets import machine_features, resolve_target
from tensorwright.quantization.native import SOURCE, NativeQuantizer
from tensorwright.quantization.reference import cast, quantize
from tensorwright.quantization.scheme import Quantized, Scheme

DTYPES: list[np.dtype[Any]] = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
FLOAT8 = Scheme(8, is_float=True)
SCHEMES = [Scheme(4, 32), Scheme(4, 64), Scheme(4, 128), Scheme(4), Scheme(8), FLOAT8]


@pytest.fixture(scope="module", params=["native", "x86-64-v3", "portable"])
def native(request: pytest.FixtureRequest) -> NativeQuantizer:
    source, target = SOURCE.read_text(encoding="utf-8"), resolve_target(request.param)
    if not set(target.features) <= machine_features():
        pytest.skip(f"this machine cannot run {target.name}")
    return NativeQuantizer(load_library(compile_shared(source, target)))


def assert_same(ours: Quantized, reference: Quantized) -> None:
    assert ours.is_finite == reference.is_finite
    if reference.is_finite:
        np.testing.assert_array_equal(ours.codes.view(np.uint8), reference.codes.view(np.uint8))
        np.testing.assert_array_equal(ours.scales.view(np.uint8), reference.scales.view(np.uint8))
        assert ours.squared_norm == pytest.approx(reference.squared_norm, rel=1e-9)
        if np.isfinite(reference.squared_error):
            assert ours.squared_error == pytest.approx(reference.squared_error, rel=1e-6)


def hard_matrix(dtype: np.dtype[Any]) -> NDArray[Any]:
    """Heavy tails, zero rows, tiny and large rows, outliers, ties of both signs."""
    random = np.random.default_rng(7)
    weight = random.standard_t(3, (40, 384)).astype(np.float32) * np.float32(0.02)
    weight[3] = 0
    weight[4, :128] = 0
    weight[5] *= np.float32(1e-6)
    weight[6] *= np.float32(300)
    weight[7, 100] = 60000
    weight[8] = np.where(random.random(384) < 0.5, -0.25, 0.25)
    weight[9] = np.float32(0.125) * random.integers(-8, 9, 384)
    weight[10] = np.float32(6e-8)
    return weight.astype(dtype)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_same_bits(native: NativeQuantizer, source: np.dtype[Any], scales: np.dtype[Any], scheme: Scheme) -> None:
    weight = hard_matrix(source)
    assert_same(native(weight, scheme, scales), quantize(weight, scheme, scales))


finite_bits = arrays(np.uint16, (2, 64), elements=st.integers(0, 0xFFFF).filter(lambda b: b & 0x7C00 != 0x7C00))


@settings(deadline=None, max_examples=60)
@given(bits=finite_bits, scheme=st.sampled_from([Scheme(4, 32), Scheme(4), Scheme(8), FLOAT8]),
       scales=st.sampled_from(DTYPES))
def test_same_bits_on_any_float16(native: NativeQuantizer, bits: NDArray[Any], scheme: Scheme,
                                  scales: np.dtype[Any]) -> None:
    weight = bits.view(np.float16)
    assert_same(native(weight, scheme, scales), quantize(weight, scheme, scales))


def test_columns_of_a_wider_matrix_need_no_copy(native: NativeQuantizer) -> None:
    weight = hard_matrix(DTYPES[1])
    part = weight[:, 128:256]
    assert_same(native(part, Scheme(4, 64), DTYPES[1]), quantize(part, Scheme(4, 64), DTYPES[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", [Scheme(8), FLOAT8], ids=str)
def test_numbers_that_are_none_are_seen(native: NativeQuantizer, dtype: np.dtype[Any], bad: float,
                                        scheme: Scheme) -> None:
    weight = np.ones((4, 64), np.float32)
    weight[2, 63] = bad
    assert not native(weight.astype(dtype), scheme, DTYPES[0]).is_finite


def test_every_float8_and_every_tie_between_two(native: NativeQuantizer) -> None:
    """A row whose scale is 1 holds all float8 numbers, what lies half-way between neighbours, and a bit beside that."""
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[1:] + codes[:-1]) / 2
    row = np.concatenate([codes, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(448))])
    weight = np.concatenate([row, -row])[None]
    ours = native(weight, FLOAT8, DTYPES[0])
    assert ours.scales == 1
    assert_same(ours, quantize(weight, FLOAT8, DTYPES[0]))
    np.testing.assert_array_equal(ours.codes[0, :127].astype(np.float32), codes)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_casts_have_the_same_bits(native: NativeQuantizer, source: np.dtype[Any], target: np.dtype[Any]) -> None:
    weight = np.concatenate([hard_matrix(source).reshape(-1), np.arange(-70, 70).astype(source) * source.type(1e-8)])
    ours, expected = native.cast(weight[::3], target), cast(weight[::3].copy(), target)
    np.testing.assert_array_equal(ours.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(("values", "target", "error"), [
    ([1.0, np.nan], np.float16, ValueError), ([-np.inf, 1.0], np.float32, ValueError),
    ([1.0, 65519.9], np.float16, None), ([1.0, 65520.0], np.float16, OverflowError),
    ([-1e30], np.float16, OverflowError), ([1e30], ml_dtypes.bfloat16, None)])
def test_casts_refuse_the_same_numbers(native: NativeQuantizer, values: list[float], target: type,
                                       error: type[Exception] | None) -> None:
    for caster in (native.cast, cast):
        with contextlib.nullcontext() if error is None else pytest.raises(error):
            caster(np.array(values, np.float32), np.dtype(target))
