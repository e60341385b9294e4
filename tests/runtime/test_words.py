"""Bad words cannot be spelled, and n-grams cannot repeat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorwright.errors import UsageError
from tensorwright.runtime.tokenizer import Tokenizer, TokenizerFiles
from tensorwright.runtime.words import BadWords, banned_by_ngrams, word_sequences
from tensorwright.testing.text import byte_level_tokenizer, metaspace_tokenizer

TOKENIZERS = {
    "byte-level": Tokenizer(byte_level_tokenizer(), TokenizerFiles()),
    "byte-fallback": Tokenizer(metaspace_tokenizer(), TokenizerFiles()),
    "metaspace": Tokenizer(metaspace_tokenizer(legacy=False), TokenizerFiles()),
}


def is_refused(banned: BadWords, ids: list[int]) -> bool:
    return any(ids[place] in banned.banned(ids[:place]) for place in range(len(ids)))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["thank", "thank you", "I thank", "I\nthank", "(thank", "wathank"])
def test_a_bad_word_is_refused_wherever_it_stands(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    banned = BadWords(word_sequences(["thank"], tokenizer))
    assert is_refused(banned, tokenizer.encode(text))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_other_words_are_allowed(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    banned = BadWords(word_sequences(["thank", "well"], tokenizer))
    assert not is_refused(banned, tokenizer.encode("hi how are you? I'm doing fine"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_spelling_in_two_parts_is_refused(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    banned = BadWords(word_sequences(["thank"], tokenizer))
    start = tokenizer.encode_plain("\n")
    for place in range(1, 5):
        parts = [tokenizer.encode_plain("\n" + part)[len(start) :] for part in ("thank"[:place], "thank"[place:])]
        assert is_refused(banned, [*start, *parts[0], *parts[1]])


def test_a_special_token_can_be_a_bad_word() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    assert (4,) in word_sequences(["<|im_end|>"], tokenizer)


@pytest.mark.parametrize("word", ["", "  "])
def test_an_empty_bad_word_is_an_error(word: str) -> None:
    with pytest.raises(UsageError, match="visible character"):
        word_sequences([word], TOKENIZERS["byte-level"])


def test_sequences_of_tokens() -> None:
    banned = BadWords([(5,), (1, 2, 3), (2, 4), (2, 6)])
    assert banned.banned([]) == [5]
    assert banned.banned([1, 2]) == [3, 4, 5, 6]
    assert banned.banned([2, 2]) == [4, 5, 6]
    with pytest.raises(UsageError):
        BadWords([()])


@given(ids=st.lists(st.integers(0, 3), max_size=30), size=st.integers(0, 4))
def test_ngrams_against_their_definition(ids: list[int], size: int) -> None:
    seen = {tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)} if size else set()
    expected = [token for token in range(4) if size and (*ids[len(ids) - size + 1 :], token) in seen]
    if len(ids) < size:
        expected = []
    assert banned_by_ngrams(ids, size) == expected
