"""Every op but linear and attention against its reference, on every target, with one worker and with two."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.kernels.cpu.registry import find_kernel
from tensorwright.kernels.interface import Target, Tensor
from tensorwright.program.program import Buffer, Program, Weight
from tensorwright.testing.native_ops import NativeOps, make_batch, one_op

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
                          "int8": np.int8}
BLOCK = 8


def rows(name: str, columns: int, symbol: str = "tokens") -> Buffer:
    return Buffer(name, (symbol, columns), "float32")


def xy(columns: int) -> dict[str, Buffer]:
    return {"x": rows("x", columns), "y": rows("y", columns)}


def caches(kv_heads: int, size: int, dtype: str) -> dict[str, Buffer]:
    found = {"kv": Buffer("kv", ("blocks", 2, kv_heads, BLOCK, size), dtype, "cache")}
    if dtype == "int8":
        found["kv_scales"] = Buffer("kv_scales", ("blocks", 2, kv_heads, BLOCK), "float32", "cache")
    return found


def rope_cache(heads: int, kv_heads: int, size: int, pairs: int, dtype: str, norm: bool) -> Program:
    buffers = {"qkv": rows("qkv", (heads + 2 * kv_heads) * size), "q": rows("q", heads * size),
               **caches(kv_heads, size, dtype)}
    weights = {"inverse_frequencies": Weight("f", (pairs,), "float32")}
    if norm:
        weights |= {"q_norm": Weight("q", (size,), "bfloat16"), "k_norm": Weight("k", (size,), "float32")}
    return one_op("rope_cache", buffers, weights, num_heads=heads, num_kv_heads=kv_heads, head_size=size,
                  attention_factor=1.25, norm_epsilon=1e-6)


def cache_write(kv_heads: int, size: int, dtype: str) -> Program:
    buffers = {"k": rows("k", kv_heads * size), "v": rows("v", kv_heads * size), **caches(kv_heads, size, dtype)}
    return one_op("cache_write", buffers, num_kv_heads=kv_heads, head_size=size)


def with_y(name: str, columns: int, out: int, symbol: str = "tokens", **attributes: Any) -> Program:
    return one_op(name, {"x": rows("x", columns), "y": rows("y", out, symbol)}, **attributes)


PROGRAMS = {
    **{f"embedding-{dtype}": one_op("embedding", {"y": rows("y", 37)}, {"table": Weight("table", (7, 37), dtype)})
       for dtype in ("float32", "float16", "bfloat16")},
    "rms_norm": one_op("rms_norm", xy(100), {"weight": Weight("w", (100,), "float16")}, epsilon=1e-5, head_size=0),
    "rms_norm-heads": one_op("rms_norm", xy(60), {"weight": Weight("w", (20,), "bfloat16")}, epsilon=1e-6,
                             head_size=20),
    **{f"activation-{function}": one_op("activation", xy(37), function=function)
       for function in ("silu", "gelu", "gelu_tanh")},
    "add": one_op("add", {name: rows(name, 37) for name in "aby"}),
    "multiply": one_op("multiply", {name: rows(name, 37) for name in "aby"}),
    "slice": with_y("slice", 37, 20, start=11, size=20),
    "gather_rows": with_y("gather_rows", 37, 37, "outputs"),
    "all_reduce": one_op("all_reduce", xy(37)),
    "all_gather": one_op("all_gather", xy(37)),
    "rope": one_op("rope", xy(72), {"inverse_frequencies": Weight("f", (18,), "float32")}, head_size=36,
                   attention_factor=1.0),
    "rope-part": one_op("rope", xy(80), {"inverse_frequencies": Weight("f", (5,), "float32")}, head_size=20,
                        attention_factor=0.5),
    **{f"cache_write-{dtype}": cache_write(3, 20, dtype) for dtype in DTYPES},
    **{f"rope_cache-{dtype}": rope_cache(4, 2, 36, 18, dtype, False) for dtype in DTYPES},
    "rope_cache-norm": rope_cache(3, 3, 20, 8, "int8", True),
}
NAMES = tuple(PROGRAMS)


@pytest.fixture(scope="session")
def ops(target: Target) -> NativeOps:
    return NativeOps(list(PROGRAMS.values()), target)


def tensor(weight: Weight, random: np.random.Generator) -> Tensor:
    return Tensor(random.uniform(0.1, 1.5, weight.shape).astype(DTYPES[weight.dtype]))


def fill(buffer: Buffer, sizes: dict[str, int], random: np.random.Generator) -> NDArray[Any]:
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in buffer.shape)
    return (random.standard_normal(shape) * 3).astype(DTYPES[buffer.dtype])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_op_matches_the_reference(ops: NativeOps, name: str, workers: int) -> None:
    random = np.random.default_rng(3)
    program = PROGRAMS[name]
    batch, blocks = make_batch([(5, 5), (1, 40_000 if name.startswith("rope") else 20), (3, 9)], BLOCK, num_outputs=4)
    batch.slots[3] = -1
    sizes = {"tokens": batch.token_ids.shape[0], "outputs": 4, "blocks": blocks}
    arrays = {n: fill(b, sizes, random) for n, b in program.buffers.items() if b.kind != "input"}
    weights = {role: tensor(program.weights[held], random) for role, held in program.ops[0].weights.items()}
    copies = {n: array.copy() for n, array in arrays.items()}
    expected = {**copies, **ops.reference(NAMES.index(name), copies, weights, batch)}
    ops.run(NAMES.index(name), arrays, weights, batch, workers=workers)
    for output in program.ops[0].outputs:
        if arrays[output].dtype == np.int8:  # another last bit before rounding may give the neighbouring code
            assert np.abs(arrays[output].astype(int) - expected[output]).max() <= 1
            assert (arrays[output] != expected[output]).mean() < 0.01
        else:
            tolerance = {"float16": 1e-3, "bfloat16": 8e-3}.get(program.buffers[output].dtype, 2e-6)
            got, wanted = (array[output].astype(np.float32) for array in (arrays, expected))
            np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=2e-6)


def test_token_ids_outside_the_table_read_nothing(ops: NativeOps) -> None:
    batch, _ = make_batch([(3, 3)], BLOCK)
    batch.token_ids[:] = (6, 7, -1)
    y = np.full((3, 37), np.nan, np.float32)
    table = np.ones((7, 37), np.float32)
    ops.run(NAMES.index("embedding-float32"), {"y": y}, {"table": Tensor(table)}, batch)
    np.testing.assert_array_equal(y, np.repeat([[1.0], [0.0], [0.0]], 37, axis=1))


def test_activations_keep_nan_and_infinity(ops: NativeOps) -> None:
    batch, _ = make_batch([(1, 1)], BLOCK)
    x = np.zeros((1, 37), np.float32)
    x[0, :4] = np.nan, np.inf, -1e30, -100
    y = np.empty_like(x)
    ops.run(NAMES.index("activation-silu"), {"x": x, "y": y}, {}, batch)
    assert np.isnan(y[0, 0])
    assert y[0, 1] == np.inf
    assert np.abs(y[0, 2:]).max() < 1e-8


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_an_int8_cache_does_not_hide_nan_and_infinity(ops: NativeOps, broken: float) -> None:
    batch, blocks = make_batch([(2, 2)], BLOCK)
    k, v = np.ones((2, 2, 60), np.float32)
    k[0, 7] = broken
    arrays = {"k": k, "v": v, "kv": np.zeros((blocks, 2, 3, BLOCK, 20), np.int8),
              "kv_scales": np.zeros((blocks, 2, 3, BLOCK), np.float32)}
    ops.run(NAMES.index("cache_write-int8"), arrays, {}, batch)
    block, offset = divmod(int(batch.slots[0]), BLOCK)
    assert not np.isfinite(arrays["kv_scales"][block, 0, 0, offset])
    assert np.isfinite(np.delete(arrays["kv_scales"][block, 0, :, offset], 0)).all()
    assert np.isfinite(arrays["kv_scales"][block, 1]).all()


@pytest.mark.parametrize("name", [n for n in NAMES if PROGRAMS[n].weights])
def test_packing_loses_nothing(target: Target, name: str) -> None:
    program = PROGRAMS[name]
    op = program.ops[0]
    kernel = find_kernel(op, program, target)
    tactic = kernel.tactics(op, program, target)[0]
    for role, held in op.weights.items():
        given = tensor(program.weights[held], np.random.default_rng(0))
        packed = kernel.pack(op, program, role, given, tactic)
        assert packed.dtype == np.uint8
        assert packed.ndim == 1
        back = kernel.unpack(program.weights[held], packed, tactic.layout).values
        assert back.dtype == given.values.dtype
        np.testing.assert_array_equal(back, given.values)
