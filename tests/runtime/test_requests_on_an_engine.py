"""Forked sequences, logits, sampling and threads on a real engine: what fakes cannot show."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tensorwright.runtime.async_llm import AsyncLLM
from tensorwright.runtime.batch import SamplingRow
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.results import Update
from tensorwright.runtime.sampling import choose, log_softmax
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.tiny import TinyModel

PROMPT = np.random.default_rng(5).integers(3, 320, 21).tolist()
LIMITS = {"max_beam_width": 4, "gather_context_logits": True, "gather_generation_logits": True}


@pytest.fixture(scope="module", params=["float32", "int8_cache"])
def engine_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "float32":
        recipe = Recipe(TinyModel("mistral", head_size=64), build=LIMITS)
    else:
        recipe = Recipe(TinyModel("mistral", head_size=64), "float16", int8_kv_cache=True, build=LIMITS)
    return build_engine(recipe, tmp_path_factory.mktemp(request.param))


def test_logits_of_prompt_and_output_are_those_of_one_pass(engine_dir: Path) -> None:
    llm = LLM(engine_dir, threads=2)
    asked = SamplingParameters(max_tokens=8, end_ids=(), return_context_logits=True, return_generation_logits=True,
                               return_log_probs=True)
    (result,) = llm.generate([PROMPT], asked)
    (sequence,) = result.sequences
    whole = SamplingParameters(max_tokens=1, end_ids=(), return_context_logits=True)
    (again,) = llm.generate([PROMPT + list(sequence.token_ids)], whole)
    got = np.concatenate([result.context_logits[:-1], sequence.generation_logits])
    np.testing.assert_allclose(got, again.context_logits[:-1], rtol=0, atol=2e-2 * np.abs(got).max())
    rows = zip(sequence.generation_logits, sequence.token_ids, strict=True)
    expected = [log_softmax(row)[token] for row, token in rows]
    assert sequence.log_probs == pytest.approx(expected, abs=1e-4)


def test_a_huge_top_k_is_no_limit(engine_dir: Path) -> None:
    llm = LLM(engine_dir, threads=2)
    huge, none = (SamplingParameters(max_tokens=12, end_ids=(), temperature=5.0, top_k=top_k)
                  for top_k in (2**32 + 1, 2**31 - 1))
    first, second = llm.generate([PROMPT, PROMPT], [huge, none])
    assert first.sequences == second.sequences


@pytest.mark.parametrize("how", [{"beam_width": 4}, {"num_return_sequences": 4, "temperature": 1.0, "seed": 9}])
def test_sequences_that_fork_have_their_own_context(engine_dir: Path, how: dict[str, float]) -> None:
    """Each sequence's log probabilities are those of its tokens computed alone, so no fork saw another's blocks."""
    llm = LLM(engine_dir, threads=2)
    asked = SamplingParameters(max_tokens=16, end_ids=(), return_log_probs=True, **how)
    (result,) = llm.generate([PROMPT], asked)
    assert len({sequence.token_ids for sequence in result.sequences}) == 4
    whole = SamplingParameters(max_tokens=1, end_ids=(), return_context_logits=True)
    for sequence in result.sequences:
        (alone,) = LLM(engine_dir, threads=2).generate([PROMPT + list(sequence.token_ids)], whole)
        rows = log_softmax(alone.context_logits[len(PROMPT) - 1 : -1])
        expected = rows[np.arange(16), list(sequence.token_ids)]
        np.testing.assert_allclose(sequence.log_probs, expected, rtol=0, atol=5e-2)


def test_the_engine_s_sampler_is_the_reference(engine_dir: Path) -> None:
    executor = LLM(engine_dir, threads=2)._loop.executor
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((200, executor.vocab_size)) * 3).astype(np.float32)
    rows = []
    for index in range(200):
        seen = rng.choice(executor.vocab_size, 9, replace=False).astype(np.int32)
        rows.append(SamplingRow(
            temperature=float(rng.choice([0.0, 0.5, 1.0, 2.0])), top_k=int(rng.choice([0, 1, 7, 50])),
            top_p=float(rng.choice([1.0, 0.9, 0.3])), min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.4])), presence_penalty=0.3 * (index % 2),
            frequency_penalty=0.2 * (index % 3), uniform=float(rng.integers(0, 1 << 24)) * 2.0**-24,
            seen=seen, counts=rng.integers(0, 3, 9).astype(np.int32),
            biased=(3, 4), biases=(float("-inf"), 1.5)))
    drawn = executor.sample(logits, rows).result()
    tokens, log_probs = drawn.tokens, drawn.log_probs
    expected_tokens, expected_log_probs = choose(logits, rows)
    same = tokens == expected_tokens  # a number on the border of two tokens may fall on either side in float32
    assert same.mean() >= 0.98
    np.testing.assert_allclose(log_probs[same], expected_log_probs[same], atol=1e-4)


def test_threads_get_the_answers_of_the_plain_run(engine_dir: Path) -> None:
    asked = SamplingParameters(max_tokens=10, end_ids=())
    prompts = [PROMPT[start:] for start in range(6)]
    served = AsyncLLM(engine_dir, threads=2)
    updates: dict[int, Update] = {}
    finished = threading.Semaphore(0)

    def keep(update: Update) -> None:
        if update.finished:
            updates[update.request_id] = update
            finished.release()

    requests = [served.submit(prompt, asked, keep) for prompt in prompts]
    for _ in prompts:
        assert finished.acquire(timeout=30)
    served.close()
    plain = LLM(engine_dir, threads=2, block_reuse=False)
    for request, prompt in zip(requests, prompts, strict=True):
        result = updates[request.id].result
        (expected,) = plain.generate([prompt], asked)
        assert result is not None
        assert result.error is None
        if "float32" in str(engine_dir):  # elsewhere near ties may fall either way
            assert result.sequences[0].token_ids == expected.sequences[0].token_ids
