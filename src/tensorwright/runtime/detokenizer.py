"""Token ids to text, piece by piece, as tokens arrive. Knows where a piece may be cut; knows no stop words.

The text of a token depends on its neighbours: a character may be spread over tokens, and some decoders drop the first
space of a text. So a short window of tokens is decoded again at each step, and what is new and certain is given.
Together the pieces are exactly what decoding the prompt and the output at once adds to the prompt's text.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorwright.runtime.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not one yet
BROKEN_TOKENS = ("ï¿½", "<0xEF><0xBF><0xBD>", BROKEN)  # that character itself, as the kinds of tokenizers write it
PROMPT_WINDOW = 8  # tokens; more than a character's 4 bytes, so that the window is in step with the characters
MAX_WINDOW = 64  # tokens; reached by models that write endless broken bytes


class Detokenizer:
    """The text of one sequence. Special tokens and ids without text give nothing."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = self._tail(prompt_ids)
        self._given = self._length_of_prompt()  # of the window's text: what was given already

    def push(self, token_id: int) -> str:
        """Add one token and return the text that is now certain; often one token's, sometimes none."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._window.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""  # one wrong byte later would change how the whole run of bytes is read
        text = self._tokenizer.decode(self._window)
        if text.endswith(BROKEN):
            piece = self._give(text[:-1])
            if len(self._window) >= MAX_WINDOW:
                self._shorten(PROMPT_WINDOW, num_held=1)
        else:
            piece = self._give(text)
            self._shorten(1, num_held=0)
        return piece

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _shorten(self, num_tokens: int, *, num_held: int) -> None:
        """Forget all but the last tokens; `num_held` characters at their end were not given yet."""
        self._window = self._window[-num_tokens:]
        self._given = len(self._tokenizer.decode(self._window)) - num_held

    def _length_of_prompt(self) -> int:
        """Its broken end is not counted: it may become a character with the first output token."""
        text = self._tokenizer.decode(self._window)
        written = "".join(self._tokenizer.token(token_id) or "" for token_id in self._window)
        return len(text) if written.endswith(BROKEN_TOKENS) else len(text.rstrip(BROKEN))

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens that have text, with the whole run of byte tokens that the prompt may end in."""
        tail: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(tail) >= PROMPT_WINDOW and not self._tokenizer.is_byte(tail[-1]):
                break
            if self._tokenizer.has_text(token_id):
                tail.append(token_id)
        return tail[::-1]
