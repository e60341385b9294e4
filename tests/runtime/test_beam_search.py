"""Beam search against transformers on a small random model, and against trying every sequence."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tensorwright.runtime.sampling import log_softmax
from tensorwright.testing.fake_executor import plain_logits
from tensorwright.testing.plain_run import LIMITS, Harness

PROMPT = (3, 4, 5, 6, 7)


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.9, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def theirs(model, width, length_penalty, early_stopping, length):
    import torch

    out = model.generate(
        torch.tensor([PROMPT]), num_beams=width, num_return_sequences=width, do_sample=False, max_new_tokens=length,
        length_penalty=length_penalty, early_stopping=early_stopping, return_dict_in_generate=True, output_scores=True)
    rows = []
    for tokens in out.sequences[:, len(PROMPT):].tolist():
        ends = [i for i, token in enumerate(tokens) if token in (1, 2)]
        rows.append(tuple(tokens[: ends[0] + 1] if ends else tokens))
    return rows, out.sequences_scores.tolist()


@pytest.fixture(scope="module")
def our_logits(model):
    import torch

    known = {}

    def logits(tokens):
        if tuple(tokens) not in known:
            with torch.no_grad():
                known[tuple(tokens)] = model(torch.tensor([tokens])).logits[0, -1].numpy()
        return known[tuple(tokens)]

    return logits


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("early_stopping", [1, 0, 2])
def test_beams_are_those_of_transformers(model, our_logits, width, length_penalty, early_stopping):
    rows, scores = theirs(model, width, length_penalty, {1: True, 0: False, 2: "never"}[early_stopping], 8)
    harness = Harness(vocab_size=24, end_ids=(1, 2), logits=our_logits)
    harness.submit(PROMPT, max_tokens=8, beam_width=width, length_penalty=length_penalty,
                   early_stopping=early_stopping)
    (result,) = harness.run().values()
    assert [sequence.token_ids for sequence in result.sequences] == rows
    ours = [s.cumulative_log_prob / len(s.token_ids) ** length_penalty for s in result.sequences]
    assert ours == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("width", [36, 50])
def test_wide_beams_find_the_best_of_all_sequences(width):
    def logits(tokens):
        return plain_logits(tokens, 6)

    every = {}
    for tokens in product(range(6), repeat=3):
        score, taken = 0.0, []
        for token in tokens:
            score += float(log_softmax(logits([3, *taken]))[token])
            taken.append(token)
            if token == 2:
                break
        every[tuple(taken)] = score / len(taken)
    limits = replace(LIMITS, max_beam_width=64, max_num_tokens=64)
    harness = Harness(vocab_size=6, logits=logits, num_blocks=200, limits=limits)
    harness.submit((3,), max_tokens=3, beam_width=width, early_stopping=2)
    (result,) = harness.run().values()
    best = sorted(every, key=lambda tokens: -every[tokens])
    assert [s.token_ids for s in result.sequences][:10] == best[:10]


@pytest.mark.parametrize(("asked", "count"), [(None, 4), (1, 1), (2, 2), (4, 4)])
def test_as_many_beams_as_asked_for(asked, count):
    harness = Harness()
    harness.submit(PROMPT, max_tokens=6, beam_width=4, num_return_sequences=asked)
    (result,) = harness.run().values()
    assert len(result.sequences) == count


def test_log_probs_add_up_and_the_best_comes_first():
    harness = Harness()
    harness.submit(PROMPT, max_tokens=9, beam_width=4, num_return_sequences=3, return_log_probs=True)
    (result,) = harness.run().values()
    assert len(result.sequences) == 3
    finals = [s.cumulative_log_prob / len(s.token_ids) for s in result.sequences]
    assert finals == sorted(finals, reverse=True)
    for sequence in result.sequences:
        context, expected = list(PROMPT), []
        for token in sequence.token_ids:
            expected.append(log_softmax(plain_logits(context))[token])
            context.append(token)
        assert sequence.log_probs == pytest.approx(expected)
        assert sum(sequence.log_probs) == pytest.approx(sequence.cumulative_log_prob)
    assert [update.finished for update in harness.updates] == [False, False, True]


def test_bad_words_and_biases_hold_for_beams():
    harness = Harness()
    harness.submit(PROMPT, max_tokens=12, beam_width=4, bad_token_ids=((5,), (6, 7)), no_repeat_ngram_size=1,
                   min_tokens=4, logit_bias={9: -np.inf})
    (result,) = harness.run().values()
    for sequence in result.sequences:
        output = list(sequence.token_ids)
        assert not {5, 9} & set(output)
        assert len(set(output)) == len(output)
        assert len(output) >= 4


def test_cancelled_beams_give_what_they_have():
    harness = Harness()
    request = harness.submit(PROMPT, max_tokens=50, end_ids=(), beam_width=3)
    for _ in range(4):
        harness.step()
    request.cancel()
    (result,) = harness.run().values()
    assert [(len(s.token_ids), s.finish_reason) for s in result.sequences] == [(4, "cancelled")] * 3
    assert harness.loop.blocks.num_used == 0
