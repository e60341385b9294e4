"""The loop against plain runs: whatever is in the batch, a request's tokens are those of the request alone."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.testing.plain_run import LIMITS, Harness, plain_run

PROMPTS = st.lists(st.integers(3, 6), min_size=1, max_size=40).map(tuple)


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, object]:
    return {
        "max_tokens": draw(st.integers(1, 24)),
        "min_tokens": draw(st.integers(0, 4)),
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.5])),
        "top_k": draw(st.sampled_from([0, 3])),
        "top_p": draw(st.sampled_from([1.0, 0.8])),
        "seed": draw(st.integers(0, 3)),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.5])),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 2])),
        "num_return_sequences": draw(st.sampled_from([1, 1, 1, 2, 3])),
    }


@settings(max_examples=120, deadline=None)
@given(
    requests=st.lists(st.tuples(PROMPTS, parameters(), st.integers(0, 6)), min_size=1, max_size=8),
    cancels=st.dictionaries(st.integers(0, 7), st.integers(0, 12), max_size=3),
    num_blocks=st.integers(44, 90),
    max_num_tokens=st.sampled_from([4, 7, 32]),
    reuse=st.booleans(),
    runs_ahead=st.booleans(),
)
def test_tokens_are_those_of_the_plain_run(requests, cancels, num_blocks, max_num_tokens, reuse, runs_ahead):
    limits = replace(LIMITS, max_num_tokens=max_num_tokens, max_batch_size=4)
    harness = Harness(limits=limits, num_blocks=num_blocks, block_reuse=reuse, runs_ahead=runs_ahead)
    submitted = {}
    pending = sorted(enumerate(requests), key=lambda item: item[1][2])
    for step in range(3000):
        while pending and pending[0][1][2] <= step:
            index, (prompt, wanted, _) = pending.pop(0)
            submitted[index] = harness.submit(prompt, **wanted)
        for index, when in cancels.items():
            if when == step and index in submitted:
                submitted[index].cancel()
        if not pending and not harness.loop.has_work:
            break
        harness.step()
    results = harness.results()
    assert len(results) == len(requests)
    for index, (prompt, wanted, _) in enumerate(requests):
        result = results[submitted[index].id]
        expected = plain_run(prompt, SamplingParameters(**wanted))
        assert result.error is None
        for sequence, tokens in zip(result.sequences, expected, strict=True):
            if sequence.finish_reason == "cancelled":
                assert list(sequence.token_ids) == tokens[: len(sequence.token_ids)]
            else:
                assert list(sequence.token_ids) == tokens
                assert sequence.finish_reason == ("stop" if tokens[-1] == 2 else "length")
    assert harness.loop.blocks.num_used == 0


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(st.tuples(PROMPTS, st.integers(1, 20), st.sampled_from([1, 2, 4])), min_size=1, max_size=6),
    num_blocks=st.integers(52, 110),
    max_num_tokens=st.sampled_from([4, 9, 32]),
    reuse=st.booleans(),
)
def test_beams_do_not_depend_on_the_batch(requests, num_blocks, max_num_tokens, reuse):
    limits = replace(LIMITS, max_num_tokens=max_num_tokens, max_batch_size=3)
    together = Harness(limits=limits, num_blocks=num_blocks, block_reuse=reuse)
    for prompt, length, width in requests:
        together.submit(prompt, max_tokens=length, beam_width=width)
    results = together.run()
    for index, (prompt, length, width) in enumerate(requests):
        alone = Harness(num_blocks=400)
        alone.submit(prompt, max_tokens=length, beam_width=width)
        (expected,) = alone.run().values()
        assert [(s.token_ids, s.finish_reason) for s in results[index].sequences] == [
            (s.token_ids, s.finish_reason) for s in expected.sequences]
        assert len(expected.sequences) <= width


def test_preemption_happens_and_changes_nothing():
    harness = Harness(num_blocks=14, limits=replace(LIMITS, max_seq_len=40))
    prompts = [(3, 4, 5), (4, 5, 3, 3), (5, 5, 5), (6, 3)]
    for prompt in prompts:
        harness.submit(prompt, max_tokens=30, end_ids=())
    results = harness.run()
    assert harness.loop.scheduler.num_preemptions > 0
    for index, prompt in enumerate(prompts):
        wanted = SamplingParameters(max_tokens=30, end_ids=())
        assert [list(s.token_ids) for s in results[index].sequences] == plain_run(prompt, wanted, end_ids=())


def test_prefix_is_reused_and_counted():
    harness = Harness()
    prompt = tuple(range(3, 25))
    harness.submit(prompt, max_tokens=4)
    harness.run()
    computed = harness.loop.counters.tokens_computed
    harness.submit(prompt, max_tokens=4)
    first, second = harness.run().values()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 20)
    assert first.sequences == second.sequences
    assert harness.loop.counters.tokens_computed - computed == computed - 20
    statistics = harness.loop.statistics()
    assert (statistics["prefix_hits"], statistics["blocks_reused"]) == (1, 5)


def test_generated_tokens_are_reused_too():
    harness = Harness()
    harness.submit((3, 4, 5), max_tokens=13, end_ids=())
    (first,) = harness.run().values()
    harness.submit((3, 4, 5, *first.sequences[0].token_ids), max_tokens=1)
    assert harness.run()[1].num_cached_tokens == 12


def test_decodes_come_before_prefill_and_a_step_keeps_its_budget():
    harness = Harness(limits=replace(LIMITS, max_num_tokens=8))
    running = harness.submit((3, 4), max_tokens=50, end_ids=())
    harness.step()
    harness.submit(tuple(range(3, 31)) * 2, max_tokens=2)
    for _ in range(5):
        before = len(running.lanes[0].tokens)
        harness.step()
        assert len(running.lanes[0].tokens) == before + 1


def test_requests_start_in_the_order_of_arrival():
    harness = Harness(limits=replace(LIMITS, max_batch_size=1))
    for length in (9, 1, 5):
        harness.submit(tuple([3] * length), max_tokens=3, end_ids=())
    harness.run()
    assert [u.request_id for u in harness.updates if u.finished] == [0, 1, 2]


def test_cancel_frees_blocks_at_once():
    harness = Harness()
    request = harness.submit((3, 4, 5), max_tokens=100, end_ids=())
    other = harness.submit((5, 4, 3), max_tokens=5, end_ids=())
    harness.step()
    harness.step()
    request.cancel()
    harness.step()
    assert harness.loop.statistics()["requests_active"] == 1
    results = harness.run()
    assert results[request.id].sequences[0].finish_reason == "cancelled"
    assert len(results[request.id].sequences[0].token_ids) == 2
    assert len(results[other.id].sequences[0].token_ids) == 5
    assert harness.loop.counters.cancellations == 1


def test_a_callback_that_raises_fails_its_own_request_only():
    def broken(update):
        raise ValueError("mine")

    harness = Harness()
    harness.submit((3, 4, 5), on_update=broken, max_tokens=100, end_ids=())
    harness.submit((5, 4, 3), max_tokens=5, end_ids=())
    results = harness.run()
    assert list(results) == [1]
    assert harness.loop.counters.errors == 1
    assert harness.loop.counters.requests_finished == 2


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), (float("inf"), float("-inf"))])
def test_logits_that_are_not_finite_fail_their_own_request_only(broken):
    from tensorwright.testing.fake_executor import plain_logits

    def logits(tokens):
        row = plain_logits(tokens)
        if tokens[0] == 7 and len(tokens) > 5:
            row[3:5] = broken
        return row

    harness = Harness(logits=logits)
    for prompt, width in (((7, 4, 5), 1), ((5, 4, 3), 1), ((7, 3, 3), 2)):
        harness.submit(prompt, max_tokens=6, end_ids=(), beam_width=width)
    results = harness.run()
    for index in (0, 2):
        assert "not finite" in results[index].error
        assert results[index].sequences[0].finish_reason == "error"
        assert len(results[index].sequences[0].token_ids) == 3
    assert results[1].error is None
    assert results[1].sequences[0].finish_reason == "length"


def test_an_executor_that_raises_fails_the_step_and_the_loop_goes_on():
    harness = Harness()
    execute = harness.executor.execute
    harness.executor.execute = lambda batch: 1 / 0
    harness.submit((3, 4, 5), max_tokens=5)
    harness.submit((3, 4, 5), max_tokens=5, beam_width=2)
    harness.step()
    harness.executor.execute = execute
    harness.submit((5, 4, 3), max_tokens=5, end_ids=())
    results = harness.run()
    assert "ZeroDivisionError" in results[0].error
    assert "ZeroDivisionError" in results[1].error
    assert len(results[2].sequences[0].token_ids) == 5


@pytest.mark.parametrize("how", [{"beam_width": 2}, {}, {"temperature": 1.0}])
def test_forbidding_every_token_is_an_error_of_the_request(how):
    harness = Harness()
    harness.submit((3, 4), max_tokens=5, bad_token_ids=tuple((t,) for t in range(32)), **how)
    (result,) = harness.run().values()
    assert "forbid every token" in result.error


@pytest.mark.parametrize("how", [{}, {"num_return_sequences": 2}, {"beam_width": 2}])
def test_a_tokenizer_that_fails_for_good_fails_its_own_request_only(how, monkeypatch):
    def broken(writer):
        raise ValueError("no text")

    harness = Harness()
    failing = harness.submit((3, 4, 5), max_tokens=4, end_ids=(), **how)
    harness.submit((5, 4, 3), max_tokens=8, end_ids=())
    for lane in failing.lanes:
        monkeypatch.setattr(lane, "writer", type("Broken", (), {"push": broken, "finish": broken})())
    if failing.beams:
        monkeypatch.setattr(failing.beams, "_tokenizer", object())
    results = harness.run()
    assert results[failing.id].error
    assert results[1].error is None
    assert len(results[1].sequences[0].token_ids) == 8


@pytest.mark.parametrize("how", [{"num_return_sequences": 3}, {"beam_width": 2}])
@pytest.mark.parametrize("length", [4, 7, 12])
def test_a_preempted_request_with_a_cached_prompt_forks_again(how, length):
    for num_blocks in range(20, 40, 3):
        harness = Harness(num_blocks=num_blocks, limits=replace(LIMITS, max_seq_len=40))
        requests = [tuple(range(first, first + length)) for first in (3, 4, 5, 6)]
        for prompt in requests:
            harness.submit(prompt, max_tokens=18, end_ids=(), **how)
        results = harness.run(max_steps=600)
        for index, prompt in enumerate(requests):
            alone = Harness(num_blocks=400)
            alone.submit(prompt, max_tokens=18, end_ids=(), **how)
            assert results[index].sequences == alone.run()[0].sequences


@pytest.mark.parametrize("num_blocks", [64, 16])
def test_updates_together_are_the_result(num_blocks):
    harness = Harness(num_blocks=num_blocks, limits=replace(LIMITS, max_seq_len=60))
    for seed in range(3):
        harness.submit((3, 4, 5, 6), max_tokens=20, temperature=1.0, seed=seed, num_return_sequences=2,
                       return_log_probs=True)
    results = harness.run()
    for request_id, result in results.items():
        for index, sequence in enumerate(result.sequences):
            mine = [u for u in harness.updates if (u.request_id, u.sequence) == (request_id, index)]
            assert sum((u.token_ids for u in mine), ()) == sequence.token_ids
            assert sum((u.log_probs for u in mine), ()) == sequence.log_probs
            assert [u.finish_reason for u in mine] == [None] * (len(mine) - 1) + [sequence.finish_reason]
            assert sum(sequence.log_probs) == pytest.approx(sequence.cumulative_log_prob)
        finals = [u for u in harness.updates if u.request_id == request_id and u.finished]
        assert len(finals) == 1
        assert finals[0].result is result


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("max_num_tokens", [6, 7, 11, 32])
def test_beams_survive_preemption(reuse, max_num_tokens):
    asked = {"max_tokens": 30, "end_ids": (), "length_penalty": 0.5}
    alone = Harness(num_blocks=400)
    alone.submit((5, 6, 3, 3, 3, 4, 5), beam_width=4, **asked)
    (expected,) = alone.run().values()
    harness = Harness(num_blocks=33, limits=replace(LIMITS, max_num_tokens=max_num_tokens), block_reuse=reuse)
    for first in (3, 4):
        harness.submit((first, 4, 5), **asked)
    request = harness.submit((5, 6, 3, 3, 3, 4, 5), beam_width=4, **asked)
    assert harness.run()[request.id].sequences == expected.sequences
    assert harness.loop.scheduler.num_preemptions > 0


@pytest.mark.parametrize("length", [1, 4, 8, 9])
def test_a_prompt_that_is_cached_whole_still_gives_its_next_token(length):
    harness = Harness()
    for _ in range(2):
        harness.submit((5,) * length, max_tokens=3, end_ids=())
        harness.run()
    first, second = harness.results().values()
    assert first.sequences == second.sequences
    assert second.num_cached_tokens == (length - 1) // 4 * 4


def test_samples_of_one_request_share_the_prompt():
    harness = Harness(num_blocks=64)
    harness.submit((3,) * 40, max_tokens=3, end_ids=(), num_return_sequences=8, temperature=1.0)
    harness.step()
    harness.step()
    harness.step()
    assert harness.loop.blocks.num_used == 10 + 8
    (result,) = harness.run().values()
    assert len({sequence.token_ids for sequence in result.sequences}) > 4


def test_a_lost_rank_ends_the_run():
    from tensorwright.errors import RanksError

    def lost(batch):
        raise RanksError("rank 1 is gone")

    harness = Harness()
    harness.executor.execute = lost
    harness.submit((3, 4, 5))
    with pytest.raises(RanksError):
        harness.run()
