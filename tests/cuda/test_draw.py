"""The kernels that begin and end a step, simulated, against the reference: tokens taken over, chosen and drawn."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorwright.kernels.cuda.sample import DRAW, GREEDY, TAKE, step_sources
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.runtime.batch import SamplingRow
from tensorwright.runtime.sampling import choose

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
pytest.importorskip("torch", reason="needs torch")

from tensorwright.runtime.cuda.sampling import pack  # noqa: E402
from tensorwright.testing.gpu_cases import random_row  # noqa: E402
from tensorwright.testing.simulator.compile import Kernels  # noqa: E402

VOCAB = 1100  # two runs of columns for each warp
SOURCES = step_sources(SimpleNamespace(buffers={"logits": SimpleNamespace(kind="output", shape=("outputs", VOCAB))}))


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(((source.headers, source.functions) for source in SOURCES.values()), resolve_target(request.param))


def launch(kernels: Kernels, entry: str, grid: int, *arguments: Any, seed: int = 0) -> None:
    """Over arrays, which are all that it may touch, and numbers."""
    step = SOURCES[entry].launches[0]
    arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
    words = [argument.ctypes.data if isinstance(argument, np.ndarray) else argument for argument in arguments]
    parameters = bytes((ctypes.c_uint64 * len(words))(*words))
    kernels[step.function].launch([grid], [step.threads], step.shared_bytes, parameters, seed=seed,
                                  ranges=[(array.ctypes.data, array.nbytes) for array in arrays])


def drawn(kernels: Kernels, logits: Any, lines: list[int], rows: list[SamplingRow], seed: int = 0) -> Any:
    """(tokens, log probabilities, sums) of rows of `lines` of the logits."""
    samplings, adjustments = pack(lines, rows)
    chosen, taken = (np.full((count, 4), np.nan, np.float32) for count in (len(logits), max(len(logits), len(rows))))
    copies = np.full((len(rows), logits.shape[1]), np.nan, np.float32)
    launch(kernels, GREEDY, len(logits), logits, chosen, taken, seed=seed)
    np.testing.assert_array_equal(taken[:len(logits)].view(np.int32), chosen.view(np.int32))
    launch(kernels, DRAW, len(rows), logits, copies, samplings, adjustments if len(adjustments) else samplings, chosen,
           taken, seed=seed)
    taken = taken[:len(rows)]
    return taken[:, 0].copy().view(np.int32), taken[:, 1], taken[:, 2]


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_the_reference_s(kernels: Kernels, seed: int) -> None:
    random, count = np.random.default_rng(seed), 8
    rows = [random_row(random, VOCAB) for _ in range(count)]
    logits = (random.standard_normal((count, VOCAB)) * 3).astype(np.float32)
    if seed == 1:
        logits = np.round(logits)  # many equal ones: the lower id comes first
    lines = random.permutation(count).tolist()
    tokens, log_probs, sums = drawn(kernels, logits, lines, rows, seed)
    wanted, wanted_log_probs = choose(logits[lines], rows)
    assert tokens.tolist() == wanted.tolist()
    np.testing.assert_allclose(log_probs, wanted_log_probs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sums, logits[lines].sum(axis=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, -7.5])
def test_equal_logits_are_drawn_by_id(kernels: Kernels, value: float) -> None:
    logits = np.full((1, VOCAB), value, np.float32)
    rows = [SamplingRow(), SamplingRow(temperature=1.0, uniform=0.5),
            SamplingRow(temperature=1.0, top_k=4, uniform=0.75),
            SamplingRow(temperature=2.0, top_p=0.4906, uniform=1 - 2.0**-24)]
    wanted = choose(np.repeat(logits, 4, axis=0), rows)[0]
    assert drawn(kernels, logits, [0] * 4, rows)[0].tolist() == wanted.tolist() == [0, 550, 3, 539]


def test_rows_without_a_choice(kernels: Kernels) -> None:
    """Nothing allowed, and logits that are no numbers: some token, and what tells the loop to end the request."""
    logits = np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32)
    logits[1, 7], logits[2, 9] = np.nan, np.inf
    everything = SamplingRow(temperature=1.0, biased=tuple(range(VOCAB)), biases=(float("-inf"),) * VOCAB)
    rows = [everything, SamplingRow(temperature=1.0, top_p=0.5, uniform=0.9), SamplingRow(temperature=1.0, uniform=0.3)]
    tokens, _, sums = drawn(kernels, logits, [0, 1, 2], rows)
    assert tokens[0] == 0
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    assert np.isfinite(sums).tolist() == [True, False, False]


def test_tokens_are_taken_over(kernels: Kernels) -> None:
    random = np.random.default_rng(1)
    chosen = random.integers(0, 1000, (64, 4)).astype(np.int32)
    ids = random.integers(-64, 1000, 300).astype(np.int32)
    wanted = np.where(ids < 0, chosen[np.maximum(-1 - ids, 0) % 64, 0], ids)
    wanted[299] = ids[299]  # is not asked for
    launch(kernels, TAKE, 2, ids, chosen, 299)
    assert ids.tolist() == wanted.tolist()
