"""Steps of many tokens in the simulator: the stretch against the same steps op by op, and those against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorwright.engine.engine import Engine
from tensorwright.testing.differential import compare_steps
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.gpu_cases import MANY_TOKENS_RECIPES, cache_step, many_tokens_bound
from tensorwright.testing.native_ops import make_batch

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
BLOCK = 16
STEPS = (((9, 0),), ((3, 17), (20, 0), (1, 5)), ((66, 0), (1, 40)))  # (tokens, tokens before them) of each sequence


def engine_of(recipe: Recipe, folder: Path) -> Engine:
    build = {"target": "sm_90", "max_num_tokens": 256, "tokens_per_block": BLOCK, **recipe.build}
    return Engine.open(build_engine(Recipe(**{**vars(recipe), "build": build}), folder))


@pytest.mark.parametrize("recipe", MANY_TOKENS_RECIPES.values(), ids=MANY_TOKENS_RECIPES.keys())
def test_a_step_of_many_tokens_leaves_what_its_ops_leave(recipe: Recipe, tmp_path: Path) -> None:
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    engine, bound = engine_of(recipe, tmp_path), many_tokens_bound(recipe)
    fused, plain = (SimulatedExecutor(engine, num_blocks=16, stretches=stretches, seed=seed)
                    for seed, stretches in enumerate((True, False)))
    for sequences in STEPS:
        batch = make_batch([(n, n + past) for n, past in sequences], BLOCK, num_outputs=2)[0]
        assert fused.stretch(batch) is not None and plain.stretch(batch) is None
        given, wanted = (executor.execute(batch) for executor in (fused, plain))
        assert np.abs(given - wanted).max() < bound * np.abs(wanted).max(), sequences
        for cache in (buffer for buffer in engine.program.buffers if buffer.endswith(".kv")):
            of_ops = plain.buffer(cache).astype(np.float32)
            off = np.abs(fused.buffer(cache).astype(np.float32) - of_ops).max()
            assert off <= max(cache_step(recipe), bound * np.abs(of_ops).max()), (sequences, cache)


@pytest.mark.parametrize("name", ["float8 float16, float8 cache", "int4 bfloat16, multiplied in float8"])
def test_linears_that_round_to_float8_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    """Op by op, where both round the same numbers."""
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    executor = SimulatedExecutor(engine_of(MANY_TOKENS_RECIPES[name], tmp_path), num_blocks=16)
    batch = make_batch([(66, 66)], BLOCK, num_outputs=2)[0]
    worst = max(compare_steps(executor, batch), key=lambda difference: difference.error)
    assert worst.error < 4e-3, worst
