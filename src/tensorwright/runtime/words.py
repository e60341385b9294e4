"""Words and repeated n-grams that must not be generated, as token ids. Knows no sampling: it only names tokens.

A bad word is forbidden as the tokenizer writes it alone, after a space and inside a word, and in each of those also as
any two parts, each written as the tokenizer would. A spelling in three or more unusual parts is not caught, nor is
another letter case; and a longer token that merely holds the word ("class") is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorwright.errors import UsageError
from tensorwright.runtime.tokenizer import Tokenizer

ANCHOR = "\n"  # text before a word, for tokenizers that mark the beginning of a text with a space
MAX_SPLIT_LENGTH = 64  # characters; a longer word is forbidden undivided only


def word_sequences(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The token sequences of bad words, each once.

    Raises:
        UsageError: an empty word, or one that the tokenizer has no tokens for.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        sequences = [sequence for sequence in _spellings(word, tokenizer) if sequence]
        if not word.strip() or not sequences:
            raise UsageError(f"a bad word needs at least one visible character; got {word!r}")
        found.update(dict.fromkeys(sequences))
    return list(found)


class BadWords:
    """Token sequences that must not appear."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._last: dict[tuple[int, ...], list[int]] = {}  # all but the last token, to the last tokens
        for sequence in sequences:
            if len(sequence) == 0:
                raise UsageError("a bad word has no tokens")
            self._last.setdefault(tuple(sequence[:-1]), []).append(sequence[-1])
        self._lengths = sorted({len(head) for head in self._last})

    def banned(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens that would complete a sequence after `token_ids`, ascending."""
        found: set[int] = set()
        for length in self._lengths:
            if length <= len(token_ids):
                found.update(self._last.get(tuple(token_ids[len(token_ids) - length :]), ()))
        return sorted(found)


def banned_by_ngrams(token_ids: Sequence[int], size: int) -> list[int]:
    """The tokens that would repeat an n-gram of `size` tokens, ascending. Size 0 or less forbids nothing."""
    if size <= 0 or len(token_ids) < size:
        return []
    ids = token_ids if isinstance(token_ids, (list, tuple)) else list(token_ids)
    head = ids[len(ids) - size + 1 :]
    if not head:
        return sorted(set(ids))
    return sorted({ids[start + size - 1] for start in _places(ids, head)})


def _places(ids: Sequence[int], head: Sequence[int]) -> Iterator[int]:
    """Where `head` stands in `ids` with a token after it."""
    start = -1
    last_start = len(ids) - len(head) - 1
    while True:
        try:
            start = ids.index(head[0], start + 1, last_start + 1)
        except ValueError:
            return
        if ids[start : start + len(head)] == head:
            yield start


def _spellings(word: str, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    bare = word.strip()
    for text in (bare, " " + bare):
        yield _inside(text, tokenizer)
        if len(text) <= MAX_SPLIT_LENGTH:
            for place in range(1, len(text)):
                yield _inside(text[:place], tokenizer) + _inside(text[place:], tokenizer)
    yield tuple(tokenizer.encode_plain(bare))


def _inside(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens of the text as they are when other text stands before it."""
    anchor = tokenizer.encode_plain(ANCHOR)
    ids = tokenizer.encode_plain(ANCHOR + text)
    return tuple(ids[len(anchor) :]) if ids[: len(anchor)] == anchor else tuple(tokenizer.encode_plain(text))
