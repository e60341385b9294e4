"""Requests through the whole of the GPU's runtime, its kernels simulated and everything late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorwright.engine.engine import Engine
from tensorwright.runtime.loop import RequestLoop
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.submission import RequestFactory
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")

PROMPTS = ([5, 6, 7, 8], [9], [11, 12])
LENGTHS = (3, 5, 1)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(TinyModel("mistral", num_layers=1), "float16", "W4A16", build={
        "target": "sm_90", "max_num_tokens": 32, "gather_generation_logits": True})
    return build_engine(recipe, tmp_path_factory.mktemp("requests"))


def generate(engine_dir: Path, *, runs_ahead: bool, **how: Any) -> tuple[list[Any], int]:
    """Each request's sequence, and how often a recorded step was replayed."""
    from tensorwright.runtime.cuda.executor import CudaExecutor
    from tensorwright.testing.played_gpu import PlayedGpu, played
    from tensorwright.testing.simulator.executor import late_parts

    gpu, engine, results = PlayedGpu(), Engine.open(engine_dir), dict[int, Any]()
    with played(gpu, **late_parts(engine, gpu.launch, num_blocks=16)):
        executor = CudaExecutor(engine, num_blocks=16)
        executor.runs_ahead = runs_ahead
        loop = RequestLoop(executor, engine.limits)
        factory = RequestFactory(engine.limits, vocab_size=engine.vocab_size, end_ids=(), tokenizer=None,
                                 num_blocks=16, block_size=engine.tokens_per_block)
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
            asked = SamplingParameters(max_tokens=length, end_ids=(), **how)
            loop.add(factory.make(prompt, asked, lambda update: results.update({update.request_id: update.result})))
        while loop.has_work:
            loop.step()
    assert [result.error for result in results.values()] == [None] * len(PROMPTS)
    return [results[index].sequences[0] for index in range(len(PROMPTS))], gpu.replays


@pytest.mark.parametrize(("how", "is_greedy"), [({}, True), ({"temperature": 1.5, "top_p": 0.95, "seed": 3}, False)])
def test_running_ahead_changes_no_token(engine_dir: Path, how: dict[str, Any], is_greedy: bool) -> None:
    ahead, replays = generate(engine_dir, runs_ahead=True, **how)
    waiting, _ = generate(engine_dir, runs_ahead=False, return_generation_logits=True, **how)
    assert replays > 0
    assert [sequence.token_ids for sequence in ahead] == [sequence.token_ids for sequence in waiting]
    largest = [tuple(np.argmax(sequence.generation_logits, axis=1).tolist()) for sequence in waiting]
    assert ([sequence.token_ids for sequence in ahead] == largest) == is_greedy
