"""Attention and rope_cache against NumPy, on whatever runs their launches: shapes, batches and how far they are off.

Caches hold NaN where no token is and the type has such. Differences are of the largest number of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorwright.kernels.cuda.attention import Attention, attention_launch, decode_attention_launch, rope_launch
from tensorwright.kernels.cuda.elementwise import NATIVE_TYPES
from tensorwright.kernels.cuda.launch import GpuSource, Size
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Buffer, Program, Weight
from tensorwright.program.reference import run_op
from tensorwright.runtime.batch import Batch
from tensorwright.testing.native_ops import make_batch, one_op

Arrays = dict[str, NDArray[Any]]
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
                          "int8": np.int8, "float8_e4m3": ml_dtypes.float8_e4m3fn}
BOUNDS = {"float16": 2e-3, "bfloat16": 1.5e-2}  # roundings of q, of weights and of y
STORED_BOUNDS = {"float16": 2e-3, "bfloat16": 1.5e-2, "int8": 2e-2, "float8_e4m3": 0.13}
QUERY_LENGTHS = ((5, 70), (1, 300), (17, 17))  # of rope_cache's tokens; the eighth is not stored


class Launches(Protocol):
    """Launches over arrays by name: on a GPU, or in the simulator."""

    def run(self) -> None:
        """All of them."""

    def array(self, name: str) -> NDArray[Any]:
        """What is in an array now."""


Launcher = Callable[[GpuSource, Target, Mapping[str, NDArray[Any]], Batch], Launches]


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
        """The difference that roundings explain."""
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
BATCHES: dict[str, list[tuple[int, int]]] = {
    "decode": [(1, 1), (1, 17), (1, 64), (1, 257), (1, 130)],
    "prompts": [(300, 300), (1, 1), (33, 33), (64, 64)],
    "chunks": [(33, 1000), (150, 1299), (2, 3), (4, 700)],
    "mixed": [(1, 65), (40, 40), (1, 800), (5, 200), (3, 2000), (129, 600)],
    "one long": [(1, 5000)], "a few tokens after many": [(40, 4000)],
    "many": [(1, 1 + 97 * i % 700) for i in range(70)],
}
# Tokens of each sequence of a decode step; 0: padding
DECODES = {
    "one": (1,), "one long": (5000,), "two": (700, 129), "eight": (129, 1, 300, 16, 2049, 17, 0, 4000),
    "sixteen": (*range(120, 136),), "thirty-two": (*range(1, 640, 20),), "sixty-four": (*range(1, 1281, 20),)}
ROPES = {"float32 into float16": Shape(size=36), "int8, head norms": Shape("int8", 3, 3, 20),
         "float16 into float16": Shape(numbers="float16"),
         "bfloat16 into float8": Shape("float8_e4m3", numbers="bfloat16"),
         "float32 into bfloat16": Shape("bfloat16", size=64)}


def attention_error(shape: Shape, lengths: Sequence[tuple[int, int]], launcher: Launcher, target: Target,
                    seed: int = 0) -> float:
    """Of tw::attention, which runs twice: what blocks count must be zero again."""
    random, program = np.random.default_rng(seed), _attention(shape)
    batch, blocks = make_batch(lengths, shape.block, seed=seed)
    op, dtype = program.ops[0], DTYPES[shape.numbers]
    caches = _caches(shape, batch, blocks, random)
    q = random.standard_normal((batch.token_ids.shape[0], shape.heads * shape.size)).astype(dtype)
    given = {"inputs.q": q, "outputs.y": np.full(q.shape, np.nan, dtype), **_as_inputs(caches)}
    launches = launcher(attention_source(shape, target), target, given, batch)
    launches.run()
    launches.run()
    wanted = run_op(op, {**vars(batch), **caches, "q": q.astype(np.float32)}, {})["y"]
    return _error(launches.array("outputs.y"), wanted)


def attention_source(shape: Shape, target: Target) -> GpuSource:
    """What an engine would launch, for q and y of the shape's type."""
    program = _attention(shape)
    tactic = Attention().tactics(program.ops[0], program, target)[0]
    source = Attention().source(program.ops[0], program, tactic)
    assert isinstance(source, GpuSource)
    number = _native(shape.numbers)
    return replace(source, launches=(attention_launch(program.ops[0], program, tactic, numbers=(number, number)),))


def decode_error(shape: Shape, lengths: tuple[int, ...], launcher: Launcher, target: Target) -> float:
    """Of tw::decode_attention in steps of so many sequences."""
    tokens, random, dtype = len(lengths), np.random.default_rng(0), DTYPES[shape.dtype]
    program = _attention(shape)
    batch, blocks = make_batch([(1, max(1, length)) for length in lengths], shape.block)
    caches = {name: np.nan_to_num(array) for name, array in _caches(shape, batch, blocks, random).items()}
    q = random.standard_normal((tokens, shape.heads * shape.size)).astype(dtype)
    chunks = max(2, 264 // (shape.kv_heads * tokens))
    launch = decode_attention_launch(program.ops[0], program, target, tokens, f"tw::InputOrder<{tokens}>", chunks, (
        "inputs.q", "inputs.kv", "inputs.block_tables", "inputs.kv_lengths", "outputs.y", "scratch.parts",
        "zeros.arrivals", "sizes.table_width"))
    source = GpuSource(("decode_attention.cuh",), "", (launch,), zeros=(("arrivals", 4 * tokens * shape.kv_heads),),
                       scratch=(("parts", Size(times=tokens * chunks * shape.heads * (shape.size + 2) * 4)),))
    given = {"inputs.q": q, "outputs.y": np.full(q.size, np.nan, dtype), **_as_inputs(caches)}
    launches = launcher(source, target, given, replace(batch, kv_lengths=np.array(lengths, np.int32)))
    launches.run()
    launches.run()
    width = min(tokens, 8)  # y lies as the next linear reads it: [inputs / 128][tokens / 8][4][8 tokens][32]
    y = launches.array("outputs.y").reshape(-1, tokens // width, 4, width, 32).transpose(1, 3, 0, 2, 4)
    wanted = run_op(program.ops[0], {**vars(batch), **caches, "q": q.astype(np.float32)}, {})["y"]
    is_real = np.array(lengths) > 0
    return _error(y.reshape(tokens, -1)[is_real], wanted[is_real])


def rope_errors(shape: Shape, launcher: Launcher, target: Target) -> tuple[float, float]:
    """Of tw::rope_cache: q, and the keys and values that it stored."""
    random, heads, pairs = np.random.default_rng(0), shape.heads + 2 * shape.kv_heads, shape.size // 2
    batch, blocks = make_batch(QUERY_LENGTHS, shape.block)
    count, dtype = batch.token_ids.shape[0], DTYPES[shape.numbers]
    batch = replace(batch, slots=np.where(np.arange(count) == 7, -1, batch.slots).astype(np.int32))
    weights: Arrays = {"inverse_frequencies": (10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)}
    if shape.dtype == "int8":
        weights |= {name: random.uniform(0.5, 2, shape.size).astype(np.float32) for name in ("q_norm", "k_norm")}
    buffers = {"qkv": Buffer("qkv", ("tokens", heads * shape.size), "float32"),
               "q": Buffer("q", ("tokens", shape.heads * shape.size), "float32"), **_cache_buffers(shape)}
    program = one_op("rope_cache", buffers, {n: Weight(n, a.shape, "float32") for n, a in weights.items()},
                     num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_size=shape.size, attention_factor=1.25,
                     norm_epsilon=1e-6)
    number, op = _native(shape.numbers), program.ops[0]
    caches, qkv = _caches(shape, batch, blocks, random), random.standard_normal((count, heads * shape.size))
    qkv = qkv.astype(dtype)
    given = {"inputs.qkv": qkv, "outputs.q": np.full((count, shape.heads * shape.size), np.nan, dtype),
             **{f"weights.{name}": array for name, array in weights.items()},
             **_as_inputs({name: array.copy() for name, array in caches.items()})}
    source = GpuSource(("rope.cuh",), "", (rope_launch(op, program, numbers=(number, number)),))
    launches = launcher(source, target, given, batch)
    launches.run()
    wanted = run_op(op, {**vars(batch), **caches, "qkv": qkv.astype(np.float32)}, weights)
    slots = batch.slots[batch.slots >= 0]
    return (_error(launches.array("outputs.q"), wanted["q"]),
            _error(_stored({name: launches.array(f"inputs.{name}") for name in caches}, slots),
                   _stored({name: wanted[name] for name in caches}, slots)))


def _attention(shape: Shape) -> Program:
    buffers = {name: Buffer(name, ("tokens", shape.heads * shape.size), "float32") for name in "qy"}
    return one_op("attention", buffers | _cache_buffers(shape), num_heads=shape.heads, num_kv_heads=shape.kv_heads,
                  head_size=shape.size, scale=shape.size**-0.5, window=shape.window, activation_bits=0)


def _cache_buffers(shape: Shape) -> dict[str, Buffer]:
    dims = ("blocks", 2, shape.kv_heads, shape.block)
    found = {"kv": Buffer("kv", (*dims, shape.size), shape.dtype, "cache")}
    return found | ({"kv_scales": Buffer("kv_scales", dims, "float32", "cache")} if shape.dtype == "int8" else {})


def _caches(shape: Shape, batch: Batch, blocks: int, random: np.random.Generator) -> Arrays:
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


def _stored(caches: Arrays, slots: NDArray[np.int32]) -> NDArray[np.float32]:
    """Keys and values of some slots."""
    kv, scales = caches["kv"], caches.get("kv_scales")
    at = (slots // kv.shape[3], slice(None), slice(None), slots % kv.shape[3])
    numbers = kv[at].astype(np.float32)
    return numbers if scales is None else np.asarray(numbers * scales[at][..., None])


def _as_inputs(arrays: Arrays) -> Arrays:
    return {f"inputs.{name}": array for name, array in arrays.items()}


def _native(dtype: str) -> str:
    return NATIVE_TYPES.get(dtype, "float")


def _error(given: NDArray[Any], wanted: NDArray[Any]) -> float:
    """NaN where a number is."""
    difference = np.abs(given.astype(np.float32) - wanted.astype(np.float32))
    return float(difference.max() / np.abs(wanted.astype(np.float32)).max())
