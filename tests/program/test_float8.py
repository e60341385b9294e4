"""float8_e4m3 in programs: what rounding means, and which linears the algorithm of the checkpoint gives it."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from tensorwright.builder.passes import run_passes
from tensorwright.builder.passes.context import Context
from tensorwright.program.printer import to_text
from tensorwright.program.program import Buffer, Program, Weight
from tensorwright.program.reference import round_to_bits, round_to_float8, run_op, to_float8, write_cache
from tensorwright.testing.native_ops import one_op


@given(arrays(np.float32, (3, 16), elements=st.floats(-1e4, 1e4, width=32)))
def test_a_row_is_rounded_to_three_bits_of_its_own_scale(x: NDArray[np.float32]) -> None:
    rounded = round_to_float8(x)
    largest = np.abs(x).max(axis=1, keepdims=True)
    off = np.abs(rounded - x)
    assert (off <= np.maximum(np.abs(x) / 16, largest / 448 * 2.0**-10) * 1.001 + 2.0**-100).all()
    np.testing.assert_allclose(np.abs(rounded).max(axis=1, keepdims=True), largest, rtol=1e-6, atol=2.0**-100)


@given(arrays(np.float32, (7,), elements=st.floats(2.0**-13, 448, width=32)))
def test_four_significant_bits_are_float8_s_whatever_power_of_two_scales_it(x: NDArray[np.float32]) -> None:
    rounded = round_to_bits(x, 4)
    power = np.float32(2.0 ** np.ceil(np.log2(x.max() / 448)))
    normal = x / power >= 2.0**-6  # smaller ones have fewer bits
    np.testing.assert_array_equal((to_float8(x / power).astype(np.float32) * power)[normal], rounded[normal])
    assert (np.abs(rounded - x) <= np.abs(x) / 16).all()


@pytest.mark.parametrize(("rows", "is_rounded"), [(2, False), (3, True)])
def test_a_linear_rounds_from_so_many_rows_on(rows: int, is_rounded: bool) -> None:
    buffers = {"x": Buffer("x", ("tokens", 32), "float32"), "y": Buffer("y", ("tokens", 8), "float32")}
    op = one_op("linear", buffers, {"weight": Weight("weight", (8, 32), "float8_e4m3", -1, "float16")},
                float8_rows=3).ops[0]
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((rows, 32), (8, 32)))
    y = run_op(op, {"x": x}, {"weight": weight})["y"]
    np.testing.assert_array_equal(y, (round_to_float8(x) if is_rounded else x) @ weight.T)
    assert np.allclose(y, x @ weight.T, atol=1e-6) != is_rounded


def test_a_float8_cache_holds_numbers_and_cuts_off_what_is_larger() -> None:
    kv = np.zeros((1, 2, 1, 4, 3), ml_dtypes.float8_e4m3fn)
    write_cache(np.array([[[1.06, -500, 1e6]]], np.float32), np.array([2]), kv, None, 1)
    assert kv[0, 1, 0, 2].astype(np.float32).tolist() == [1.0, -448.0, 448.0]


@pytest.mark.parametrize("lm_head", [False, True])
def test_the_algorithm_chooses_float8_for_the_layers_and_for_lm_head_if_asked(program: Program, lm_head: bool) -> None:
    context = Context("FP8_PER_CHANNEL_PER_TOKEN", quantize_lm_head=lm_head, activation_group=0, float8_rows=65)
    made = run_passes(program, context)
    linears = {op.name: op for op in made.ops if op.kind == "linear"}
    for name, op in linears.items():
        is_float8 = lm_head or name != "lm_head"
        assert (made.weights[op.weights["weight"]].dtype == "float8_e4m3") == is_float8
        assert op.attributes["float8_rows"] == (65 if is_float8 else 0)
    assert "weight=float8_e4m3[80, 24]" in to_text(made) and "float8_rows=65" in to_text(made)
    exact = run_passes(program, replace(context, float8_rows=0))
    assert not any(op.attributes.get("float8_rows") for op in exact.ops)
