"""The text of one sequence as its tokens arrive, cut at stop words and stop tokens. It knows no request.

Stop words are matched on decoded text, so it does not matter how the model splits them; stop token sequences are
matched on ids, and none of their text is given out even when it comes token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorwright.runtime.detokenizer import Detokenizer
from tensorwright.runtime.stop import StopMatcher
from tensorwright.runtime.tokenizer import Tokenizer


class TextWriter:
    """Push tokens, get text. Without a tokenizer the text stays empty and stop tokens work all the same."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], stop: Sequence[str],
                 stop_token_ids: Sequence[Sequence[int]]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids) if tokenizer else None
        self._matcher = StopMatcher(stop)
        self._sequences = [list(sequence) for sequence in stop_token_ids if sequence]
        self._held: list[int] = []  # tokens that may begin a stop sequence

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop word or stop sequence has ended the sequence."""
        self._held.append(token)
        for sequence in self._sequences:
            if self._held[-len(sequence) :] == sequence:
                del self._held[-len(sequence) :]
                return self.finish()[0], True
        return self._write(len(self._held) - self._num_undecided())

    def finish(self) -> tuple[str, bool]:
        """What was held back, when no more tokens come, and whether it ended in a stop word after all."""
        text, stopped = self._write(len(self._held))
        if not stopped and self._detokenizer:
            rest, stopped = self._matcher.push(self._detokenizer.flush())
            text += rest
        return (text, True) if stopped else (text + self._matcher.flush(), False)

    def _num_undecided(self) -> int:
        """Length of the longest end of the held tokens that begins a stop sequence."""
        longest = min(len(self._held), max(map(len, self._sequences), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(sequence[:length] == self._held[-length:] for sequence in self._sequences):
                return length
        return 0

    def _write(self, count: int) -> tuple[str, bool]:
        text, tokens = "", self._held[:count]
        del self._held[:count]
        if self._detokenizer:
            for token in tokens:
                piece, stopped = self._matcher.push(self._detokenizer.push(token))
                text += piece
                if stopped:
                    return text, True
        return text, False
