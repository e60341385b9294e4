"""Whatever shares a step with a request, its tokens are those of the plain run: real engines, several schedules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorwright.engine.engine import Engine
from tensorwright.runtime.executor import CpuExecutor
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.testing.compare import prompt_batch
from tensorwright.testing.differential import compare_steps
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.tiny import TinyModel

GREEDY = SamplingParameters(max_tokens=20, end_ids=())
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(3, 320, length).tolist() for length in (3, 40, 17, 1, 30, 9, 22, 5)]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(Recipe(TinyModel("mistral", head_size=64)), tmp_path_factory.mktemp("float32"))


@pytest.fixture(scope="module")
def plain(engine_dir: Path) -> list[tuple[int, ...]]:
    """Each prompt alone in an engine of its own, in one piece, nothing reused."""
    tokens = []
    for prompt in PROMPTS:
        result = LLM(engine_dir, threads=1, block_reuse=False).generate([prompt], GREEDY)[0]
        tokens.append(result.sequences[0].token_ids)
    return tokens


def generated(llm: LLM, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    return [result.sequences[0].token_ids for result in llm.generate(prompts, GREEDY)]


def test_in_flight_batches(engine_dir: Path, plain: list[tuple[int, ...]]) -> None:
    assert generated(LLM(engine_dir), PROMPTS) == plain


def test_chunked_prefill(engine_dir: Path, plain: list[tuple[int, ...]], tmp_path: Path) -> None:
    """Other limits of the same engine: 16 tokens a step, so that prompts of 40 take three."""
    small = build_engine(Recipe(TinyModel("mistral", head_size=64), build={"max_num_tokens": 16}), tmp_path)
    assert generated(LLM(small), PROMPTS) == plain


def test_preemption(engine_dir: Path, plain: list[tuple[int, ...]]) -> None:
    """Four blocks of 16 tokens for four sequences of up to 60: someone has to go and come back."""
    llm = LLM(engine_dir, max_kv_tokens=64)
    assert generated(llm, PROMPTS) == plain
    assert llm.statistics()["preemptions"] > 0


def test_prefix_hits(engine_dir: Path) -> None:
    shared = PROMPTS[1]
    prompts = [shared + [7, 8], shared + [9], shared]
    alone = [generated(LLM(engine_dir, block_reuse=False), [prompt])[0] for prompt in prompts]
    llm = LLM(engine_dir)
    first = llm.generate(prompts[:1], GREEDY)[0]
    later = llm.generate(prompts[1:], GREEDY)
    assert first.num_cached_tokens == 0
    assert [result.num_cached_tokens for result in later] == [32, 32]
    assert [r.sequences[0].token_ids for r in (first, *later)] == alone


@pytest.mark.parametrize(("algorithm", "dtype", "kv"), [("W4A16", "float16", False), ("W8A16", "bfloat16", True)])
def test_near_ties_alone_may_differ_outside_float32(algorithm: str, dtype: str, kv: bool, tmp_path: Path) -> None:
    """The design's rule: forced onto the plain run's tokens, the choice differs only within twice the logit error."""
    recipe = Recipe(TinyModel("mistral"), dtype, algorithm, int8_kv_cache=kv)
    engine = Engine.open(build_engine(recipe, tmp_path))
    executor = CpuExecutor(engine, num_blocks=8, threads=2)
    tokens = PROMPTS[1] + [5, 6, 7]
    whole = executor.execute(prompt_batch(tokens, block_size=16)).copy()
    chunks = [executor.execute(prompt_batch(tokens[:end], block_size=16, cached=end - 1, first_block=4)).copy()
              for end in range(1, len(tokens) + 1)]
    pieces = np.concatenate(chunks)
    error = np.abs(pieces - whole).max()
    assert error < 0.05 * np.abs(whole).max()
    for row in np.flatnonzero(whole.argmax(axis=1) != pieces.argmax(axis=1)):
        best = np.sort(whole[row])[-2:]
        assert best[1] - best[0] <= 2 * error


@pytest.mark.parametrize("recipe", [
    Recipe(TinyModel("llama", attention_bias=True, mlp_bias=True)),
    Recipe(TinyModel("qwen3", head_size=24), "float16", "W4A16", int8_kv_cache=True, quantize_lm_head=True),
    Recipe(TinyModel("qwen2", sliding_window=9), "bfloat16", "W8A16"),
    Recipe(TinyModel("mistral"), "bfloat16", quantize_lm_head=True),
], ids=["llama float32", "qwen3 int4, int8 cache", "qwen2 int8, window", "mistral 16-bit, int8 lm_head"])
def test_every_buffer_agrees_with_the_reference_step_by_step(recipe: Recipe, tmp_path: Path) -> None:
    engine = Engine.open(build_engine(recipe, tmp_path))
    executor = CpuExecutor(engine, num_blocks=8, threads=2)
    bound = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[recipe.dtype]  # a cache holds one rounding of that
    for cached, end in ((0, 20), (20, 29), (29, 30)):
        batch = prompt_batch(PROMPTS[1][:end], block_size=16, cached=cached, first_block=3)
        worst = max(compare_steps(executor, batch), key=lambda difference: difference.error)
        assert worst.error < bound, worst


def test_a_full_batch_of_the_longest_sequences_runs_at_once(tmp_path: Path) -> None:
    """The default cache holds max_batch_size sequences of max_seq_len: the last does not wait for the first to end."""
    llm = LLM(build_engine(Recipe(TinyModel("mistral", head_size=64), build={"max_num_tokens": 16}), tmp_path),
              block_reuse=False)
    prompts = [RNG.integers(3, 320, 48).tolist() for _ in range(4)]
    llm.generate(prompts, SamplingParameters(max_tokens=16, end_ids=()))
    statistics = llm.statistics()
    assert statistics["preemptions"] == 0
    assert statistics["steps"] < 4 * 4 + 16 + 2  # after four prefills in chunks, 16 steps more
