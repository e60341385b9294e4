"""The NumPy reference of sampling: order of the steps, exact cases, and the distribution it draws from."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from tensorwright.runtime.batch import SamplingRow
from tensorwright.runtime.sampling import adjusted, choose, log_softmax, uniform

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))


def one(row, logits=LOGITS):
    tokens, log_probs = choose(logits[None], [row])
    return int(tokens[0]), float(log_probs[0])


def drawn(**settings):
    """The tokens that some uniform number leads to, and the share of numbers that lead to each."""
    numbers = (np.arange(4000) + 0.5) / 4000
    rows = [SamplingRow(temperature=settings.get("temperature", 1.0), uniform=u,
                        **{k: v for k, v in settings.items() if k != "temperature"}) for u in numbers]
    tokens, _ = choose(np.repeat(LOGITS[None], len(rows), axis=0), rows)
    return tokens, {int(t): float((tokens == t).mean()) for t in np.unique(tokens)}


def test_greedy_takes_the_lowest_id_of_a_tie():
    assert one(SamplingRow(), np.array([1, 3, 3, 0], np.float32))[0] == 1


def test_log_prob_is_of_the_unchanged_logits():
    token, log_prob = one(SamplingRow(biased=(0,), biases=(9.0,)))
    assert token == 0
    assert log_prob == pytest.approx(np.log(0.05), abs=1e-5)


def test_plain_sampling_follows_the_probabilities_by_token_id():
    tokens, shares = drawn()
    assert shares == pytest.approx({0: 0.05, 1: 0.4, 2: 0.1, 3: 0.3, 4: 0.15}, abs=1e-3)
    assert (np.diff(tokens) >= 0).all()


def test_filters_draw_by_falling_probability():
    tokens, shares = drawn(top_k=3)
    assert list(dict.fromkeys(tokens.tolist())) == [1, 3, 4]
    assert shares == pytest.approx({1: 0.4 / 0.85, 3: 0.3 / 0.85, 4: 0.15 / 0.85}, abs=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert set(drawn(top_p=0.69)[1]) == {1, 3}
    assert set(drawn(top_p=0.71)[1]) == {1, 3, 4}
    assert set(drawn(top_p=1e-6)[1]) == {1}


def test_top_p_and_min_p_see_the_probabilities_that_top_k_leaves():
    assert set(drawn(top_k=2, top_p=0.56)[1]) == {1}  # 0.4 / 0.7 = 0.571
    assert set(drawn(top_k=2, top_p=0.58)[1]) == {1, 3}
    assert set(drawn(min_p=0.7)[1]) == {1, 3}
    assert set(drawn(min_p=0.3, top_p=0.69)[1]) == {1, 3}
    assert set(drawn(min_p=0.8, top_p=0.99)[1]) == {1}


def test_temperature_sharpens():
    assert drawn(temperature=0.5)[1][1] == pytest.approx(0.16 / (0.0025 + 0.16 + 0.01 + 0.09 + 0.0225), abs=1e-3)
    assert set(drawn(temperature=1e-4)[1]) == {1}


def test_penalties_in_order():
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    row = SamplingRow(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, seen=(0, 1, 2),
                      counts=(0, 1, 3), biased=(0, 3, 3), biases=(1.0, 0.5, 0.25))
    assert adjusted(logits, row).tolist() == [1.5, -4.75, -1.25, 1.25]
    assert logits[0] == 2.0


def test_forbidden_tokens_are_never_drawn():
    assert set(drawn(biased=(1, 3), biases=(float("-inf"),) * 2)[1]) == {0, 2, 4}


@given(st.integers(0, 2**63), st.integers(0, 100), st.integers(0, 10**6))
def test_uniform_is_exact_in_float32_and_below_one(seed, stream, position):
    number = uniform(seed, stream, position)
    assert 0 <= number < 1
    assert float(np.float32(number)) == number
    assert number == uniform(seed, stream, position)


def test_uniform_numbers_look_uniform_along_each_argument():
    for numbers in ([uniform(s, 0, 5) for s in range(4000)], [uniform(1, s, 5) for s in range(4000)],
                    [uniform(1, 0, s) for s in range(4000)]):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 45  # chi-square, 19 degrees of freedom: p = 0.0007
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06


def test_log_softmax_of_forbidden_rows_stays_forbidden():
    rows = np.array([[0.0, 0.0], [-np.inf, -np.inf], [-np.inf, 1.0]])
    assert log_softmax(rows).tolist() == [[-np.log(2)] * 2, [-np.inf] * 2, [-np.inf, 0.0]]
