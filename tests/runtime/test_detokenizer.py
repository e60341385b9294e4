"""Pieces of text join to exactly what decoding everything at once gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorwright.runtime.detokenizer import Detokenizer
from tensorwright.runtime.tokenizer import Tokenizer, TokenizerFiles
from tensorwright.testing.text import END_ID, byte_level_tokenizer, metaspace_tokenizer

BACKENDS = {
    "byte-level": byte_level_tokenizer(),
    "byte-fallback": metaspace_tokenizer(),
    "metaspace": metaspace_tokenizer(legacy=False),
}
TOKENIZERS = {name: Tokenizer(backend, TokenizerFiles()) for name, backend in BACKENDS.items()}
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that stand for themselves
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTER_OF = {**{byte: chr(byte) for byte in PRINTABLE}, **{byte: chr(0x100 + n) for n, byte in enumerate(OTHERS)}}
IDS = st.lists(st.integers(0, 430), max_size=40)  # some are outside the vocabulary


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(ids=IDS)
def test_pieces_of_random_ids_join_to_the_whole(name: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    assert "".join(stream(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30) | st.text("a\ufffd🦄", max_size=5), ids=IDS)
def test_the_output_continues_a_prompt_of_text(name: str, text: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = tokenizer.encode(text)
    joined = tokenizer.decode(prompt) + "".join(stream(Detokenizer(tokenizer, prompt), ids))
    whole = tokenizer.decode(prompt + ids)
    if not (prompt and ids and tokenizer.is_byte(prompt[-1])):  # a wrong byte may change a prompt's run of bytes
        assert joined == whole


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_a_prompt_may_end_inside_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("thank you 🦄 you")
    for place in range(1, len(ids)):
        output = "".join(stream(Detokenizer(tokenizer, ids[:place]), ids[place:]))
        assert tokenizer.decode(ids[:place]).rstrip("\ufffd") + output == "thank you 🦄 you"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_holds_half_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = "hi 🙂 你好 ∀x 🦄 well"
    pieces = stream(Detokenizer(tokenizer, tokenizer.encode("hi")), tokenizer.encode_plain(text))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces).strip() == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_keep_the_space_between_prompt_and_output(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = tokenizer.encode("hi")
    output = tokenizer.encode("hi how are")[len(prompt) :]
    assert "".join(stream(Detokenizer(tokenizer, prompt), output)) == " how are"


def test_special_tokens_give_no_text_and_do_not_eat_the_next_space() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    words = tokenizer.encode_plain("you")
    detokenizer = Detokenizer(tokenizer, words)
    assert detokenizer.push(END_ID) == ""
    assert "".join(stream(detokenizer, words)) == " you"


def test_text_comes_with_its_token_when_nothing_is_undecided() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode_plain("hi how are you?")
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token_id) for token_id in ids] == [tokenizer.decode([token_id]) for token_id in ids]


@settings(max_examples=50, deadline=None)
@given(bytes_=st.lists(st.sampled_from([0x41, 0x80, 0xBF, 0xC3, 0xE4, 0xF0, 0x9F, 0xFF]), max_size=300))
def test_endless_broken_bytes(bytes_: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [BACKENDS["byte-level"].token_to_id(LETTER_OF[byte]) for byte in bytes_]
    assert "".join(stream(Detokenizer(tokenizer), ids)) == bytes(bytes_).decode(errors="replace")


def test_an_end_of_broken_bytes_is_given_by_flush() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    half = tokenizer.encode_plain("🦄")[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push(token_id) for token_id in half) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
