"""The native sampler against runtime/sampling.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorwright.kernels.cpu.abi import Sampling
from tensorwright.kernels.cpu.compile import compile_shared, engine_source
from tensorwright.kernels.cpu.load import load_library, thread_pool
from tensorwright.kernels.cpu.targets import resolve_target
from tensorwright.kernels.interface import Target
from tensorwright.runtime import sampling
from tensorwright.runtime.batch import SamplingRow


class Sampler:
    """tw_sample of a library without kernels."""

    def __init__(self, target: Target) -> None:
        self.library = load_library(compile_shared(engine_source([]), target))

    def choose(self, logits: NDArray[np.float32], rows: Sequence[SamplingRow],
               workers: int = 2) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        requests, keep = (Sampling * len(rows))(), []
        for request, row in zip(requests, rows, strict=True):
            for name in ("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "presence_penalty",
                         "frequency_penalty", "uniform"):
                setattr(request, name, getattr(row, name))
            for name, dtype in (("seen", np.int32), ("counts", np.int32), ("biased", np.int32), ("biases", np.float32)):
                keep.append(np.ascontiguousarray(getattr(row, name), dtype))
                setattr(request, name, keep[-1].ctypes.data)
            request.num_seen, request.num_biased = len(row.seen), len(row.biased)
        tokens, log_probs = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.float32)
        logits = np.ascontiguousarray(logits, np.float32)
        self.library.tw_sample(
            thread_pool(self.library, workers).pointer, ctypes.c_void_p(logits.ctypes.data), len(rows),
            logits.shape[1], requests, ctypes.c_void_p(tokens.ctypes.data), ctypes.c_void_p(log_probs.ctypes.data))
        return tokens, log_probs


@pytest.fixture(scope="session")
def sampler(target: Target) -> Sampler:
    return Sampler(target)


@pytest.fixture(scope="session")
def native_sampler() -> Sampler:
    return Sampler(resolve_target("native"))


def near_edge(logits: NDArray[np.float32], row: SamplingRow) -> bool:
    """Whether the choice hangs on the last bits: it changes when `uniform` or a bound moves a little."""
    moved = [replace(row, uniform=min(max(row.uniform + step, 0.0), 1 - 2**-24)) for step in (-2e-5, 2e-5)]
    if row.top_p < 1:
        moved += [replace(row, top_p=row.top_p * factor) for factor in (1 - 1e-5, 1 - 1e-7)]
    if row.min_p:
        moved += [replace(row, min_p=row.min_p * factor) for factor in (1 - 1e-5, 1 + 1e-5)]
    return len({int(sampling.choose(logits[None], [r])[0][0]) for r in (row, *moved)}) > 1


FILTERS = [
    SamplingRow(), SamplingRow(temperature=0.7), SamplingRow(temperature=1.3, top_k=1),
    SamplingRow(temperature=0.9, top_k=40), SamplingRow(temperature=1.0, top_p=0.9),
    SamplingRow(temperature=5.0, top_p=0.99), SamplingRow(temperature=1.0, min_p=0.05),
    SamplingRow(temperature=0.8, top_k=300, top_p=0.8, min_p=0.01), SamplingRow(temperature=1.0, top_k=10**6),
    SamplingRow(temperature=1e-30), SamplingRow(temperature=1.0, top_p=1e-9),
]


@pytest.mark.parametrize("vocab", [1, 5, 1000, 131072])
def test_tokens_and_log_probs_are_the_reference_s(sampler: Sampler, vocab: int) -> None:
    random = np.random.default_rng(vocab)
    rows = [replace(row, uniform=float(np.float32(random.integers(1 << 24)) / (1 << 24)))
            for row in FILTERS for _ in range(8 if vocab < 10_000 else 2)]
    logits = (random.standard_normal((len(rows), vocab)) * random.choice([1, 4, 12], (len(rows), 1))).astype(np.float32)
    tokens, log_probs = sampler.choose(logits, rows)
    wanted, wanted_log_probs = sampling.choose(logits, rows)
    for index, row in enumerate(rows):
        if tokens[index] == wanted[index]:
            assert log_probs[index] == pytest.approx(wanted_log_probs[index], rel=1e-5, abs=1e-5)
        else:
            assert near_edge(logits[index], row), row


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=40), st.integers(0, 5), st.sampled_from([0.3, 0.75, 1.0]),
       st.sampled_from([0.0, 0.2]), st.integers(0, 999).map(lambda n: n / 1024), st.sampled_from([0.0, 0.5, 2.0]))
def test_many_equal_logits_are_ordered_by_id(native_sampler: Sampler, values: list[int], top_k: int, top_p: float,
                                             min_p: float, uniform: float, temperature: float) -> None:
    logits = np.array(values, np.float32)[None]
    row = SamplingRow(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
    token = native_sampler.choose(logits, [row])[0][0]
    assert token == sampling.choose(logits, [row])[0][0] or near_edge(logits[0], row)


def test_penalties_and_biases(sampler: Sampler) -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((30, 50)).astype(np.float32)
    rows = [SamplingRow(repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3,
                        seen=tuple(range(index, index + 20)), counts=tuple(i % 3 for i in range(20)),
                        biased=(0, index, 0), biases=(-np.inf, 1.0, 0.0)) for index in range(30)]
    tokens, log_probs = sampler.choose(logits, rows)
    wanted, wanted_log_probs = sampling.choose(logits, rows)
    np.testing.assert_array_equal(tokens, wanted)
    np.testing.assert_allclose(log_probs, wanted_log_probs, rtol=1e-5)


@pytest.mark.parametrize("row", FILTERS)
def test_broken_logits_give_some_token(sampler: Sampler, row: SamplingRow) -> None:
    logits = np.zeros((6, 33), np.float32)
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, 5] = np.inf
    logits[3] = np.nan
    logits[3, 7] = 1
    logits[4, ::2] = np.nan
    logits[5] = np.float32(3e38)
    tokens, _ = sampler.choose(logits, [row] * 6)
    assert ((tokens >= 0) & (tokens < 33)).all()
    assert tokens[2] == 5
    assert tokens[3] == 7
    assert tokens[4] % 2 == 1


def test_equal_logits_greedy_takes_the_lowest_id(sampler: Sampler) -> None:
    logits = np.zeros((1, 100), np.float32)
    logits[0, [40, 41, 99]] = 2
    assert sampler.choose(logits, [SamplingRow()])[0][0] == 40
