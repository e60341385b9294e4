"""Attention against the NumPy reference: cache dtypes, head sizes, GQA, windows, block sizes, batches, splits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.kernels.interface import Target
from tensorwright.program.program import Buffer, Program
from tensorwright.testing.native_ops import NativeOps, make_batch, one_op

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
                          "int8": np.int8}

# cache dtype, heads, kv heads, head size, block size, window
SHAPES = [
    ("float32", 4, 2, 20, 8, 0),
    ("float16", 4, 1, 36, 16, 5),
    ("bfloat16", 6, 2, 80, 16, 0),
    ("int8", 8, 2, 128, 64, 0),
    ("int8", 3, 3, 20, 8, 7),
    ("float32", 15, 1, 16, 8, 0),
    ("float16", 8, 8, 64, 64, 100),
    ("bfloat16", 16, 2, 64, 64, 0),
    ("int8", 4, 2, 64, 16, 0),
]

# (query_length, kv_length) of each sequence
BATCHES = {
    "decode": [(1, 1), (1, 17), (1, 64), (1, 130)],
    "prefill": [(70, 70)],
    "chunk": [(33, 100), (1, 99), (2, 3)],
    "mixed": [(1, 65), (40, 40), (1, 8), (5, 200)],
    "long": [(1, 1500), (1, 513), (1, 40)],
}


def attention_program(shape: tuple[str, int, int, int, int, int], bits: int = 0) -> Program:
    dtype, heads, kv_heads, size, block_size, window = shape
    buffers = {name: Buffer(name, ("tokens", heads * size), "float32") for name in "qy"}
    buffers["kv"] = Buffer("kv", ("blocks", 2, kv_heads, block_size, size), dtype, "cache")
    if dtype == "int8":
        buffers["kv_scales"] = Buffer("kv_scales", ("blocks", 2, kv_heads, block_size), "float32", "cache")
    return one_op("attention", buffers, num_heads=heads, num_kv_heads=kv_heads, head_size=size, scale=size**-0.5,
                  window=window, activation_bits=bits)


@pytest.fixture(scope="session")
def ops(target: Target) -> NativeOps:
    return NativeOps([attention_program(shape) for shape in SHAPES], target)


@pytest.fixture(scope="session")
def fixed_ops(target: Target) -> NativeOps:
    """With products in 16 bits."""
    if not any("vnni" in feature for feature in target.features):
        pytest.skip("the target's products are float32")
    return NativeOps([attention_program(shape, 16) for shape in SHAPES], target)


def cache_arrays(shape: tuple[str, int, int, int, int, int], blocks: int,
                 random: np.random.Generator) -> dict[str, NDArray[Any]]:
    dtype, _, kv_heads, size, block_size, _ = shape
    dims = (blocks, 2, kv_heads, block_size, size)
    if dtype == "int8":
        return {"kv": random.integers(-127, 128, dims).astype(np.int8),
                "kv_scales": random.uniform(0.002, 0.03, dims[:-1]).astype(np.float32)}
    return {"kv": random.standard_normal(dims).astype(DTYPES[dtype])}


def outputs(ops: NativeOps, index: int, batch_name: str, workers: int) -> tuple[NDArray[Any], NDArray[Any]]:
    shape = SHAPES[index]
    random = np.random.default_rng(index)
    batch, blocks = make_batch(BATCHES[batch_name], shape[4])
    arrays = cache_arrays(shape, blocks, random)
    arrays["q"] = random.standard_normal((batch.token_ids.shape[0], shape[1] * shape[3])).astype(np.float32)
    arrays["y"] = np.full_like(arrays["q"], np.nan)
    ops.run(index, arrays, {}, batch, workers=workers)
    return arrays["y"], ops.reference(index, arrays, {}, batch)["y"]


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=["-".join(map(str, shape)) for shape in SHAPES])
def test_attention_matches_the_reference(ops: NativeOps, index: int, batch_name: str) -> None:
    got, expected = outputs(ops, index, batch_name, 2)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=["-".join(map(str, shape)) for shape in SHAPES])
def test_products_in_16_bits_are_about_as_exact_as_a_float16_cache(fixed_ops: NativeOps, index: int,
                                                                    batch_name: str) -> None:
    got, expected = outputs(fixed_ops, index, batch_name, 2)
    bound = 5e-6 if SHAPES[index][0] == "float32" else 5e-4
    assert np.sqrt(np.mean((got - expected) ** 2)) < bound * np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * bound * np.abs(expected).max())


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=["-".join(map(str, shape)) for shape in SHAPES])
def test_bits_of_a_row_do_not_depend_on_the_rows_behind_it(fixed_ops: NativeOps, index: int) -> None:
    """A prompt whole, and its first 40 tokens alone: what comes later must not move a scale."""
    _, heads, _, size, block_size, _ = SHAPES[index]
    random = np.random.default_rng(index)
    whole, blocks = make_batch([(90, 90)], block_size)
    arrays = cache_arrays(SHAPES[index], blocks, random)
    rows = random.standard_normal((90, heads * size)).astype(np.float32)
    results = []
    for count in (90, 40):
        batch, _ = make_batch([(count, count)], block_size)
        batch = replace(batch, block_tables=whole.block_tables)
        own = {**arrays, "q": rows[:count].copy(), "y": np.zeros((count, heads * size), np.float32)}
        fixed_ops.run(index, own, {}, batch)
        results.append(own["y"][:40])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("batch_name", ["mixed", "long"])
@pytest.mark.parametrize("fixture", ["ops", "fixed_ops"])
def test_bits_do_not_depend_on_the_number_of_workers(request: pytest.FixtureRequest, target: Target, fixture: str,
                                                     batch_name: str) -> None:
    for index in range(len(SHAPES)):
        one, three = (outputs(request.getfixturevalue(fixture), index, batch_name, workers)[0] for workers in (1, 3))
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("lengths", [[(1, 90)], [(40, 90)]], ids=["decode", "prefill"])
def test_a_number_that_is_none_reaches_its_row_alone(ops: NativeOps, lengths: list[tuple[int, int]]) -> None:
    batch, blocks = make_batch(lengths, SHAPES[0][4])
    random = np.random.default_rng(2)
    arrays = cache_arrays(SHAPES[0], blocks, random)
    arrays["q"] = random.standard_normal((lengths[0][0], 80)).astype(np.float32)
    arrays["q"][0, 25] = np.nan  # of head 1
    arrays["y"] = np.zeros_like(arrays["q"])
    ops.run(0, arrays, {}, batch)
    expected = np.zeros(arrays["y"].shape, bool)
    expected[0, 20:40] = True
    np.testing.assert_array_equal(np.isnan(arrays["y"]), expected)


def test_positions_out_of_sight_are_never_read(ops: NativeOps) -> None:
    index = SHAPES.index(("float16", 4, 1, 36, 16, 5))
    batch, blocks = make_batch([(3, 90), (1, 50)], 16)
    random = np.random.default_rng(1)
    kv = np.full((blocks, 2, 1, 16, 36), np.nan, np.float16)
    for row, (query, length) in enumerate(((3, 90), (1, 50))):
        for position in range(length - query - 4, length):
            kv[batch.block_tables[row, position // 16], :, :, position % 16] = random.standard_normal((2, 1, 36))
    arrays = {"kv": kv, "q": random.standard_normal((4, 144)).astype(np.float32)}
    arrays["y"] = np.full_like(arrays["q"], np.nan)
    ops.run(index, arrays, {}, batch, workers=2)
    assert np.isfinite(arrays["y"]).all()
