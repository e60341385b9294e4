"""The request loop: schedule, execute, sample, update. It knows requests and an executor, no threads and no files.

Where the executor lets steps be started ahead, a device never waits for the host: `step` starts the next step before
it asks for the tokens of the last one, as if every sequence that runs got one token. The device itself puts that token
into the next step. A sequence that turns out to have ended has computed one token too many, which nobody sees.
Where a choice decides what comes next (beams, penalties, words that must not come), its step is waited for.

A request fails alone: logits that are no numbers, or a callback that raises, end that request with an error and no
other. Several ranks run the same loop over the same requests: the logits have the same bits on every rank, so every
rank makes the same choices and nothing but tensors is exchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from time import monotonic

import numpy as np

from tensorwright.engine.limits import Limits
from tensorwright.errors import RanksError
from tensorwright.runtime.batch import Executor, Logits
from tensorwright.runtime.batching import make_batch
from tensorwright.runtime.beams import BeamGroup
from tensorwright.runtime.counters import Counters
from tensorwright.runtime.flight import Choice, Flight, sampled_rows
from tensorwright.runtime.kv_blocks import BlockManager
from tensorwright.runtime.outcome import generated, result_of
from tensorwright.runtime.request import Request, TokenSequence
from tensorwright.runtime.results import FinishReason, Result, Update
from tensorwright.runtime.scheduler import Schedule, Scheduler


class RequestLoop:
    """Owns the scheduler and the blocks. Call `add`, then `step` while `has_work`; from one thread at a time."""

    def __init__(self, executor: Executor, limits: Limits, *, block_reuse: bool = True) -> None:
        self.executor = executor
        self.limits = limits
        self.blocks = BlockManager(executor.num_blocks, executor.block_size, reuse=block_reuse)
        self.scheduler = Scheduler(self.blocks, max_num_tokens=limits.max_num_tokens, max_seats=limits.max_batch_size)
        self.counters = Counters()
        self._flights: deque[Flight] = deque()  # steps that were started, the oldest first

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._flights)

    def add(self, request: Request) -> None:
        """Queue a request that `RequestFactory` has made."""
        self.counters.requests += 1
        self.counters.tokens_in += len(request.prompt_token_ids)
        self.scheduler.add(request)

    def step(self) -> None:
        """Advance every request that has its turn. Whatever a step dies of, requests that are not in it go on.

        Raises:
            RanksError: another rank was lost: nothing can go on.
        """
        self.end_cancelled()
        if any(flight.needs_landing for flight in self._flights):
            self._update(ahead=0)
        schedule = self.scheduler.schedule()
        runs_ahead = self.executor.runs_ahead and bool(schedule.chunks)
        try:
            logits = self._execute(schedule)
            self._sample(schedule, logits)
        except RanksError:
            raise
        except Exception as error:  # the executor's or the sampler's: it cannot be told whose request it was
            self._fail_all(schedule, error)
            runs_ahead = False  # what was drawn last may not be the last flight's
        self._update(ahead=1 if runs_ahead else 0)

    def end_cancelled(self) -> None:
        """End the requests that were cancelled, and those whose callback failed; their blocks are free at once."""
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            if request.error or request.cancel_requested:
                self._end(request, "error" if request.error else "cancelled")

    def end_all(self, error: str | None = None) -> None:
        """End every request: as cancelled, or with an error."""
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            request.error = request.error or error
            self._end(request, "error" if request.error else "cancelled")

    def statistics(self) -> dict[str, float]:
        """Totals since the start, and the state of requests and blocks now."""
        return {
            **asdict(self.counters),
            "requests_active": len(self.scheduler.running),
            "requests_waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.num_preemptions,
            "prefix_hits": self.scheduler.num_prefix_hits,
            "tokens_per_block": self.blocks.block_size,
            "blocks_total": self.blocks.num_blocks,
            "blocks_free": self.blocks.num_available,
            "blocks_used": self.blocks.num_used,
            "blocks_cached": self.blocks.num_idle,
            "blocks_reused": self.scheduler.num_blocks_reused,
        }

    def _execute(self, schedule: Schedule) -> Logits:
        """Start the step: logits [rows, vocabulary]; context logits that callers want are copied at once."""
        if not schedule.chunks:
            return np.zeros((0, self.executor.vocab_size), np.float32)
        batch = make_batch(schedule.chunks, self.blocks.block_size, self._flights[-1].places if self._flights else {})
        if schedule.copies:
            self.executor.copy_blocks(schedule.copies)
        logits = self.executor.execute(batch)
        _keep_context_logits(schedule, logits)
        self.counters.steps += 1
        self.counters.tokens_computed += len(batch.token_ids)
        return logits

    def _sample(self, schedule: Schedule, logits: Logits) -> None:
        """Start drawing a token for every sequence whose tokens are all computed."""
        if not schedule.chunks:
            return
        rows = sampled_rows(schedule)
        wanted = {lane: logits[row] for lane, row in rows.items() if _wants_logits(lane)}
        drawn = [lane for lane in rows if lane.request.beams is None]
        settings = [lane.request.constraints.row(lane.tokens, lane.num_generated, lane.index, lane.counts,
                                                 lane.num_expected) for lane in drawn]
        indexes = [rows[lane] for lane in drawn]
        lines = logits if indexes == list(range(len(logits))) else logits[indexes]
        draw = self.executor.sample(lines, settings) if drawn else None
        self.scheduler.complete(schedule)
        for lane in drawn:
            lane.num_expected += 1
        self._flights.append(Flight(schedule, dict(zip(drawn, settings, strict=True)), wanted, draw))

    def _update(self, ahead: int) -> None:
        """Wait for all but so many steps: append their tokens, tell the callers, and end what has ended."""
        while len(self._flights) > ahead:
            flight = self._flights.popleft()
            try:
                choices = flight.land()
            except RanksError:
                raise
            except Exception as error:  # the device's: it cannot be told whose request it was
                self._fail_all(flight.schedule, error)
                continue
            for request in flight.schedule.requests:
                lanes = [lane for lane in request.lanes if lane in choices]
                try:
                    self._advance(request, lanes, choices)
                except Exception as error:  # such as text that cannot be decoded: this request's own, the others go on
                    self._fail(request, repr(error))

    def _advance(self, request: Request, lanes: list[TokenSequence], choices: Mapping[TokenSequence, Choice]) -> None:
        if not lanes:
            return
        if not all(choices[lane].is_finite for lane in lanes):
            length = len(lanes[0].tokens)
            self._fail(request, f"the model's logits after {length} tokens are not finite numbers (NaN or infinity)")
            return
        if not all(choices[lane].is_allowed for lane in lanes):
            self._fail(request, f"biases and bad words forbid every token after {len(lanes[0].tokens)} tokens")
            return
        self._count(request, len(lanes))
        if request.beams is None:
            for lane in lanes:
                self._append(lane, choices[lane])
        else:
            lines = [line for lane in lanes if (line := choices[lane].logits) is not None]
            if not request.beams.advance(self.scheduler, lines):
                self._end(request, None)

    def _count(self, request: Request, num_tokens: int) -> None:
        self.counters.tokens_out += num_tokens
        if request.first_token_at is None:
            request.first_token_at = monotonic()
            self.counters.ttft_sum_s += request.first_token_at - request.submitted_at
            self.counters.ttft_count += 1

    def _append(self, lane: TokenSequence, choice: Choice) -> None:
        lane.append(choice.token, choice.log_prob)
        if choice.logits is not None:
            lane.logits.append(choice.logits.copy())
        text, reason = _write(lane, choice.token)
        lane.text += text
        if reason:
            self._retire(lane, reason)
        log_probs = (choice.log_prob,) if lane.request.parameters.return_log_probs else None
        self._tell(lane.request, lane.index, text, (choice.token,), log_probs, reason)

    def _fail_all(self, schedule: Schedule, error: Exception) -> None:
        for request in schedule.requests:
            self._fail(request, f"the step failed: {error!r}")

    def _fail(self, request: Request, message: str) -> None:
        if not request.is_closed:
            request.error = request.error or message
            for lane in request.lanes:
                lane.writer = None  # it may be what has failed: text that it holds back is given up
            self._end(request, "error")

    def _end(self, request: Request, reason: FinishReason | None) -> None:
        """End all that still runs of a request, for this reason; None: its beams have ended by themselves."""
        self.counters.cancellations += reason == "cancelled"
        if request.beams:
            self._end_beams(request, request.beams, reason)
            return
        for lane in list(request.lanes):
            text = lane.finish_text()[0]
            lane.text += text
            self._retire(lane, reason or "stop")
            self._tell(request, lane.index, text, (), None, reason)

    def _end_beams(self, request: Request, beams: BeamGroup, reason: FinishReason | None) -> None:
        request.finished = beams.finish(reason)
        for lane in list(request.lanes):
            self.scheduler.drop(lane)
        last = len(request.finished) - 1
        for index, ended in request.finished.items():
            self._tell(request, index, ended.text, ended.token_ids, ended.log_probs, ended.finish_reason, index == last)

    def _retire(self, lane: TokenSequence, reason: FinishReason) -> None:
        lane.request.finished[lane.index] = generated(lane, reason, self.limits.logits_dtype)
        self.scheduler.drop(lane)

    def _tell(self, request: Request, index: int, text: str, token_ids: tuple[int, ...],
              log_probs: tuple[float, ...] | None, reason: FinishReason | None, is_last: bool = True) -> None:
        """Send the caller an update; the last one of a request, when nothing of it is left, brings the result."""
        result = self._close(request) if is_last and not request.lanes else None
        try:
            request.on_update(Update(request.id, index, text, token_ids, log_probs, result is not None, reason, result))
        except Exception as error:  # the caller's own code; its request ends with the next step
            request.on_update = _ignore
            request.error = f"the callback for updates raised {error!r}"

    def _close(self, request: Request) -> Result:
        self.scheduler.remove(request)
        request.is_closed = True
        result = result_of(request, self.limits.logits_dtype)
        self.counters.requests_finished += 1
        self.counters.errors += result.error is not None
        return result


def _wants_logits(lane: TokenSequence) -> bool:
    """Whether anybody looks at the logits themselves: elsewhere they stay where the executor has them."""
    return lane.request.beams is not None or lane.request.parameters.return_generation_logits


def _ignore(update: Update) -> None:
    """Takes the place of a callback that has failed."""


def _keep_context_logits(schedule: Schedule, logits: Logits) -> None:
    row = 0
    for chunk in schedule.chunks:
        request = chunk.sequence.request
        length = len(request.prompt_token_ids)
        if request.parameters.return_context_logits and request.num_context_rows < length:
            if request.context_logits is None:
                request.context_logits = np.empty((length, logits.shape[1]), np.float32)
            count = sum(position < length for position in chunk.output_positions)
            start = request.num_context_rows
            request.context_logits[start : start + count] = logits[row : row + count]
            request.num_context_rows = start + count
        row += len(chunk.output_positions)


def _write(lane: TokenSequence, token: int) -> tuple[str, FinishReason | None]:
    """The text that a new token gives, and why the sequence ends with it, if it does."""
    if token in lane.request.end_ids:
        return lane.finish_text()[0], "stop"
    text, stopped = lane.write(token)
    if stopped:
        return text, "stop"
    if lane.num_generated < lane.request.parameters.max_tokens:
        return text, None
    rest, stopped = lane.finish_text()
    return text + rest, "stop" if stopped else "length"
