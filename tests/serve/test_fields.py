"""What a request's values mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorwright.errors import UsageError
from tensorwright.serve.triton.fields import INPUTS, Ask, read_asks
from tensorwright.testing.fake_triton import as_input


def ask(**values: Any) -> Ask:
    inputs = {"text_input": "hi", "max_tokens": 4, **values}
    return read_asks({name: as_input(value) for name, value in inputs.items()}, {})[0]


def test_only_the_required_fields_mean_greedy() -> None:
    parameters = ask().parameters
    assert (parameters.max_tokens, parameters.temperature, parameters.seed) == (4, 0.0, 0)
    assert parameters.end_ids is None
    assert parameters.stop == ()


@pytest.mark.parametrize(("values", "temperature"), [
    ({"temperature": 0.5}, 0.5), ({"temperature": 0.5, "top_k": 0, "top_p": 0.0}, 0.5), ({"top_k": 1}, 0.0),
    ({"top_k": 40}, 1.0), ({"top_p": 0.9}, 1.0), ({"top_p": 0.0}, 0.0), ({"top_k": 40, "temperature": 0.0}, 0.0)])
def test_what_samples(values: dict[str, Any], temperature: float) -> None:
    assert ask(**values).parameters.temperature == pytest.approx(temperature)


def test_word_lists_as_old_clients_send_them() -> None:
    assert ask(stop_words="", bad_words=[]).parameters.stop == ()
    parameters = ask(stop_words=["</s>", "é"], bad_words="no").parameters
    assert parameters.stop == ("</s>", "é")
    assert parameters.bad_words == ("no",)


def test_seed_has_two_names() -> None:
    assert ask(random_seed=7).parameters.seed == 7
    assert ask(seed=2**63 + 1).parameters.seed == 2**63 + 1
    assert ask(seed=3, random_seed=3).parameters.seed == 3
    with pytest.raises(UsageError, match="two names"):
        ask(seed=3, random_seed=4)


def test_end_id() -> None:
    assert ask(end_id=2).parameters.end_ids == (2,)
    assert ask(end_id=-1).parameters.end_ids == ()


def test_bias_words_need_as_many_weights() -> None:
    assert ask(embedding_bias_words=["a", "b"], embedding_bias_weights=[1.0, -2.0]).bias_words == (("a", 1.0),
                                                                                                    ("b", -2.0))
    with pytest.raises(UsageError, match="1 words and 2 weights"):
        ask(embedding_bias_words=["a"], embedding_bias_weights=[1.0, -2.0])


def test_rows_are_read_apart() -> None:
    texts = np.array([[b"a"], [b"b"]], dtype=object)
    asks = read_asks({"text_input": texts, "max_tokens": np.array([[3], [4]])}, {})
    assert [(a.prompt, a.parameters.max_tokens) for a in asks] == [("a", 3), ("b", 4)]
    with pytest.raises(UsageError, match="same number of rows"):
        read_asks({"text_input": texts, "max_tokens": np.array([[3]])}, {})


@pytest.mark.parametrize(("name", "message"), [
    ("temprature", "did you mean 'temperature'"), ("max_token", "did you mean 'max_tokens'"),
    ("stop", "did you mean 'stop_words'"), ("identity", "known fields"),
    ("lora_task_id", "LoRA"), ("decoder_text_input", "encoder"), ("xyzzy", "known fields")])
def test_unknown_fields_are_named(name: str, message: str) -> None:
    inputs = {"text_input": as_input("hi"), "max_tokens": as_input(1)}
    with pytest.raises(UsageError, match=message) as caught:
        read_asks(inputs, {name: 1})
    assert name in caught.value.message


def test_tritons_own_parameters_pass() -> None:
    inputs = {"text_input": as_input("hi"), "max_tokens": as_input(1)}
    assert read_asks(inputs, {"triton_enable_empty_final_response": True, "sequence_id": 0, "id": "42"})


def test_what_is_not_supported_may_be_sent_switched_off() -> None:
    inputs = {"text_input": as_input("hi"), "max_tokens": as_input(1)}
    off = {"use_draft_logits": False, "decoder_text_input": "", "return_kv_cache_reuse_stats": False}
    assert read_asks(inputs, off)
    for name, value in (("use_draft_logits", True), ("lora_task_id", 0), ("temprature", False)):
        with pytest.raises(UsageError, match=name):
            read_asks(inputs, {name: value})


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UsageError, match="text_input must be UTF-8"):
        ask(text_input=b"a\xff")


@given(st.text(min_size=1), st.integers(1, 2**31 - 1))
def test_prompt_and_length_arrive_unchanged(prompt: str, max_tokens: int) -> None:
    if "\0" not in prompt and all(not 0xD800 <= ord(c) < 0xE000 for c in prompt):
        read = ask(text_input=prompt, max_tokens=max_tokens)
        assert (read.prompt, read.parameters.max_tokens) == (prompt, max_tokens)


def test_names_of_the_old_ensemble_are_inputs() -> None:
    old = {"text_input", "max_tokens", "bad_words", "stop_words", "end_id", "pad_id", "temperature", "top_p", "top_k",
           "length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_length", "random_seed",
           "beam_width", "stream", "return_log_probs", "return_context_logits", "return_generation_logits",
           "embedding_bias_words", "embedding_bias_weights", "num_return_sequences", "exclude_input_in_output"}
    assert old <= {field.name for field in INPUTS}
    assert [field.name for field in INPUTS if field.required] == ["text_input", "max_tokens"]
