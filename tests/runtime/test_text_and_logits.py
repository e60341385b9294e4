"""What requests get besides tokens: text, stop words, bad words, logits."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from tensorwright.runtime.tokenizer import Tokenizer
from tensorwright.testing.fake_executor import plain_logits
from tensorwright.testing.plain_run import LIMITS, Harness
from tensorwright.testing.text import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def reciting(tokenizer, answer):
    """Logits of a model that says `answer` after any prompt, then ends."""
    script = [*tokenizer.encode_plain(answer), 2]

    def logits(tokens):
        done = len(tokens) - reciting.prompt_length
        row = plain_logits(tokens, tokenizer.vocab_size)
        row[script[min(done, len(script) - 1)]] = 50
        return row

    return logits


def answer(tokenizer, text, *, num_blocks=64, **parameters):
    prompt = tokenizer.encode("hi how")
    reciting.prompt_length = len(prompt)
    harness = Harness(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer, logits=reciting(tokenizer, text))
    harness.submit("hi how", **{"max_tokens": 60, **parameters})
    (result,) = harness.run().values()
    pieces = "".join(update.text for update in harness.updates if update.sequence == 0)
    assert pieces == result.sequences[0].text
    return result.sequences[0]


@pytest.mark.parametrize("how", [{}, {"beam_width": 2}])
def test_text_ends_at_the_end_token(tokenizer, how):
    got = answer(tokenizer, "I'm doing well, héllo 🙂 你好.", **how)
    assert got.text == "I'm doing well, héllo 🙂 你好."
    assert got.finish_reason == "stop"
    assert got.token_ids[-1] == 2


@pytest.mark.parametrize("how", [{}, {"beam_width": 2}])
def test_stop_words_are_cut_off_wherever_tokens_split(tokenizer, how):
    got = answer(tokenizer, "I'm doing well, thank you", stop=("ll, th", "never"), **how)
    assert got.text == "I'm doing we"
    assert got.finish_reason == "stop"
    assert got.token_ids[-1] != 2


@pytest.mark.parametrize("how", [{}, {"beam_width": 2}])
def test_stop_tokens_are_cut_off_whole(tokenizer, how):
    sequence = tuple(tokenizer.encode_plain(" well,"))
    assert len(sequence) > 1
    got = answer(tokenizer, "I'm doing well, thank you", stop_token_ids=(sequence, (0, 0)), **how)
    assert got.text == "I'm doing"
    assert got.finish_reason == "stop"


def test_half_a_stop_word_at_the_end_is_given_out(tokenizer):
    got = answer(tokenizer, "I'm doing well", stop=("well, thank",), stop_token_ids=((tokenizer.end_ids[0] + 5, 9),))
    assert got.text == "I'm doing well"


def test_length_ends_with_its_reason(tokenizer):
    got = answer(tokenizer, "I'm doing well, thank you", max_tokens=3)
    assert got.finish_reason == "length"
    assert len(got.token_ids) == 3


def test_bad_words_do_not_appear(tokenizer):
    got = answer(tokenizer, "I'm doing well, thank you", bad_words=("well", "thank"))
    assert "well" not in got.text
    assert "thank" not in got.text


def test_text_of_id_prompts_is_shown(tokenizer):
    harness = Harness(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)
    harness.submit(tokenizer.encode("hi how"), max_tokens=1)
    assert harness.run()[0].prompt == "<s>hi how"


@pytest.mark.parametrize("num_blocks", [64, 18])
def test_context_and_generation_logits(num_blocks):
    limits = replace(LIMITS, max_seq_len=60, max_num_tokens=7)
    harness = Harness(limits=limits, num_blocks=num_blocks)
    for first in range(3):
        harness.submit(range(first, first + 20), max_tokens=20, end_ids=(), return_context_logits=True,
                       return_generation_logits=True)
    for result in harness.run().values():
        prompt = result.prompt_token_ids
        (sequence,) = result.sequences
        tokens = [*prompt, *sequence.token_ids]
        expected = np.stack([plain_logits(tokens[: n + 1]) for n in range(len(tokens))])
        assert result.num_cached_tokens == 0
        np.testing.assert_array_equal(result.context_logits, expected[: len(prompt)])
        np.testing.assert_array_equal(sequence.generation_logits, expected[len(prompt) - 1 : -1])
        assert sequence.generation_logits.dtype == np.float32
    assert num_blocks == 64 or harness.loop.scheduler.num_preemptions


def test_long_context_logits_come_in_bounded_steps():
    limits = replace(LIMITS, max_num_tokens=1000, max_seq_len=400, max_input_len=399)
    harness = Harness(limits=limits, num_blocks=200)
    most = []
    execute = harness.executor.execute

    def counting(batch):
        most.append(len(batch.output_rows))
        return execute(batch)

    harness.executor.execute = counting
    harness.submit([3] * 300, max_tokens=2, return_context_logits=True)
    harness.submit([4] * 300, max_tokens=2, return_context_logits=True)
    results = harness.run()
    assert max(most) <= 130
    assert [result.context_logits.shape for result in results.values()] == [(300, 32)] * 2
    np.testing.assert_array_equal(results[1].context_logits[299], plain_logits([4] * 300))


def test_logits_come_in_the_engine_s_type():
    harness = Harness(limits=replace(LIMITS, logits_dtype="bfloat16"))
    harness.submit((3, 4), max_tokens=2, return_context_logits=True, return_generation_logits=True)
    (result,) = harness.run().values()
    assert result.context_logits.dtype == ml_dtypes.bfloat16
    assert result.sequences[0].generation_logits.dtype == ml_dtypes.bfloat16
