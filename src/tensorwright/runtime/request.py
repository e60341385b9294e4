"""A request and the token sequences that it grows. Plain state: no numpy, nothing about how it is computed or sampled.

A request's life: waiting → running (its prompt is computed in chunks, then a token per step) → finished. When blocks
run short it goes back to waiting and its tokens are computed again. Several sequences of one request share the
prompt: its first sequence, the trunk, computes it, and the others fork from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from tensorwright.runtime.kv_blocks import BlockTable
from tensorwright.runtime.parameters import SamplingParameters

if TYPE_CHECKING:
    from tensorwright.runtime.beams import BeamGroup
    from tensorwright.runtime.constraints import Constraints, TokenCounts
    from tensorwright.runtime.results import Generated, Update
    from tensorwright.runtime.text_writer import TextWriter


@dataclass(eq=False)
class TokenSequence:
    """One line of tokens: the prompt, then what was generated. Tokens from `num_computed` on are not in the cache.

    Where steps are started before the tokens of the last one are known, `num_expected` tokens follow the known ones.
    """

    request: Request
    index: int
    tokens: list[int]
    num_computed: int = 0
    num_expected: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    text: str = ""
    log_probs: list[float] = field(default_factory=list)
    cumulative_log_prob: float = 0.0
    logits: list[Any] = field(default_factory=list)  # a float32 row per generated token, for requests that ask
    writer: TextWriter | None = None
    counts: TokenCounts | None = None  # only where a penalty needs them

    def append(self, token: int, log_prob: float) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self.num_expected -= 1
        self.log_probs.append(log_prob)
        self.cumulative_log_prob += log_prob
        if self.counts:
            self.counts.add(token)

    def write(self, token: int) -> tuple[str, bool]:
        """Text of a token, and whether a stop word ends the sequence."""
        return self.writer.push(token) if self.writer else ("", False)

    def finish_text(self) -> tuple[str, bool]:
        """Text that was held back, and whether it ends in a stop word."""
        return self.writer.finish() if self.writer else ("", False)

    @property
    def length(self) -> int:
        """Tokens, those that started steps will bring included."""
        return len(self.tokens) + self.num_expected

    @property
    def may_grow(self) -> bool:
        """Whether another token is wanted after those that are expected."""
        parameters, prompt = self.request.parameters, self.request.prompt_token_ids
        return not self.num_expected or self.length < len(prompt) + parameters.max_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that the next steps have to compute."""
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens that follow the prompt."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[len(self.request.prompt_token_ids) :]


@dataclass(eq=False)
class Request:
    """What was asked, how far it is, and what has ended. `cancel` may be called from any thread."""

    id: int
    prompt: str
    prompt_token_ids: tuple[int, ...]
    parameters: SamplingParameters
    end_ids: frozenset[int]
    on_update: Callable[[Update], None]
    constraints: Constraints
    beams: BeamGroup | None = None
    lanes: list[TokenSequence] = field(default_factory=list)  # sequences that still grow
    is_forked: bool = False  # every lane has its own block table
    finished: dict[int, Generated] = field(default_factory=dict)  # by index of the sequence
    num_cached_tokens: int | None = None  # prompt tokens found in the cache, known at the first admission
    context_logits: Any = None  # float32 [prompt tokens, vocabulary]
    num_context_rows: int = 0
    submitted_at: float = field(default_factory=monotonic)
    first_token_at: float | None = None
    cancel_requested: bool = False
    is_closed: bool = False  # the caller has the result
    error: str | None = None

    def cancel(self) -> None:
        """Ask for the end of this request: it stops before the next step and its blocks are free at once."""
        self.cancel_requested = True

    @property
    def seats(self) -> int:
        """Places that the request takes of max_batch_size; beams share one (max_beam_width multiplies it)."""
        return 1 if self.beams else len(self.lanes)

    @property
    def needs_tokens(self) -> bool:
        """Whether what the last step chose must be known before the next one can be started."""
        return self.beams is not None or self.constraints.follow_tokens

    def targets(self) -> list[tuple[TokenSequence, int]]:
        """Sequences that may advance now, each with the position that it may reach."""
        if len(self.lanes) > 1 and not self.is_forked:
            return [(self.lanes[0], len(self.prompt_token_ids))]
        if self.beams and any(lane.num_pending > 1 for lane in self.lanes) and len(self.lanes) > 1:
            # Beams are compared with each other: none may take its next token before all have caught up.
            return [(lane, len(lane.tokens) - 1) for lane in self.lanes if lane.num_pending > 1]
        return [(lane, lane.length) for lane in self.lanes if lane.may_grow]


def most_blocks(prompt_length: int, total_length: int, lanes: int, block_size: int) -> int:
    """KV blocks that a request can come to hold: full blocks of the prompt are shared, the last token is not cached."""
    shared = prompt_length // block_size
    return shared + lanes * (-(-(total_length - 1) // block_size) - shared)
