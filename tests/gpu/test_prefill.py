"""Steps of many tokens at once on the GPU: the stretch of a decoder's layers against the same steps op by op."""

from __future__ import annotations

import numpy as np
import pytest

from tensorwright.engine.engine import Engine
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.gpu_cases import MANY_TOKENS, MANY_TOKENS_RECIPES, cache_step, many_tokens_bound
from tensorwright.testing.native_ops import make_batch

BLOCK = 16


@pytest.fixture(scope="module", params=MANY_TOKENS_RECIPES.values(), ids=MANY_TOKENS_RECIPES.keys())
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


@pytest.fixture(scope="module")
def engine(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    build = {"target": "native", "max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 512,
             "tokens_per_block": BLOCK, **recipe.build}
    return Engine.open(build_engine(Recipe(**{**vars(recipe), "build": build}), tmp_path_factory.mktemp("gpu")))


@pytest.mark.parametrize("outputs", [0, 1, 12])
def test_a_step_of_many_tokens_leaves_what_its_ops_leave(engine: Engine, recipe: Recipe, outputs: int) -> None:
    """Logits of any rows, and caches, over what earlier steps left in them."""
    from tensorwright.runtime.cuda.executor import CudaExecutor

    fused, plain = (CudaExecutor(engine, num_blocks=64, stretches=stretches) for stretches in (True, False))
    bound = many_tokens_bound(recipe)
    for name, sequences in MANY_TOKENS.items():
        earlier = [(past, past) for _, past in sequences if past]
        steps = [make_batch(earlier, BLOCK)[0]] if earlier else []
        steps.append(make_batch([(n, n + past) for n, past in sequences], BLOCK, num_outputs=outputs)[0])
        given, wanted = ([np.asarray(executor.execute(step)) for step in steps][-1] for executor in (fused, plain))
        assert not outputs or np.abs(given - wanted).max() < bound * np.abs(wanted).max(), name
        for cache in (buffer for buffer in engine.program.buffers if buffer.endswith(".kv")):
            of_ops = plain.buffer(cache).astype(np.float32)
            off = np.abs(fused.buffer(cache).astype(np.float32) - of_ops).max()
            assert off <= max(cache_step(recipe), bound * np.abs(of_ops).max()), (name, cache)


def test_a_step_repeats_its_bits(engine: Engine) -> None:
    from tensorwright.runtime.cuda.executor import CudaExecutor

    executor = CudaExecutor(engine, num_blocks=64)
    batch = make_batch([(150, 150), (1, 20), (70, 100)], BLOCK, num_outputs=3)[0]
    first = np.asarray(executor.execute(batch)).copy()
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(executor.execute(batch)), first)
