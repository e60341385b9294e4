"""The loop over an executor that is a step ahead of it: the same tokens, none computed twice, nothing wrong reused."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.testing.fake_executor import plain_logits
from tensorwright.testing.plain_run import LIMITS, Harness, plain_run

SHARED = (3, 4, 5, 6, 3, 4, 5, 6, 3)
PROMPTS = st.tuples(st.booleans(), st.lists(st.integers(3, 5), min_size=1, max_size=12)).map(
    lambda drawn: (SHARED if drawn[0] else ()) + tuple(drawn[1]))


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, object]:
    return {
        "max_tokens": draw(st.integers(1, 20)),
        "min_tokens": draw(st.integers(0, 4)),
        "temperature": draw(st.sampled_from([0.0, 0.7])),
        "seed": draw(st.integers(0, 3)),
        "end_ids": draw(st.sampled_from([(), (2,), tuple(range(8))])),
        "stop_token_ids": draw(st.sampled_from([(), ((9,), (10, 11))])),
        "bad_token_ids": draw(st.sampled_from([(), ((5,), (6,))])),
        "return_generation_logits": draw(st.sampled_from([False, False, True])),
        "num_return_sequences": draw(st.sampled_from([1, 1, 1, 3])),
        "repetition_penalty": draw(st.sampled_from([1.0] * 9 + [1.3])),
    }


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(PROMPTS, parameters(), st.integers(0, 12)), min_size=1, max_size=8),
    cancels=st.dictionaries(st.integers(0, 7), st.integers(0, 12), max_size=3),
    num_blocks=st.integers(30, 60),
    max_num_tokens=st.sampled_from([4, 7, 32]),
    reuse=st.booleans(),
)
def test_results_are_those_of_a_loop_that_waits(requests, cancels, num_blocks, max_num_tokens, reuse):
    limits = replace(LIMITS, max_num_tokens=max_num_tokens, max_batch_size=4)
    waiting, ahead = (Harness(limits=limits, num_blocks=num_blocks, block_reuse=reuse, runs_ahead=runs_ahead)
                      for runs_ahead in (False, True))
    for harness in (waiting, ahead):
        drive(harness, requests, cancels)
        assert harness.loop.blocks.num_used == 0
    for index, result in ahead.results().items():
        expected = waiting.results()[index]
        assert result.error is None
        for sequence, other in zip(result.sequences, expected.sequences, strict=True):
            if "cancelled" in (sequence.finish_reason, other.finish_reason):
                count = min(len(sequence.token_ids), len(other.token_ids))
                assert sequence.token_ids[:count] == other.token_ids[:count]
            else:
                assert (sequence.token_ids, sequence.finish_reason) == (other.token_ids, other.finish_reason)


def drive(harness, requests, cancels):
    submitted, order = {}, sorted(enumerate(requests), key=lambda item: item[1][2])
    for step in range(3000):
        while order and order[0][1][2] <= step:
            index, (prompt, wanted, _) = order.pop(0)
            submitted[index] = harness.submit(prompt, **wanted)
        for index, when in cancels.items():
            if when == step and index in submitted:
                submitted[index].cancel()
        if not order and not harness.loop.has_work:
            return
        harness.step()
    raise RuntimeError("still at work")


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8}, {"num_return_sequences": 3, "temperature": 1.0}])
def test_no_step_waits_and_none_is_wasted_where_the_length_is_known(how):
    waiting, ahead = Harness(), Harness(runs_ahead=True)
    for harness in (waiting, ahead):
        harness.submit((3, 4, 5), max_tokens=12, end_ids=(), **how)
        harness.submit((5, 5), max_tokens=7, end_ids=(), **how)
    assert [r.sequences for r in ahead.run().values()] == [r.sequences for r in waiting.run().values()]
    assert ahead.loop.counters.tokens_computed == waiting.loop.counters.tokens_computed
    lanes = how.get("num_return_sequences", 1)
    assert ahead.executor.num_unknown == lanes * (11 + 6)  # every token but the last ones of the sequences


def test_an_end_costs_one_token_that_nobody_sees():
    end = plain_run((3, 4, 5), SamplingParameters(max_tokens=9), end_ids=())[0][5]
    waiting, ahead = Harness(end_ids=(end,)), Harness(end_ids=(end,), runs_ahead=True)
    for harness in (waiting, ahead):
        harness.submit((3, 4, 5), max_tokens=9)
    assert ahead.run()[0].sequences == waiting.run()[0].sequences
    assert ahead.loop.counters.tokens_computed == waiting.loop.counters.tokens_computed + 1
    assert ahead.loop.counters.tokens_out == waiting.loop.counters.tokens_out


def test_blocks_are_offered_with_their_real_tokens_only():
    prompt, wanted = (3, 4, 5), SamplingParameters(max_tokens=13)
    tokens = plain_run(prompt, wanted, end_ids=())[0]
    harness = Harness(end_ids=tokens[-1:], runs_ahead=True)  # the thirteenth ends it: nothing follows
    harness.submit(prompt, max_tokens=40)
    harness.run()
    followed = (*prompt, *tokens)
    again = harness.submit((*followed, 7), max_tokens=3, end_ids=())
    result = harness.run()[again.id]
    assert result.num_cached_tokens == 16  # with the token that ended the first
    assert list(result.sequences[0].token_ids) == plain_run((*followed, 7), SamplingParameters(max_tokens=3),
                                                            end_ids=())[0]


def test_preemption_ahead_changes_nothing():
    harness = Harness(num_blocks=14, limits=replace(LIMITS, max_seq_len=40), runs_ahead=True)
    prompts = [(3, 4, 5), (4, 5, 3, 3), (5, 5, 5), (6, 3)]
    for prompt in prompts:
        harness.submit(prompt, max_tokens=30, end_ids=())
    results = harness.run()
    assert harness.loop.scheduler.num_preemptions > 0
    assert harness.executor.num_unknown > 30
    for index, prompt in enumerate(prompts):
        wanted = SamplingParameters(max_tokens=30)
        assert [list(s.token_ids) for s in results[index].sequences] == plain_run(prompt, wanted, end_ids=())


@pytest.mark.parametrize("how", [{"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}, {"beam_width": 2},
                                 {"bad_token_ids": ((4, 5),)}])
def test_what_follows_from_tokens_waits_for_them(how):
    waiting, ahead = Harness(), Harness(runs_ahead=True)
    for harness in (waiting, ahead):
        harness.submit((3, 4, 5), max_tokens=6, end_ids=(), **how)
        harness.submit((5, 4), max_tokens=20, end_ids=())
    assert [r.sequences for r in ahead.run().values()] == [r.sequences for r in waiting.run().values()]
    assert 10 < ahead.executor.num_unknown < 20  # once the first has ended


def test_every_token_is_told_a_step_after_it_was_started():
    harness = Harness(runs_ahead=True)
    harness.submit((3, 4, 5), max_tokens=10, end_ids=())
    for number in range(10):
        harness.step()
        assert len(harness.updates) == number
    harness.step()
    assert harness.updates[-1].finished


def test_logits_that_are_not_finite_fail_their_own_request_only():
    def logits(tokens):
        row = plain_logits(tokens)
        if tokens[0] == 7 and len(tokens) > 5:
            row[3] = float("nan")
        return row

    harness = Harness(logits=logits, runs_ahead=True)
    harness.submit((7, 4, 5), max_tokens=8, end_ids=())
    harness.submit((5, 4, 3), max_tokens=8, end_ids=())
    broken, other = harness.run().values()
    assert "not finite" in broken.error
    assert len(broken.sequences[0].token_ids) == 3
    assert len(other.sequences[0].token_ids) == 8
    assert harness.loop.blocks.num_used == 0


@pytest.mark.parametrize("when", ["execute", "sample", "result"])
def test_a_step_that_fails_takes_its_requests_and_no_others(when):
    harness = Harness(runs_ahead=True)
    harness.submit((3, 4, 5), max_tokens=9, end_ids=())
    harness.step()
    harness.step()
    whole = harness.executor
    setattr(whole, "sample" if when == "result" else when, lambda *given: Broken() if when == "result" else 1 / 0)
    harness.step()
    del whole.__dict__["sample" if when == "result" else when]
    harness.submit((5, 4, 3), max_tokens=9, end_ids=())
    failed, other = harness.run().values()
    assert "ZeroDivisionError" in failed.error
    assert [list(other.sequences[0].token_ids)] == plain_run((5, 4, 3), SamplingParameters(max_tokens=9), end_ids=())


class Broken:
    """A draw that never arrives."""

    def result(self):
        raise ZeroDivisionError
