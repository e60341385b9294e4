"""The request loop: schedule, execute, sample, update. It knows requests and an executor, no threads and no files.

A request fails alone: logits that are no numbers, or a callback that raises, end that request with an error and no
other. Several ranks run the same loop over the same requests: the logits have the same bits on every rank, so every
rank makes the same choices and nothing but tensors is exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from time import monotonic

import numpy as np

from tensorwright.engine.limits import Limits
from tensorwright.errors import RanksError
from tensorwright.runtime.batch import Executor, Floats, Logits
from tensorwright.runtime.batching import make_batch
from tensorwright.runtime.beams import BeamGroup
from tensorwright.runtime.constraints import FORBIDDEN
from tensorwright.runtime.counters import Counters
from tensorwright.runtime.kv_blocks import BlockManager
from tensorwright.runtime.outcome import generated, result_of
from tensorwright.runtime.request import Request, TokenSequence
from tensorwright.runtime.results import FinishReason, Result, Update
from tensorwright.runtime.scheduler import Schedule, Scheduler


@dataclass(frozen=True)
class Choice:
    """What a step found for one sequence: a row of logits [vocabulary], and the token drawn from it."""

    logits: Floats | None  # where beams or the caller want them
    is_finite: bool
    is_allowed: bool = True  # a forbidden token is only drawn where every token is forbidden
    token: int = -1  # beams draw none: they compare
    log_prob: float = 0.0


Choices = Mapping[TokenSequence, Choice]


class RequestLoop:
    """Owns the scheduler and the blocks. Call `add`, then `step` while `has_work`; from one thread at a time."""

    def __init__(self, executor: Executor, limits: Limits, *, block_reuse: bool = True) -> None:
        self.executor = executor
        self.limits = limits
        self.blocks = BlockManager(executor.num_blocks, executor.block_size, reuse=block_reuse)
        self.scheduler = Scheduler(self.blocks, max_num_tokens=limits.max_num_tokens, max_seats=limits.max_batch_size)
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

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
        schedule = self.scheduler.schedule()
        try:
            logits = self._execute(schedule)
            choices = self._sample(schedule, logits)
            self._update(schedule, choices)
        except RanksError:
            raise
        except Exception as error:  # the executor's or the sampler's: it cannot be told whose request it was
            for request in schedule.requests:
                self._fail(request, f"the step failed: {error!r}")

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
        """Logits [rows, vocabulary] of the step; context logits that callers want are copied at once."""
        if not schedule.chunks:
            return np.zeros((0, self.executor.vocab_size), np.float32)
        batch = make_batch(schedule.chunks, self.blocks.block_size)
        if schedule.copies:
            self.executor.copy_blocks(schedule.copies)
        logits = self.executor.execute(batch)
        _keep_context_logits(schedule, logits)
        self.counters.steps += 1
        self.counters.tokens_computed += len(batch.token_ids)
        return logits

    def _sample(self, schedule: Schedule, logits: Logits) -> Choices:
        """A choice for every sequence whose tokens are all computed."""
        rows = _sampled_rows(schedule)
        with np.errstate(all="ignore"):
            is_finite = np.isfinite(logits.sum(axis=1)).tolist()
        choices = {lane: Choice(logits[row] if _wants_logits(lane) else None, is_finite[row])
                   for lane, row in rows.items()}
        drawn = [lane for lane, row in rows.items() if is_finite[row] and lane.request.beams is None]
        if not drawn:
            return choices
        indexes = [rows[lane] for lane in drawn]
        lines = logits if indexes == list(range(len(logits))) else logits[indexes]
        settings = [lane.request.constraints.row(lane.tokens, lane.num_generated, lane.index, lane.counts)
                    for lane in drawn]
        tokens, log_probs = self.executor.sample(lines, settings)
        for lane, row, token, log_prob in zip(drawn, settings, tokens.tolist(), log_probs.tolist(), strict=True):
            is_allowed = (token, FORBIDDEN) not in zip(row.biased, row.biases, strict=True)
            choices[lane] = replace(choices[lane], token=token, log_prob=log_prob, is_allowed=is_allowed)
        return choices

    def _update(self, schedule: Schedule, choices: Choices) -> None:
        """Append the tokens, tell the callers, and end what has ended."""
        self.scheduler.complete(schedule)
        for request in schedule.requests:
            lanes = [lane for lane in request.lanes if lane in choices]
            try:
                self._advance(request, lanes, choices)
            except Exception as error:  # such as text that cannot be decoded: this request's own, the others go on
                self._fail(request, repr(error))

    def _advance(self, request: Request, lanes: list[TokenSequence], choices: Choices) -> None:
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


def _sampled_rows(schedule: Schedule) -> dict[TokenSequence, int]:
    """The row of logits for each sequence that gets a token; sequences that have not forked share the trunk's."""
    rows: dict[TokenSequence, int] = {}
    count = 0
    for chunk in schedule.chunks:
        count += len(chunk.output_positions)
        if chunk.is_sampled:
            request = chunk.sequence.request
            rows |= dict.fromkeys([chunk.sequence] if request.is_forked else request.lanes, count - 1)
    return rows


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
