"""The one thread that talks to clients: it sends what the engine made, and notices who has left or is late.

Only this thread touches response senders, because a sender may not be used after its final flag. The engine's
thread just queues updates here, so its next step does not wait for a client.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from tensorwright.errors import UsageError
from tensorwright.serve.triton import answers
from tensorwright.serve.triton.exchange import Exchange
from tensorwright.serve.triton.metrics import Metrics
from tensorwright.serve.triton.settings import ServeSettings

if TYPE_CHECKING:
    from tensorwright.runtime.results import Update

POLL_S = 0.02  # at least so often every client is asked for; a stream also at each of its pieces
SHOW_S = 0.5  # gauges


class Responder:
    """Takes events from any thread through its methods, and handles them in order in its own."""

    def __init__(self, pb: Any, metrics: Metrics, settings: ServeSettings, *, logits_type: str,
                 statistics: Callable[[], Mapping[str, float]]) -> None:
        self.pb = pb
        self.metrics = metrics
        self.settings = settings
        self.logits_type = logits_type
        self.statistics = statistics
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._active: set[Exchange] = set()
        self._shown_s = 0.0
        self._next_sweep_s = 0.0
        self._thread = threading.Thread(target=self._run, name="responder", daemon=True)
        self._thread.start()

    def open(self, exchange: Exchange) -> None:
        """Watch over a request from now on."""
        self._events.put(partial(self._active.add, exchange))

    def update(self, exchange: Exchange, index: int, update: Update) -> None:
        """The engine has news of a row."""
        self._events.put(partial(self._update, exchange, index, update))

    def fail(self, exchange: Exchange, error: Exception) -> None:
        """A request cannot be served."""
        self._events.put(partial(self._fail, exchange, error))

    def close(self) -> None:
        """End what is running with an error, then the thread."""
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=POLL_S if self._active else SHOW_S)
            except Empty:
                event = self._sweep
            if event is None:
                break
            self._guard(event)
            if time.monotonic() >= self._next_sweep_s:
                self._guard(self._sweep)
        for exchange in list(self._active):
            self._guard(partial(self._end, exchange, "error", "the server is stopping",
                                self.pb.TritonError.UNAVAILABLE))

    def _guard(self, event: Callable[[], None]) -> None:
        """Run one event. One client's failure must not end the thread that answers all others."""
        try:
            event()
        except Exception as error:  # noqa: BLE001 - whatever it is, only its own request may suffer
            self.pb.Logger.log_error(f"a response could not be sent: {type(error).__name__}: {error}")

    def _update(self, exchange: Exchange, index: int, update: Update) -> None:
        if exchange.done:
            return
        try:
            self._answer(exchange, index, update)
        except Exception as error:
            self._fail(exchange, error)  # else its client would wait for ever
            raise

    def _answer(self, exchange: Exchange, index: int, update: Update) -> None:
        row = exchange.rows[index]
        self._count_tokens(exchange, index, update)
        if update.finished:
            row.result = update.result
            if update.result is None or update.result.error is not None:
                message = "the engine gave no result" if update.result is None else str(update.result.error)
                self._end(exchange, "error", message, self.pb.TritonError.INTERNAL)
                return
        if row.ask.stream:
            self._piece(exchange, index, update)
        elif update.finished:
            self._whole(exchange, index)

    def _count_tokens(self, exchange: Exchange, index: int, update: Update) -> None:
        row = exchange.rows[index]
        if update.token_ids and row.started_s is None:
            row.started_s = time.monotonic()
            self.metrics.count("first_token_seconds_sum", row.started_s - exchange.opened_s)
            self.metrics.count("first_token_seconds_count")
        sequence = update.sequence
        row.num_tokens[sequence] = row.num_tokens.get(sequence, 0) + len(update.token_ids)
        row.cumulative[sequence] = row.cumulative.get(sequence, 0.0) + sum(update.log_probs or ())
        self.metrics.count("output_tokens_total", len(update.token_ids))
        if update.finished and update.result is not None:
            self.metrics.count("input_tokens_total", len(update.result.prompt_token_ids))

    def _piece(self, exchange: Exchange, index: int, update: Update) -> None:
        row = exchange.rows[index]
        if update.text or update.finish_reason is not None or update.finished or update.log_probs:
            arrays = answers.piece(row, index, update)
            if update.finished:
                arrays.update(answers.logits_of(row, self.logits_type))
            self._send(exchange, arrays)
        if not exchange.done:
            self._check_cancelled(exchange, time.monotonic())

    def _whole(self, exchange: Exchange, index: int) -> None:
        """A decoupled model answers each row when it is ready; otherwise all rows share the only response."""
        finished = all(row.result is not None for row in exchange.rows)
        indices = [index] if self.settings.decoupled else list(range(len(exchange.rows)))
        if self.settings.decoupled or finished:
            self._send(exchange, answers.whole([exchange.rows[i] for i in indices], indices,
                                               exclude_input=self.settings.exclude_input_in_output,
                                               logits_type=self.logits_type))

    def _send(self, exchange: Exchange, arrays: answers.Arrays) -> None:
        final = all(row.result is not None for row in exchange.rows)
        try:
            exchange.send(answers.tensors(self.pb, arrays), final=final)
        finally:
            if final:
                reasons = [s.finish_reason for row in exchange.rows if row.result for s in row.result.sequences]
                self._forget(exchange, reasons[0] if reasons else "error")

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, UsageError):
            self._end(exchange, "refused", error.message, self.pb.TritonError.INVALID_ARG)
        else:
            self._end(exchange, "error", f"{type(error).__name__}: {error}", self.pb.TritonError.INTERNAL)

    def _end(self, exchange: Exchange, outcome: str, message: str, code: int) -> None:
        if exchange.done:
            return
        try:
            exchange.fail(message, code)
        finally:
            self._forget(exchange, outcome)

    def _forget(self, exchange: Exchange, outcome: str) -> None:
        self._active.discard(exchange)
        self.metrics.ended(outcome, time.monotonic() - exchange.opened_s)

    def _sweep(self) -> None:
        """What no event brings: clients that left, deadlines, openings, gauges."""
        now = time.monotonic()
        for exchange in list(self._active):
            if now - exchange.checked_s >= POLL_S:
                self._guard(partial(self._check, exchange, now))
        if now - self._shown_s >= SHOW_S:
            self._shown_s = now
            self.metrics.show(self.statistics())
        ended_s = time.monotonic()
        self._next_sweep_s = ended_s + max(POLL_S, 4 * (ended_s - now))  # at most a fifth of this thread's time

    def _check(self, exchange: Exchange, now: float) -> None:
        self._check_cancelled(exchange, now)
        if exchange.done:
            return
        waited_s = now - exchange.opened_s
        limit_s = self.settings.request_timeout_s
        if limit_s and waited_s > limit_s and not exchange.is_stream:
            self._end(exchange, "timeout", f"the request took longer than its deadline of {limit_s:g} s (deploy option "
                      "--request_timeout_s); ask for fewer tokens, or stream", self.pb.TritonError.UNAVAILABLE)
        elif self.settings.opening_event_s and waited_s > self.settings.opening_event_s:
            self._open_stream(exchange)

    def _open_stream(self, exchange: Exchange) -> None:
        if exchange.is_stream and not exchange.has_answered:
            exchange.send(answers.tensors(self.pb, answers.opening(0)), final=False)

    def _check_cancelled(self, exchange: Exchange, now: float) -> None:
        if exchange.is_cancelled(now):
            self._end(exchange, "cancelled", "the client left", self.pb.TritonError.CANCELLED)
