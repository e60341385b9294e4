"""Attention and rope_cache on the GPU against NumPy: any mix of prompts, chunks and single tokens in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.kernels.cuda.attention import (
    Attention,
    RopeCache,
    attention_launch,
    decode_attention_launch,
    rope_launch,
)
from tensorwright.kernels.cuda.elementwise import NATIVE_TYPES
from tensorwright.kernels.cuda.launch import GpuSource, Size
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.program.program import Buffer, Program, Weight
from tensorwright.program.reference import run_op
from tensorwright.runtime.batch import Batch
from tensorwright.testing.native_ops import make_batch, one_op

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
                          "int8": np.int8, "float8_e4m3": ml_dtypes.float8_e4m3fn}
BOUNDS = {"float16": 2e-3, "bfloat16": 1.5e-2}  # of the largest number: roundings of q, of weights and of y


@dataclass(frozen=True)
class Shape:
    """Of an attention op; `numbers`: the type of q and y, float32 or 16-bit."""

    dtype: str = "float16"
    heads: int = 8
    kv_heads: int = 2
    size: int = 128
    block: int = 64
    window: int = 0
    numbers: str = "float32"

    @property
    def bound(self) -> float:
        return BOUNDS["bfloat16" if "bfloat16" in (self.dtype, self.numbers) else "float16"]


SHAPES = {
    "float16": Shape(), "bfloat16": Shape("bfloat16"), "float16 q and y": Shape(numbers="float16"),
    "bfloat16 q and y": Shape("bfloat16", numbers="bfloat16"), "window": Shape(window=100),
    "wide window": Shape("bfloat16", window=700), "int8": Shape("int8"), "float8": Shape("float8_e4m3"),
    "int8, window, bfloat16 q": Shape("int8", window=77, numbers="bfloat16"),
    "float8, heads of 256": Shape("float8_e4m3", 4, 2, 256, 32, numbers="float16"),
    "heads of 256": Shape("bfloat16", 4, 1, 256, 32), "heads of 64": Shape(heads=6, kv_heads=2, size=64, block=16),
    "heads of 80": Shape(heads=4, kv_heads=4, size=80, block=32), "heads of 96": Shape("int8", 4, 4, 96, 128),
    "heads of 16": Shape("int8", 4, 2, 16, 16), "one kv head": Shape(heads=20, kv_heads=1),
}
# (query_length, kv_length) of each sequence
BATCHES = {
    "decode": [(1, 1), (1, 17), (1, 64), (1, 257), (1, 130)],
    "prompts": [(300, 300), (1, 1), (33, 33), (64, 64)],
    "chunks": [(33, 1000), (150, 1299), (2, 3), (4, 700)],
    "mixed": [(1, 65), (40, 40), (1, 800), (5, 200), (3, 2000), (129, 600)],
    "one long": [(1, 5000)], "a few tokens after many": [(40, 4000)],
    "many": [(1, 1 + 97 * i % 700) for i in range(70)],
}


def attention_program(shape: Shape) -> Program:
    buffers = {name: Buffer(name, ("tokens", shape.heads * shape.size), "float32") for name in "qy"}
    buffers |= cache_buffers(shape)
    return one_op("attention", buffers, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_size=shape.size,
                  scale=shape.size**-0.5, window=shape.window, activation_bits=0)


def cache_buffers(shape: Shape) -> dict[str, Buffer]:
    dims = ("blocks", 2, shape.kv_heads, shape.block)
    found = {"kv": Buffer("kv", (*dims, shape.size), shape.dtype, "cache")}
    return found | ({"kv_scales": Buffer("kv_scales", dims, "float32", "cache")} if shape.dtype == "int8" else {})


def cache_arrays(shape: Shape, batch: Batch, blocks: int, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Slots that no token has are NaN where the type has such."""
    dims = (blocks, 2, shape.kv_heads, shape.block)
    if shape.dtype == "int8":
        return {"kv": random.integers(-127, 128, (*dims, shape.size)).astype(np.int8),
                "kv_scales": random.uniform(0.002, 0.03, dims).astype(np.float32)}
    kv = random.standard_normal((*dims, shape.size)).astype(np.float32)
    has_token = np.zeros((blocks, shape.block), bool)
    for table, length in zip(batch.block_tables, batch.kv_lengths, strict=True):
        at = np.arange(length)
        has_token[table[at // shape.block], at % shape.block] = True
    return {"kv": np.where(has_token[:, None, None, :, None], kv, np.nan).astype(DTYPES[shape.dtype])}


def on_gpu(array: NDArray[Any]) -> Any:
    import torch

    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole.view(np.uint8 if whole.dtype.itemsize == 1 else np.int16)
                            if whole.dtype.kind == "V" or whole.dtype in (DTYPES["bfloat16"], DTYPES["float8_e4m3"])
                            else whole).cuda()


def attention_error(shape: Shape, lengths: list[tuple[int, int]], seed: int = 0) -> float:
    """The largest difference from the reference, of its largest number."""
    from tensorwright.testing.gpu_ops import GpuLaunches

    random, program, target = np.random.default_rng(seed), attention_program(shape), resolve_target("native")
    batch, blocks = make_batch(lengths, shape.block, seed=seed)
    op, dtype = program.ops[0], DTYPES[shape.numbers]
    caches = cache_arrays(shape, batch, blocks, random)
    q = random.standard_normal((batch.token_ids.shape[0], shape.heads * shape.size)).astype(dtype)
    y = on_gpu(np.full(q.shape, np.nan, dtype))
    tactic = Attention().tactics(op, program, target)[0]
    source: Any = Attention().source(op, program, tactic)
    if shape.numbers != "float32":
        number = NATIVE_TYPES[shape.numbers]
        source = replace(source, launches=(attention_launch(op, program, tactic, numbers=(number, number)),))
    tensors = {"inputs.q": on_gpu(q), "outputs.y": y, **{f"inputs.{name}": on_gpu(a) for name, a in caches.items()}}
    launches = GpuLaunches(source, target, tensors, batch)
    for _ in range(2):  # counts of arrivals must be zero again
        launches.run()
    given = y.cpu().numpy()
    given = (given if shape.numbers == "float32" else given.view(dtype)).astype(np.float32)
    wanted = run_op(op, {**vars(batch), **caches, "q": q.astype(np.float32)}, {})["y"]
    return float(np.abs(given - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_agrees_with_the_reference(shape: Shape) -> None:
    for name, lengths in BATCHES.items():
        assert attention_error(shape, lengths) < shape.bound, name


def test_a_token_s_bits_do_not_depend_on_its_place_in_the_step() -> None:
    from tensorwright.testing.gpu_ops import GpuLaunches

    shape, random, target = Shape(), np.random.default_rng(1), resolve_target("native")
    program = attention_program(shape)
    op, tactic = program.ops[0], Attention().tactics(program.ops[0], program, target)[0]
    source: Any = Attention().source(op, program, tactic)
    long = make_batch([(1, 3000)], shape.block)
    caches = {name: on_gpu(array) for name, array in cache_arrays(shape, *long, random).items()}
    rows = []
    for copies in (1, 3, 4):
        batch = replace(long[0], **{name: np.repeat(array, copies, axis=0) for name, array in vars(long[0]).items()})
        batch = replace(batch, query_starts=np.arange(copies, dtype=np.int32))
        q = np.repeat(np.random.default_rng(2).standard_normal((1, 1024)).astype(np.float32), copies, axis=0)
        y = on_gpu(np.full(q.shape, np.nan, np.float32))
        tensors = {"inputs.q": on_gpu(q), "outputs.y": y, "inputs.kv": caches["kv"]}
        GpuLaunches(source, target, tensors, batch).run()
        rows += list(y.cpu().numpy())
    for row in rows:
        np.testing.assert_array_equal(row, rows[0])


DECODES = {
    "one": (1,), "one long": (5000,), "two": (700, 129), "eight": (129, 1, 300, 16, 2049, 17, 0, 4000),
    "sixteen": (*range(120, 136),), "thirty-two": (*range(1, 640, 20),), "sixty-four": (*range(1, 1281, 20),)}


def decode_error(shape: Shape, lengths: tuple[int, ...]) -> float:
    """The largest difference of tw::decode_attention from the reference, of its largest number. Length 0: padding."""
    from tensorwright.testing.gpu_ops import GpuLaunches

    tokens, random, target = len(lengths), np.random.default_rng(0), resolve_target("native")
    program = attention_program(shape)
    batch, blocks = make_batch([(1, max(1, length)) for length in lengths], shape.block)
    batch = replace(batch, kv_lengths=np.array(lengths, np.int32))
    caches = {name: np.nan_to_num(array) for name, array in cache_arrays(shape, batch, blocks, random).items()}
    q = random.standard_normal((tokens, shape.heads * shape.size)).astype(DTYPES[shape.dtype])
    chunks, y = max(2, 264 // (shape.kv_heads * tokens)), on_gpu(np.full(q.size, np.nan, DTYPES[shape.dtype]))
    launch = decode_attention_launch(program.ops[0], program, target, tokens, f"tw::InputOrder<{tokens}>", chunks, (
        "inputs.q", "inputs.kv", "inputs.block_tables", "inputs.kv_lengths", "outputs.y", "scratch.parts",
        "zeros.arrivals", "sizes.table_width"))
    source = GpuSource(("decode_attention.cuh",), "", (launch,), zeros=(("arrivals", 4 * tokens * shape.kv_heads),),
                       scratch=(("parts", Size(times=tokens * chunks * shape.heads * (shape.size + 2) * 4)),))
    tensors = {"inputs.q": on_gpu(q), "inputs.kv": on_gpu(caches["kv"]), "outputs.y": y}
    launches = GpuLaunches(source, target, tensors, batch)
    for _ in range(2):
        launches.run()
    width = min(tokens, 8)  # y lies as the next linear reads it: [inputs / 128][tokens / 8][4][8 tokens][32]
    given = y.cpu().numpy().view(DTYPES[shape.dtype]).reshape(-1, tokens // width, 4, width, 32)
    given = given.transpose(1, 3, 0, 2, 4).reshape(tokens, -1).astype(np.float32)
    batch = replace(batch, kv_lengths=np.maximum(batch.kv_lengths, 1))
    wanted = run_op(program.ops[0], {**vars(batch), **caches, "q": q.astype(np.float32)}, {})["y"]
    is_real = np.array(lengths) > 0
    return float(np.abs(given - wanted)[is_real].max() / np.abs(wanted[is_real]).max())


@pytest.mark.parametrize("lengths", DECODES.values(), ids=DECODES.keys())
@pytest.mark.parametrize("window", [0, 200])
def test_attention_of_a_decode_step_agrees_with_the_reference(lengths: tuple[int, ...], window: int) -> None:
    for shape in (Shape(window=window), Shape("bfloat16", 8, 8, block=16, window=window)):
        assert decode_error(shape, lengths) < shape.bound


ROPE = {"float32 into float16": Shape(size=36), "int8, head norms": Shape("int8", 3, 3, 20),
        "float16 into float16": Shape(numbers="float16"),
        "bfloat16 into float8": Shape("float8_e4m3", numbers="bfloat16"),
        "float32 into bfloat16": Shape("bfloat16", size=64)}


@pytest.mark.parametrize("shape", ROPE.values(), ids=ROPE.keys())
def test_rope_cache_agrees_with_the_reference(shape: Shape) -> None:
    from tensorwright.testing.gpu_ops import GpuLaunches

    random, target, has_norms = np.random.default_rng(0), resolve_target("native"), shape.dtype == "int8"
    batch, blocks = make_batch([(5, 70), (1, 300), (17, 17)], shape.block)
    batch = replace(batch, slots=np.where(np.arange(23) == 7, -1, batch.slots).astype(np.int32))
    all_heads, pairs = shape.heads + 2 * shape.kv_heads, shape.size // 2
    buffers = {"qkv": Buffer("qkv", ("tokens", all_heads * shape.size), "float32"),
               "q": Buffer("q", ("tokens", shape.heads * shape.size), "float32"), **cache_buffers(shape)}
    weights = {"inverse_frequencies": (10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)}
    if has_norms:
        weights |= {name: random.uniform(0.5, 2, shape.size).astype(np.float32) for name in ("q_norm", "k_norm")}
    held = {name: Weight(name, array.shape, "float32") for name, array in weights.items()}
    program = one_op("rope_cache", buffers, held, num_heads=shape.heads, num_kv_heads=shape.kv_heads,
                     head_size=shape.size, attention_factor=1.25, norm_epsilon=1e-6)
    op, dtype = program.ops[0], DTYPES[shape.numbers]
    qkv = random.standard_normal((23, all_heads * shape.size)).astype(dtype)
    caches = cache_arrays(shape, batch, blocks, random)
    q = on_gpu(np.full((23, shape.heads * shape.size), np.nan, dtype))
    number = {"float32": "float"}.get(shape.numbers) or NATIVE_TYPES[shape.numbers]
    source = GpuSource(("rope.cuh",), "", (rope_launch(op, program, numbers=(number, number)),))
    if shape.numbers == "float32":
        source = RopeCache().source(op, program, RopeCache().tactics(op, program, target)[0])  # type: ignore[assignment]
    tensors = {"inputs.qkv": on_gpu(qkv), "outputs.q": q, **{f"weights.{n}": on_gpu(a) for n, a in weights.items()},
               **{f"inputs.{name}": on_gpu(array) for name, array in caches.items()}}
    GpuLaunches(source, target, tensors, batch).run()
    wanted = run_op(op, {**vars(batch), **{n: a.copy() for n, a in caches.items()}, "qkv": qkv.astype(np.float32)},
                    weights)
    given = q.cpu().numpy()
    given = given if shape.numbers == "float32" else given.view(dtype)
    np.testing.assert_allclose(given.astype(np.float32), wanted["q"], atol=shape.bound * 4, rtol=shape.bound)
    slots = batch.slots[batch.slots >= 0]
    stored = [numbers_of(shape, {n: tensors[f"inputs.{n}"].cpu().numpy() for n in caches}, slots),
              numbers_of(shape, {n: wanted[n] for n in caches}, slots)]
    worst = {"float16": 2e-3, "bfloat16": 1.5e-2, "int8": 2e-2, "float8_e4m3": 0.13}[shape.dtype]
    np.testing.assert_allclose(*stored, atol=worst, rtol=worst)


def numbers_of(shape: Shape, caches: dict[str, NDArray[Any]], slots: NDArray[np.int32]) -> NDArray[np.float32]:
    """Keys and values of some slots."""
    blocks, offsets = slots // shape.block, slots % shape.block
    kv = caches["kv"] if shape.dtype in ("float16", "int8") else caches["kv"].view(DTYPES[shape.dtype])
    numbers = kv[blocks, :, :, offsets].astype(np.float32)
    scales = caches.get("kv_scales")
    return numbers if scales is None else numbers * scales[blocks, :, :, offsets][..., None]
