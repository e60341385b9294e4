"""The request loop over a fake executor, and the same generation without any of it: no batch, no cache, no blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensorwright.engine.limits import Limits
from tensorwright.runtime.constraints import Constraints, TokenCounts
from tensorwright.runtime.loop import RequestLoop
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.request import Request
from tensorwright.runtime.results import Result, Update
from tensorwright.runtime.sampling import choose
from tensorwright.runtime.submission import RequestFactory
from tensorwright.runtime.tokenizer import Tokenizer
from tensorwright.testing.fake_executor import FakeExecutor, LogitsFunction, plain_logits

LIMITS = Limits(max_batch_size=8, max_seq_len=256, max_input_len=192, max_num_tokens=32, max_beam_width=4,
                gather_context_logits=True, gather_generation_logits=True)
END_IDS = (2,)


class Harness:
    """A loop, its factory and executor, and every update that came."""

    def __init__(self, *, limits: Limits = LIMITS, num_blocks: int = 64, block_size: int = 4, vocab_size: int = 32,
                 block_reuse: bool = True, tokenizer: Tokenizer | None = None, end_ids: Sequence[int] = END_IDS,
                 logits: LogitsFunction | None = None, runs_ahead: bool = False) -> None:
        self.executor = FakeExecutor(vocab_size=vocab_size, num_blocks=num_blocks, block_size=block_size,
                                     max_num_tokens=limits.max_num_tokens, logits=logits, runs_ahead=runs_ahead)
        self.loop = RequestLoop(self.executor, limits, block_reuse=block_reuse)
        self.factory = RequestFactory(limits, vocab_size=vocab_size, end_ids=end_ids, tokenizer=tokenizer,
                                      num_blocks=num_blocks, block_size=block_size)
        self.updates: list[Update] = []

    def submit(self, prompt: str | Sequence[int], on_update: Callable[[Update], None] | None = None,
               **parameters: Any) -> Request:
        """Queue a request; its updates are kept."""
        request = self.factory.make(prompt, SamplingParameters(**parameters), on_update or self.updates.append)
        self.loop.add(request)
        return request

    def step(self) -> None:
        """One step, after which the books must be right."""
        self.loop.step()
        self.loop.blocks.check_integrity(self.loop.scheduler.tables())
        for request in (*self.loop.scheduler.running, *self.loop.scheduler.waiting):
            for lane in request.lanes:
                if len(lane.table.blocks) * self.loop.blocks.block_size < lane.num_computed:
                    raise RuntimeError(f"{lane.num_computed} tokens computed, {len(lane.table.blocks)} blocks")

    def run(self, max_steps: int = 10_000) -> dict[int, Result]:
        """Step until nothing is left; results by request id."""
        for _ in range(max_steps):
            if not self.loop.has_work:
                return self.results()
            self.step()
        raise RuntimeError(f"still at work after {max_steps} steps")

    def results(self) -> dict[int, Result]:
        """The results that have come."""
        return {update.request_id: update.result for update in self.updates if update.result}


def plain_run(prompt: Sequence[int], parameters: SamplingParameters, *, end_ids: Sequence[int] = END_IDS,
              logits: LogitsFunction = plain_logits) -> list[list[int]]:
    """Tokens of each sampled sequence of a request, computed one after the other from the whole context."""
    return [_plain_sequence(prompt, parameters, index, frozenset(end_ids), logits)
            for index in range(parameters.num_sequences)]


def _plain_sequence(prompt: Sequence[int], parameters: SamplingParameters, index: int, end_ids: frozenset[int],
                    logits: LogitsFunction) -> list[int]:
    constraints = Constraints(parameters, end_ids, parameters.bad_token_ids)
    tokens, output = list(prompt), list[int]()
    while len(output) < parameters.max_tokens:
        counts = TokenCounts(prompt, parameters.max_tokens)
        for token in output:
            counts.add(token)
        row = constraints.row(tokens, len(output), index, counts if constraints.counts_tokens else None)
        token = int(choose(logits(tokens)[None], [row])[0][0])
        tokens.append(token)
        output.append(token)
        if token in end_ids:
            break
    return output
