"""Who computes what in the next step. It knows counts of tokens and blocks, never tokens' meaning, arrays or time.

In-flight batching: every step first gives each running sequence its one token (decode), then spends what is left of
`max_num_tokens` on chunks of prompts (prefill), the earliest request first, and then admits waiting requests in the
order of their arrival. When blocks run short the request that was admitted last goes back to the head of the queue
and is computed again later (preemption by recompute); the earliest request can take every other's blocks, and a
request is only accepted if it fits alone, so each one ends.

The ideas: iteration-level scheduling (Orca, Yu et al. 2022), chunked prefill (Sarathi-Serve, Agrawal et al. 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tensorwright.runtime.kv_blocks import BlockManager, BlockTable, Growth
from tensorwright.runtime.request import Request, TokenSequence

MAX_CONTEXT_ROWS = 128  # rows of context logits in one step: with a vocabulary of 131072 each is 512 KiB


@dataclass(frozen=True)
class Chunk:
    """Positions [start, end) of a sequence, and those of them whose logits are wanted."""

    sequence: TokenSequence
    start: int
    end: int
    output_positions: tuple[int, ...]
    is_sampled: bool  # the step gives the sequence its next token: nothing of it is left to compute


@dataclass
class Schedule:
    """One step: the chunks in batch order, and KV blocks (source, destination) to copy before it."""

    tokens_left: int
    context_rows_left: int = MAX_CONTEXT_ROWS
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    planned: set[TokenSequence] = field(default_factory=set)
    is_short: bool = False  # the blocks did not suffice for all that run

    @property
    def requests(self) -> list[Request]:
        """Every request with a chunk, once, in order."""
        return list(dict.fromkeys(chunk.sequence.request for chunk in self.chunks))


class Scheduler:
    """Holds the waiting and the running requests; `schedule`, start the chunks, `complete`, and so on.

    What is computed counts as such when its step has started: every later step finds it, and blocks that are given
    back are written by later steps only. So the next step can be scheduled before the last one's tokens are known.
    """

    def __init__(self, blocks: BlockManager, *, max_num_tokens: int, max_seats: int) -> None:
        self.blocks = blocks
        self.max_num_tokens = max_num_tokens
        self.max_seats = max_seats
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_prefix_hits = 0  # requests that found a part of their prompt
        self.num_blocks_reused = 0

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """The next step; its blocks are taken already. Empty only when there is nothing to do."""
        step = Schedule(self.max_num_tokens)
        self._plan_decodes(step)
        self._plan_prefills(step, self.running)
        if not step.is_short:
            self._admit(step)
        while step.is_short and not step.chunks and len(self.running) > 1:
            self._preempt(self.running[-1])
            self._plan_prefills(step, self.running)
        return step

    def complete(self, step: Schedule) -> None:
        """Note that a step was started: before its new tokens are expected."""
        for chunk in step.chunks:
            chunk.sequence.num_computed = chunk.end
            self._seal(chunk.sequence)
        for request in step.requests:
            trunk = request.lanes[0]
            if len(request.lanes) > 1 and not request.is_forked and trunk.num_computed == len(request.prompt_token_ids):
                self._fork(trunk, request.lanes[1:])
                request.is_forked = True

    def branch(self, request: Request, children: list[tuple[TokenSequence, TokenSequence]]) -> None:
        """Replace a request's lanes: each child (parent, child) continues on its parent's blocks."""
        for parent, child in children:
            self._fork(parent, [child])
        for parent in request.lanes:
            self.blocks.release(parent.table)
        request.lanes = [child for _, child in children]
        request.is_forked = True

    def drop(self, sequence: TokenSequence) -> None:
        """Take a sequence that has ended out of its request."""
        self._release(sequence)
        sequence.request.lanes.remove(sequence)

    def remove(self, request: Request) -> None:
        """Forget a request and free its blocks at once. One that is not here is ignored."""
        for lane in request.lanes:
            self._release(lane)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def tables(self) -> Iterable[BlockTable]:
        """Every block table that is alive."""
        return [lane.table for request in (*self.running, *self.waiting) for lane in request.lanes]

    def _plan_decodes(self, step: Schedule) -> None:
        index = 0
        while index < len(self.running):
            request = self.running[index]
            index += 1
            ready = [(lane, end) for lane, end in request.targets() if end - lane.num_computed == 1]
            if not ready or len(ready) > step.tokens_left:
                continue
            growths = [Growth(lane.table, lane.num_computed, end) for lane, end in ready]
            while self.blocks.shortage(growths) > 0:
                step.is_short = True
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                for lane, end in ready:
                    self._take(step, lane, end)

    def _plan_prefills(self, step: Schedule, requests: list[Request]) -> None:
        for request in requests:
            for lane, end in request.targets():
                length = min(end - lane.num_computed, step.tokens_left)
                is_decode = request.is_forked and end - lane.num_computed == 1
                if length < 1 or is_decode or lane in step.planned:
                    continue
                fitting = self._fitting(lane, length)
                step.is_short |= fitting < length
                if self._wants_context(request):
                    fitting = min(fitting, step.context_rows_left)
                if fitting > 0:
                    self._take(step, lane, lane.num_computed + fitting)

    def _fitting(self, lane: TokenSequence, length: int) -> int:
        """How many of the next `length` tokens the blocks at hand can take."""
        start = lane.num_computed
        shortage = self.blocks.shortage([Growth(lane.table, start, start + length)])
        if shortage <= 0:
            return length
        return (self.blocks.blocks_for(start + length) - shortage) * self.blocks.block_size - start

    def _admit(self, step: Schedule) -> None:
        while self.waiting and step.tokens_left > 0:
            request = self.waiting[0]
            if sum(other.seats for other in self.running) + request.seats > self.max_seats:
                return
            trunk, end = request.targets()[0]
            limit = 0 if self._wants_context(request) else end - 1  # a request with nothing to compute gets no turn
            trunk.table = self.blocks.match(trunk.tokens, limit)
            growth = Growth(trunk.table, trunk.table.num_sealed * self.blocks.block_size, end)
            spare = sum(self._needs_block(lane) for other in self.running for lane in other.lanes)
            if self.blocks.shortage([growth]) + spare > 0:
                self.blocks.release(trunk.table)
                return
            self._start(self.waiting.popleft(), growth)
            self._plan_prefills(step, [request])

    def _needs_block(self, lane: TokenSequence) -> bool:
        """Whether a running sequence's next token takes a block: the next decodes would preempt who took the last."""
        return lane.request.is_forked or lane.length >= len(lane.table.blocks) * self.blocks.block_size

    def _start(self, request: Request, growth: Growth) -> None:
        self.blocks.grow(growth)  # all of its prompt: what is admitted can be computed
        self.running.append(request)
        request.lanes[0].num_computed = growth.start
        self.num_blocks_reused += growth.table.num_sealed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(growth.start, len(request.prompt_token_ids))
            self.num_prefix_hits += growth.start > 0

    def _preempt(self, request: Request) -> None:
        for lane in request.lanes:
            self._release(lane)
            lane.num_computed = 0
        request.is_forked = False
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _take(self, step: Schedule, lane: TokenSequence, end: int) -> None:
        start, request = lane.num_computed, lane.request
        copy = self.blocks.grow(Growth(lane.table, start, end))
        if copy:
            step.copies.append(copy)
        positions: list[int] = []
        if self._wants_context(request):
            positions += range(max(start, request.num_context_rows), min(end, len(request.prompt_token_ids)))
            step.context_rows_left -= len(positions)
        is_sampled = end == lane.length
        if is_sampled and end - 1 not in positions[-1:]:
            positions.append(end - 1)
        step.tokens_left -= end - start
        step.chunks.append(Chunk(lane, start, end, tuple(positions), is_sampled))
        step.planned.add(lane)

    def _seal(self, lane: TokenSequence) -> None:
        """Offer its full blocks to others: those whose tokens are all known."""
        self.blocks.seal(lane.table, lane.tokens, min(lane.num_computed, len(lane.tokens)))

    def _release(self, lane: TokenSequence) -> None:
        self._seal(lane)
        self.blocks.release(lane.table)

    def _fork(self, parent: TokenSequence, children: list[TokenSequence]) -> None:
        for child in children:
            child.table = self.blocks.fork(parent.table)
            child.num_computed = parent.num_computed

    def _wants_context(self, request: Request) -> bool:
        missing = request.num_context_rows < len(request.prompt_token_ids)
        return missing and request.parameters.return_context_logits
