"""Attention and rope_cache in the simulator against NumPy: what tests/gpu asks of a GPU, with fewer shapes."""

from __future__ import annotations

from typing import Any

import pytest

from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.testing.attention_cases import (
    ROPES,
    SHAPES,
    STORED_BOUNDS,
    Shape,
    attention_error,
    decode_error,
    rope_errors,
)

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
# Shares of keys that one block merges, prompts of several tiles, tokens after many, and single ones
MIXED = [(1, 65), (40, 40), (1, 600), (5, 130), (70, 600), (2, 3)]


@pytest.fixture(scope="module")
def simulated() -> Any:
    """Launches, and the target that is simulated."""
    from tensorwright.testing.simulator.launches import SimulatedLaunches

    return SimulatedLaunches, resolve_target("sm_90")


@pytest.mark.parametrize("name", ["float16 q and y", "wide window", "int8, window, bfloat16 q", "float8, heads of 256",
                                  "heads of 80"])
def test_attention_agrees_with_the_reference(name: str, simulated: Any) -> None:
    assert attention_error(SHAPES[name], MIXED, *simulated) < SHAPES[name].bound


@pytest.mark.parametrize(("lengths", "window"), [((700,), 0), ((129, 1, 300, 16, 530, 17, 0, 64), 0),
                                                 ((129, 1, 300, 16, 530, 17, 0, 64), 200)])
def test_attention_of_a_decode_step_agrees_with_the_reference(lengths: tuple[int, ...], window: int,
                                                              simulated: Any) -> None:
    shape = Shape("bfloat16", 4, 1, window=window)
    assert decode_error(shape, lengths, *simulated) < shape.bound


@pytest.mark.parametrize("shape", ROPES.values(), ids=ROPES.keys())
def test_rope_cache_agrees_with_the_reference(shape: Shape, simulated: Any) -> None:
    q, stored = rope_errors(shape, *simulated)
    assert q < shape.bound
    assert stored < STORED_BOUNDS[shape.dtype]
