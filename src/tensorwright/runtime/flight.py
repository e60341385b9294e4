"""A step that was started and whose tokens may still be on their way. It knows lanes and rows, no scheduling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tensorwright.runtime.batch import Draw, Floats, SamplingRow
from tensorwright.runtime.constraints import FORBIDDEN
from tensorwright.runtime.request import TokenSequence
from tensorwright.runtime.scheduler import Schedule


@dataclass(frozen=True)
class Choice:
    """What a step found for one sequence: a token, or for beams, which draw none, a row of logits [vocabulary]."""

    token: int = -1
    log_prob: float = 0.0
    logits: Floats | None = None  # where beams or the caller want them
    is_finite: bool = True
    is_allowed: bool = True  # a forbidden token is only drawn where every token is forbidden


@dataclass(frozen=True)
class Flight:
    """A schedule that runs: how each lane's token is drawn, in the order of the draw, and logits that are wanted."""

    schedule: Schedule
    rows: Mapping[TokenSequence, SamplingRow]
    logits: Mapping[TokenSequence, Floats]
    draw: Draw | None  # None: no lane gets a token

    @property
    def places(self) -> dict[TokenSequence, int]:
        """The number of each lane's token in the draw."""
        return {lane: place for place, lane in enumerate(self.rows)}

    @property
    def needs_landing(self) -> bool:
        """Whether the next step depends on what this one chooses."""
        return any(lane.request.needs_tokens for lane in (*self.rows, *self.logits))

    def land(self) -> dict[TokenSequence, Choice]:
        """Wait for the tokens; a choice for every sequence whose tokens are all computed."""
        with np.errstate(all="ignore"):
            choices = {lane: Choice(logits=row, is_finite=bool(np.isfinite(row.sum())))
                       for lane, row in self.logits.items()}
        if self.draw is not None:
            drawn = self.draw.result()
            numbers = zip(drawn.tokens.tolist(), drawn.log_probs.tolist(), drawn.is_finite.tolist(), strict=True)
            for (lane, row), (token, log_prob, is_finite) in zip(self.rows.items(), numbers, strict=True):
                choices[lane] = Choice(token, log_prob, self.logits.get(lane), is_finite, _is_allowed(row, token))
        return choices


def sampled_rows(schedule: Schedule) -> dict[TokenSequence, int]:
    """The row of logits for each sequence that gets a token; sequences that have not forked share the trunk's."""
    rows: dict[TokenSequence, int] = {}
    count = 0
    for chunk in schedule.chunks:
        count += len(chunk.output_positions)
        if chunk.is_sampled:
            request = chunk.sequence.request
            rows |= dict.fromkeys([chunk.sequence] if request.is_forked else request.lanes, count - 1)
    return rows


def _is_allowed(row: SamplingRow, token: int) -> bool:
    return len(row.biased) == 0 or (token, FORBIDDEN) not in zip(row.biased, row.biases, strict=True)
