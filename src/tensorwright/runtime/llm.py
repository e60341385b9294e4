"""`LLM`: an engine that answers in the caller's own thread. It adds nothing to the loop but a way to call it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tensorwright.errors import UsageError
from tensorwright.runtime.batch import Executor
from tensorwright.runtime.communicator import Communicator
from tensorwright.runtime.opening import open_engine
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.request import Request
from tensorwright.runtime.results import Result, Update
from tensorwright.runtime.submission import Prompt


class LLM:
    """Generate from an engine folder. Not for several threads: that is what `AsyncLLM` is for.

    With a communicator every rank makes the same calls with the same arguments, and every rank has the results.
    """

    def __init__(self, engine_dir: Path, *, tokenizer_dir: Path | None = None, threads: int | None = None,
                 max_kv_tokens: int | None = None, kv_cache_fraction: float = 0.9, block_reuse: bool = True,
                 communicator: Communicator | None = None, executor: Executor | None = None) -> None:
        """Open the engine; see `opening.open_engine` for what is raised."""
        opened = open_engine(engine_dir, tokenizer_dir=tokenizer_dir, threads=threads, max_kv_tokens=max_kv_tokens,
                             kv_cache_fraction=kv_cache_fraction, block_reuse=block_reuse, communicator=communicator,
                             executor=executor)
        self.engine = opened.engine
        self.tokenizer = opened.tokenizer
        self._plan, self._factory, self._loop = opened.plan, opened.factory, opened.loop

    def generate(self, prompts: Sequence[Prompt],
                 parameters: SamplingParameters | Sequence[SamplingParameters]) -> list[Result]:
        """A result per prompt, in order.

        Raises:
            UsageError: a prompt or parameters that cannot be run; before anything runs.
        """
        results = {update.request_id: update.result for update in self.stream(prompts, parameters) if update.result}
        return [results[request_id] for request_id in sorted(results)]

    def stream(self, prompts: Sequence[Prompt],
               parameters: SamplingParameters | Sequence[SamplingParameters]) -> Iterator[Update]:
        """Updates as they come, of all prompts; request ids rise in the order of the prompts.

        Closing the iterator cancels what still runs.

        Raises:
            UsageError: as `generate`, at this call.
        """
        updates: deque[Update] = deque()
        requests = self._requests(prompts, parameters, updates.append)
        return self._run(requests, updates)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step is started before the tokens of the last one are known."""
        return self._loop.executor.runs_ahead

    def memory_table(self) -> list[tuple[str, str]]:
        """Names and values: weights, activations, KV cache, and how much fits."""
        return self._plan.table(self.engine.limits)

    def statistics(self) -> dict[str, float]:
        """What the loop has counted (see `RequestLoop.statistics`)."""
        return self._loop.statistics()

    def _requests(self, prompts: Sequence[Prompt], parameters: SamplingParameters | Sequence[SamplingParameters],
                  on_update: Callable[[Update], None]) -> list[Request]:
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list of prompts; got one text", mend="put it into a list: [prompt]")
        each = [parameters] * len(prompts) if isinstance(parameters, SamplingParameters) else list(parameters)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts and {len(each)} sampling parameters",
                             mend="give one for all, or one each")
        requests = []
        for number, (prompt, wanted) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._factory.make(prompt, wanted, on_update))
            except UsageError as error:
                where = f"prompt {number}: " if len(prompts) > 1 else ""
                raise type(error)(where + error.message, mend=error.mend) from error
        return requests

    def _run(self, requests: list[Request], updates: deque[Update]) -> Iterator[Update]:
        for request in requests:
            self._loop.add(request)
        unfinished = len(requests)
        try:
            while unfinished:
                self._loop.step()
                while updates:
                    update = updates.popleft()
                    unfinished -= update.finished
                    yield update
        finally:
            for request in requests:
                request.cancel()
            self._loop.end_cancelled()
