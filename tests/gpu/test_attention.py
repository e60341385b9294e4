"""Attention and rope_cache on the GPU against NumPy: any mix of prompts, chunks and single tokens in a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.testing.attention_cases import (
    BATCHES,
    DECODES,
    ROPES,
    SHAPES,
    STORED_BOUNDS,
    Shape,
    attention_error,
    attention_source,
    decode_error,
    rope_errors,
)


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    """Launches, and this machine's target."""
    from tensorwright.testing.gpu_ops import GpuLaunches

    return GpuLaunches, resolve_target("native")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_agrees_with_the_reference(shape: Shape, on_gpu: Any) -> None:
    for name, lengths in BATCHES.items():
        assert attention_error(shape, lengths, *on_gpu) < shape.bound, name


@pytest.mark.parametrize("lengths", DECODES.values(), ids=DECODES.keys())
@pytest.mark.parametrize("window", [0, 200])
def test_attention_of_a_decode_step_agrees_with_the_reference(lengths: tuple[int, ...], window: int,
                                                              on_gpu: Any) -> None:
    for shape in (Shape(window=window), Shape("bfloat16", 8, 8, block=16, window=window)):
        assert decode_error(shape, lengths, *on_gpu) < shape.bound


@pytest.mark.parametrize("shape", ROPES.values(), ids=ROPES.keys())
def test_rope_cache_agrees_with_the_reference(shape: Shape, on_gpu: Any) -> None:
    q, stored = rope_errors(shape, *on_gpu)
    assert q < shape.bound
    assert stored < STORED_BOUNDS[shape.dtype]


def test_a_token_s_bits_do_not_depend_on_the_step(on_gpu: Any) -> None:
    """Its keys are shared out by its length, whatever else is in the step."""
    from tensorwright.testing.native_ops import make_batch

    launcher, target = on_gpu
    random, shape = np.random.default_rng(0), Shape()
    q = random.standard_normal((1, 1024)).astype(np.float32)
    kv = random.standard_normal((200, 2, 2, 64, 128)).astype(np.float16)
    rows = []
    for others in ([], [(1, 17), (1, 400)], [(1, 900)] * 3):
        batch = make_batch([*others, (1, 3000)], shape.block)[0]
        batch.block_tables[-1, :47] = 150 - np.arange(47)
        queries = np.concatenate([np.ones((len(others), 1024), np.float32), q])
        launches = launcher(attention_source(shape, target), target,
                            {"inputs.q": queries, "outputs.y": np.full_like(queries, np.nan), "inputs.kv": kv}, batch)
        launches.run()
        rows.append(launches.array("outputs.y")[-1])
    np.testing.assert_array_equal(rows, [rows[0]] * 3)
