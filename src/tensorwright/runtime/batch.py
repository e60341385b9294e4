"""One step's arrays, as the executor takes them. See `program.ops` for what each means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """All int32 and C-contiguous. tokens T, sequences S, rows that get logits R."""

    token_ids: Ints  # [T]; −1 − i: what was drawn from the step before this one as number i
    positions: Ints  # [T]
    slots: Ints  # [T]
    query_starts: Ints  # [S]
    query_lengths: Ints  # [S]
    kv_lengths: Ints  # [S], the step's own tokens included
    block_tables: Ints  # [S, width], padded with 0
    output_rows: Ints  # [R]


@dataclass(frozen=True)
class SamplingRow:
    """How one row of logits becomes a token: the plain numbers behind a request's sampling parameters."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    uniform: float = 0.0  # random number in [0, 1)
    seen: tuple[int, ...] | Ints = ()  # tokens of prompt and output, each once; empty when no penalty is set
    counts: tuple[int, ...] | Ints = ()  # times each was generated
    biased: tuple[int, ...] | Ints = ()  # token ids
    biases: tuple[float, ...] | Floats = ()  # added to their logits; -inf forbids


class Logits(Protocol):
    """A step's logits [R, V] where its executor left them, until its next step. NumPy arrays are such."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, V)."""

    def __len__(self) -> int:
        """R."""

    def __getitem__(self, rows: Any, /) -> Any:
        """A row or a slice of rows as NumPy arrays; the rows of a list as `Executor.sample` takes them."""


@dataclass(frozen=True)
class Drawn:
    """A token per row of logits, all [R]."""

    tokens: Ints
    log_probs: Floats  # natural logarithms, under the unchanged logits
    is_finite: NDArray[np.bool_]  # whether every logit of the row is a finite number

    def result(self) -> Drawn:
        """Itself: it is there already."""
        return self


class Draw(Protocol):
    """Tokens that may still be on their way."""

    def result(self) -> Drawn:
        """Wait for them. To be asked for before the step after the next is sampled."""


class Executor(Protocol):
    """What the request loop needs of an executor; tests hand in a fake one.

    Steps, samples and copies take effect in the order of the calls, whether or not they have ended when a call returns.
    """

    vocab_size: int
    num_blocks: int
    block_size: int
    runs_ahead: bool  # calls return before they are done, and a batch may name what the last draw will bring

    def execute(self, batch: Batch) -> Logits:
        """Logits float32 [R, vocab_size], overwritten by the next call."""

    def sample(self, logits: Any, rows: Sequence[SamplingRow]) -> Draw:
        """A token for each row of what `execute` gave."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination) in every layer: for sequences that fork."""
