"""Stop words, found in decoded text as it arrives. Knows text only: no tokens, no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Gives text on as soon as it cannot be part of a stop word any more.

    The stop word that is complete first ends the text; it is cut off, and so is everything after it. Where two end at
    the same character the longer one is cut off. So the result does not depend on how the text is split into pieces.
    Empty stop words are ignored.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Add text; return the text to give on, and whether a stop word has ended the sequence."""
        if self._stopped:
            return "", True
        text = self._held + piece
        found = self._first_match(text)
        if found is not None:
            self._stopped = True
            self._held = ""
            return text[:found], True
        keep = self._num_undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, when no more comes: it was no stop word after all."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Where the stop word starts that ends first (the longest of those)."""
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(matches)[1] if matches else None

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop word."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
