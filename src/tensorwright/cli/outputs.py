"""Results on the console, in the form that scripts around `examples/run.py` read. It knows no files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwright.runtime.results import Generated, Result, Update
    from tensorwright.runtime.tokenizer import Tokenizer

QUIET_LEVELS = ("internal_error", "error", "warning")


@dataclass
class Console:
    """What is printed, on rank 0 only. `is_quiet` leaves only results."""

    is_leader: bool = True
    is_quiet: bool = False

    def info(self, text: str) -> None:
        """A line about the run."""
        if not self.is_quiet:
            self.result(text)

    def result(self, text: str, end: str = "\n") -> None:
        """A line or a piece of the result."""
        if self.is_leader:
            print(text, end=end, flush=True)


@dataclass(frozen=True)
class Labels:
    """Names of sequences: `Text 0 Beam 0`, or `Text 0 Seq 1 Beam 0` when each prompt has several."""

    beam_width: int = 1
    num_return_sequences: int = 1

    def of(self, prompt: int, sequence: int) -> str:
        """The name of one sequence. With beams, the returned sequences are the best beams."""
        if self.num_return_sequences == 1 or self.beam_width > 1:
            return f"Text {prompt} Beam {sequence}"
        return f"Text {prompt} Seq {sequence} Beam 0"


def show_results(console: Console, results: Sequence[Result], labels: Labels, tokenizer: Tokenizer | None) -> None:
    """Two lines per sequence, as `Input [Text 0]: "..."` and `Output [Text 0 Beam 0]: "..."`."""
    for prompt, result in enumerate(results):
        console.result(f'Input [Text {prompt}]: "{prompt_text(result.prompt_token_ids, tokenizer)}"')
        for sequence, generated in enumerate(result.sequences):
            console.result(f'Output [{labels.of(prompt, sequence)}]: "{_text(generated, tokenizer)}"')
    show_errors(console, results)


def show_errors(console: Console, results: Sequence[Result]) -> None:
    """A line for each prompt that failed."""
    for prompt, result in enumerate(results):
        if result.error:
            console.result(f"Error [Text {prompt}]: {result.error}")


def prompt_text(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """The prompt as the model sees it, special tokens included."""
    return _numbers(ids) if tokenizer is None else tokenizer.decode(ids, skip_special=False)


@dataclass
class Stream:
    """Prints pieces as they come. One sequence is written on; several get a line each, every `interval` tokens."""

    console: Console
    labels: Labels
    prompts: Sequence[str]
    num_sequences: int
    interval: int = 1
    whole_text: bool = False  # also one sequence gets lines with all of its text
    has_text: bool = True  # without a tokenizer, token ids are shown
    _texts: dict[tuple[int, int], str] = field(default_factory=dict)
    _pending: dict[tuple[int, int], int] = field(default_factory=dict)  # tokens since the last line
    _shown: int = 0  # characters written of the only sequence

    def start(self) -> None:
        """The prompts, then the beginning of the only output's line."""
        for number, text in enumerate(self.prompts):
            self.console.result(f'Input [Text {number}]: "{text}"')
        if self._writes_on:
            self.console.result(f'Output [{self.labels.of(0, 0)}]: "', end="")

    def show(self, prompt: int, update: Update) -> None:
        """News of one sequence."""
        key = (prompt, update.sequence)
        piece = update.text if self.has_text else "".join(f"{token_id} " for token_id in update.token_ids)
        self._texts[key] = self._texts.get(key, "") + piece
        self._pending[key] = self._pending.get(key, 0) + len(update.token_ids)
        if self._pending[key] >= self.interval or update.finish_reason is not None:
            self._pending[key] = 0
            self._write(key, is_last=update.finish_reason is not None)

    @property
    def _writes_on(self) -> bool:
        return self.num_sequences == 1 and not self.whole_text

    def _write(self, key: tuple[int, int], *, is_last: bool) -> None:
        text = self._texts[key]
        if self._writes_on:
            self.console.result(text[self._shown :] + ('"\n' if is_last else ""), end="")
            self._shown = len(text)
        else:
            self.console.result(f'Output [{self.labels.of(*key)}]: "{text}"')


def _text(generated: Generated, tokenizer: Tokenizer | None) -> str:
    return _numbers(generated.token_ids) if tokenizer is None else generated.text


def _numbers(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def make_printable() -> None:
    """Let stdout take every character, whatever the terminal's encoding: unknown ones are escaped."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
