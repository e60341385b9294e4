"""One Triton request from its arrival to its last response: rows, deadline, and the rule that it ends exactly once.

It knows Triton's response sender, and neither threads nor the engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tensorwright.serve.triton.fields import Ask

if TYPE_CHECKING:
    from tensorwright.runtime.results import Result


class Handle(Protocol):
    """What the engine gives for a submitted row."""

    def cancel(self) -> None:
        """End the generation at the next step."""


class Sender(Protocol):
    """Triton's response sender. After the final flag it must not be touched: its memory is gone."""

    def send(self, response: Any = None, flags: int = 0) -> None:
        """Send one response, or only the flag."""

    def is_cancelled(self) -> bool:
        """Whether the client left. Asks the server: about 0.1 ms."""


@dataclass
class Row:
    """One prompt of a request."""

    ask: Ask
    result: Result | None = None
    cumulative: dict[int, float] = field(default_factory=dict)  # log probability so far, per sequence
    num_tokens: dict[int, int] = field(default_factory=dict)  # generated so far, per sequence
    started_s: float | None = None  # when its first token came


class Exchange:
    """Mutable state of one request. All but `attach` is called by the responder's thread only."""

    def __init__(self, pb: Any, sender: Sender) -> None:
        self.pb = pb
        self.sender = sender
        self.rows: list[Row] = []
        self.handles: list[Handle] = []
        self.done = False
        self.has_answered = False
        self.opened_s = time.monotonic()
        self.checked_s = self.opened_s

    @property
    def is_stream(self) -> bool:
        """Whether any row wants pieces."""
        return any(row.ask.stream for row in self.rows)

    def attach(self, handle: Handle) -> None:
        """Remember a running row, from the thread that submits; it may have been ended in between."""
        self.handles.append(handle)
        if self.done:
            handle.cancel()

    def send(self, tensors: Sequence[Any], *, final: bool) -> None:
        """Send one response; the last one carries the final flag."""
        self.has_answered = True
        self._send(self.pb.InferenceResponse(output_tensors=list(tensors)), final=final)

    def fail(self, message: str, code: int) -> None:
        """Send an error as the last response, and stop what is running."""
        error = self.pb.TritonError(message, code)
        try:
            self._send(self.pb.InferenceResponse(error=error), final=True)
        finally:  # after `done` is set, so that `attach` and this do not miss each other
            for handle in self.handles:
                handle.cancel()

    def is_cancelled(self, now: float) -> bool:
        """Whether the client left, as Triton knows now."""
        self.checked_s = now
        return not self.done and self.sender.is_cancelled()

    def _send(self, response: Any, *, final: bool) -> None:
        if self.done:
            return
        self.done = final
        self.sender.send(response, flags=self.pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
