"""What is refused before anything runs: the message names the numbers, the mend the next thing to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorwright.errors import LimitError, UsageError
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.testing.plain_run import LIMITS, Harness


def refused(prompt=(3, 4), harness=None, kind=LimitError, **parameters):
    harness = harness or Harness()
    with pytest.raises(kind) as caught:
        harness.submit(prompt, **parameters)
    assert not harness.loop.has_work
    return caught.value


def test_prompt_over_max_input_len():
    error = refused([3] * 193, max_tokens=7)
    assert all(number in error.message for number in ("prompt 193", "new tokens 7", "max_seq_len 256", "192"))
    assert "--max_input_len 193" in error.mend


def test_prompt_and_new_tokens_over_max_seq_len():
    error = refused([3] * 190, max_tokens=67)
    assert all(number in error.message for number in ("257", "prompt 190", "new tokens 67", "max_seq_len 256"))
    assert "--max_seq_len 257" in error.mend
    Harness().submit([3] * 190, max_tokens=66)


def test_more_kv_than_there_is():
    harness = Harness(num_blocks=10)
    error = refused([3] * 20, harness, max_tokens=22)
    assert "44 tokens" in error.message
    assert "there are 40" in error.message
    harness.submit([3] * 20, max_tokens=21)
    (result,) = harness.run().values()
    assert result.error is None


@pytest.mark.parametrize("lanes", [{"num_return_sequences": 3}, {"beam_width": 3}])
def test_the_largest_request_that_is_accepted_runs(lanes):
    for num_blocks in range(5, 40):
        harness = Harness(num_blocks=num_blocks, block_reuse=False)
        try:
            harness.submit([3, 4, 5, 6, 3, 5], max_tokens=20, end_ids=(), temperature=1.0, **lanes)
        except LimitError:
            continue
        (result,) = harness.run(max_steps=500).values()
        assert [len(s.token_ids) for s in result.sequences] == [20] * 3
        assert num_blocks == 1 + 3 * 6
        return
    pytest.fail("never accepted")


def test_sequences_and_beams_over_the_limits():
    assert "--max_beam_width 5" in refused(beam_width=5).mend
    assert "--max_batch_size 9" in refused(num_return_sequences=9).mend
    assert "over beam_width 2" in refused(beam_width=2, num_return_sequences=3).message
    small = Harness(limits=replace(LIMITS, max_num_tokens=3))
    assert "--max_num_tokens 4" in refused(harness=small, beam_width=4).mend


@pytest.mark.parametrize("prompt", [(), [], ""])
def test_empty_prompts(prompt):
    assert "empty" in refused(prompt, kind=UsageError).message


@pytest.mark.parametrize("token", [-1, 32, 10**12])
def test_ids_out_of_range(token):
    error = refused((3, token, 4), kind=UsageError)
    assert str(token) in error.message
    assert "0 to 31" in error.message
    assert "bad_token_ids" in refused(kind=UsageError, bad_token_ids=((3, token),)).message
    assert "logit_bias" in refused(kind=UsageError, logit_bias={token: 1.0}).message


def test_text_needs_a_tokenizer():
    for wrong in ({"prompt": "hi"}, {"stop": ("x",)}, {"bad_words": ("x",)}):
        assert "--tokenizer_dir" in refused(kind=UsageError, **wrong).mend


def test_logits_need_an_engine_that_gathers():
    plain = Harness(limits=replace(LIMITS, gather_context_logits=False, gather_generation_logits=False))
    context = refused(harness=plain, kind=UsageError, return_context_logits=True)
    generation = refused(harness=plain, kind=UsageError, return_generation_logits=True)
    assert "--gather_context_logits" in context.mend
    assert "--gather_generation_logits" in generation.mend
    assert "--gather_all_token_logits" in context.mend
    assert "beam" in refused(kind=UsageError, return_generation_logits=True, beam_width=2).message


def test_parameters_are_checked_where_they_are_made():
    nan = float("nan")
    for wrong in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"seed": -1}, {"beam_width": 0},
                  {"num_return_sequences": 0}, {"no_repeat_ngram_size": -1}, {"presence_penalty": nan},
                  {"frequency_penalty": nan}, {"length_penalty": nan}, {"temperature": float("inf")}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            SamplingParameters(**wrong)
