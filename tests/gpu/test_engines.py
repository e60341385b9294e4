"""Whole engines on the GPU: every buffer of every op against NumPy, and generation against the reference's rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorwright.checkpoint.convert import DType
from tensorwright.engine.engine import Engine
from tensorwright.runtime.batch import SamplingRow
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.sampling import choose
from tensorwright.testing.differential import compare_steps
from tensorwright.testing.engines import INT4, Recipe, build_dummy, build_engine
from tensorwright.testing.gpu_cases import BOUNDS, LENGTHS, RECIPES, ROUNDED, STEPS, random_row
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES.keys())
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


@pytest.fixture(scope="module")
def engine_dir(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = {"target": "native", "max_batch_size": 16, "max_num_tokens": 256}
    return build_engine(Recipe(**{**vars(recipe), "build": build}), tmp_path_factory.mktemp("gpu"))


def test_every_buffer_agrees_with_the_reference_step_by_step(engine_dir: Path, recipe: Recipe) -> None:
    from tensorwright.runtime.cuda.executor import CudaExecutor

    executor = CudaExecutor(Engine.open(engine_dir), num_blocks=32)
    for name, queries in STEPS.items():
        pairs = list(zip(queries, LENGTHS, strict=False))
        batch = make_batch(pairs, 16, num_outputs=len(pairs))[0]
        worst = max(compare_steps(executor, batch), key=lambda difference: difference.error)
        assert worst.error < BOUNDS[recipe.dtype], (name, worst)


def test_a_recorded_step_gives_the_bits_of_a_launched_one(engine_dir: Path) -> None:
    from tensorwright.runtime.cuda.executor import CudaExecutor

    recorded, launched = (CudaExecutor(Engine.open(engine_dir), num_blocks=32, graphs=graphs)
                          for graphs in (True, False))
    for count in (1, 2, 3, 8, 10):
        batch = make_batch([(1, length) for length in LENGTHS[:count]], 16)[0]
        batch = type(batch)(**{**vars(batch), "output_rows": np.arange(count, dtype=np.int32)})
        for _ in range(3):
            np.testing.assert_array_equal(np.asarray(recorded.execute(batch)),
                                          np.asarray(launched.execute(batch)))


@pytest.mark.parametrize(("dtype", "flags", "stretches"), [
    ("float16", INT4, 14), ("bfloat16", INT4, 14), ("bfloat16", ("--use_weight_only",), 14),
    ("float16", ("--use_weight_only",), 14), ("float16", ("--use_fp8_rowwise", "--quantize_lm_head"), 15),
    ("bfloat16", (), 14)])
def test_a_stretch_leaves_what_its_ops_leave(dtype: DType, flags: tuple[str, ...], stretches: int,
                                             tmp_path: Path) -> None:
    """Steps of up to 64 sequences in fewer launches against the same steps op by op: logits, then caches."""
    from tensorwright.runtime.cuda.executor import CudaExecutor

    model = TinyModel("mistral", hidden_size=2560, num_heads=16, num_kv_heads=8, head_size=128, intermediate_size=7168,
                      vocab_size=2048)
    engine = Engine.open(build_dummy(model, tmp_path, dtype, flags, target="native", tokens_per_block=16,
                                     max_seq_len=512, max_num_tokens=1024))
    assert len(engine.manifest["kernels"]["stretches"]) == stretches
    fused, plain = (CudaExecutor(engine, num_blocks=128, stretches=stretches) for stretches in (True, False))
    bound = ROUNDED if "--use_fp8_rowwise" in flags else BOUNDS[dtype]  # prompts of 65 tokens on are rounded
    for lengths in ((300,), (300, 17), (5, 40, 1), (300, 1, 33, 60, 7), (9,) * 16, (31, 2) * 10, (3,) * 60):
        prompt = make_batch([(n, n) for n in lengths], 16, num_outputs=1)[0]
        for executor in (fused, plain):
            executor.execute(prompt)
        for _ in range(4):  # launched, recorded, replayed
            step = make_batch([(1, n) for n in lengths], 16)[0]
            step = type(step)(**{**vars(step), "output_rows": np.arange(len(lengths), dtype=np.int32)})
            given, wanted = (np.asarray(executor.execute(step)) for executor in (fused, plain))
            assert np.abs(given - wanted).max() < bound * np.abs(wanted).max()
        for name in ("layers.0.kv", "layers.1.kv"):
            wanted = plain.buffer(name).astype(np.float32)
            assert np.abs(fused.buffer(name).astype(np.float32) - wanted).max() < bound * np.abs(wanted).max()


def test_requests_do_not_depend_on_the_batch_but_for_near_ties(engine_dir: Path) -> None:
    random = np.random.default_rng(3)
    prompts = [random.integers(3, 320, length).tolist() for length in (3, 40, 17, 1, 30, 9)]
    greedy = SamplingParameters(max_tokens=12, end_ids=())
    together = [r.sequences[0].token_ids for r in LLM(engine_dir).generate(prompts, greedy)]
    alone = [LLM(engine_dir).generate([prompt], greedy)[0].sequences[0].token_ids for prompt in prompts]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    assert same >= 5  # random weights have near-ties; text of real ones is compared by the demo


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.2},
                                 {"num_return_sequences": 2, "temperature": 1.0}])
def test_running_ahead_changes_no_token(engine_dir: Path, how: dict[str, Any]) -> None:
    random = np.random.default_rng(4)
    prompts = [random.integers(3, 320, length).tolist() for length in (3, 40, 17, 1, 30, 9, 12)]
    asked = [SamplingParameters(max_tokens=count, end_ids=(), return_log_probs=True, **how)
             for count in (12, 3, 1, 20, 9, 2, 15)]
    found = []
    for runs_ahead in (True, False):
        llm = LLM(engine_dir)
        llm._loop.executor.runs_ahead = runs_ahead
        found.append([result.sequences for result in llm.generate(prompts, asked)])
    assert found[0] == found[1]


def test_the_greedy_choice_of_a_step_is_the_reference_s(engine_dir: Path) -> None:
    from tensorwright.runtime.cuda.executor import CudaExecutor

    executor = CudaExecutor(Engine.open(engine_dir), num_blocks=32)
    batch = make_batch([(length, length) for length in LENGTHS], 16, num_outputs=12)[0]
    logits = executor.execute(batch)
    values = np.asarray(logits)
    wanted, wanted_log_probs = choose(values, [SamplingRow()] * len(values))
    drawn = executor.sample(logits, [SamplingRow()] * len(values)).result()
    assert drawn.tokens.tolist() == wanted.tolist()
    np.testing.assert_allclose(drawn.log_probs, wanted_log_probs, rtol=1e-5, atol=1e-5)
    assert drawn.is_finite.all()


def test_draws_are_the_reference_s(engine_dir: Path) -> None:
    import torch

    from tensorwright.runtime.cuda.executor import CudaExecutor
    from tensorwright.runtime.cuda.logits import DeviceLogits

    executor, random, count = CudaExecutor(Engine.open(engine_dir), num_blocks=4), np.random.default_rng(5), 16
    for turn in range(20):
        rows = [random_row(random, executor.vocab_size) for _ in range(count)]
        logits = (random.standard_normal((count, executor.vocab_size)) * 3).astype(np.float32)
        if turn % 2:
            logits = np.round(logits)  # many equal ones: the lower id comes first
        lines = random.permutation(count).tolist() if turn % 3 else list(range(count))
        values = torch.tensor(logits, device="cuda")
        torch.cuda.synchronize()
        results, stream = executor._results, executor._stream
        executor._plan.choose(count, values, results.chosen, results.drawn, stream.cuda_stream)
        drawn = executor.sample(DeviceLogits(values, stream, lines), rows).result()
        wanted, wanted_log_probs = choose(logits[lines], rows)
        same = drawn.tokens == wanted  # a number on the border of two tokens may fall on either side in float32
        assert same.mean() > 0.9, (turn, [row for row, is_same in zip(rows, same, strict=True) if not is_same])
        np.testing.assert_allclose(drawn.log_probs[same], wanted_log_probs[same], rtol=1e-4, atol=1e-4)
        assert drawn.is_finite.all()
