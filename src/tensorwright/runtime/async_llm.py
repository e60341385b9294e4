"""`AsyncLLM`: an engine that serves many threads. It owns one thread, which runs the loop; all else is the loop's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tensorwright.errors import TensorwrightError, UsageError
from tensorwright.runtime.batch import Executor
from tensorwright.runtime.communicator import Communicator
from tensorwright.runtime.loop import RequestLoop
from tensorwright.runtime.opening import open_engine
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.request import Request
from tensorwright.runtime.results import Update
from tensorwright.runtime.submission import Prompt


class LoopThread:
    """Runs a request loop in a thread of its own: as long as there is work, then it sleeps."""

    def __init__(self, loop: RequestLoop) -> None:
        self._loop = loop
        self._incoming: deque[Request] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._failure: str | None = None
        self._statistics = loop.statistics()
        self._thread = threading.Thread(target=self._run, name="tensorwright-loop", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served: false after `close` and after a failure of the loop itself."""
        return self._thread.is_alive() and not self._is_closing and self._failure is None

    def add(self, request: Request) -> None:
        """Queue a request; its updates come from the loop's thread.

        Raises:
            UsageError: closed already.
            TensorwrightError: the loop has failed.
        """
        with self._changed:
            if self._failure is not None:
                raise TensorwrightError(f"the engine's loop has failed: {self._failure}", mend="start it again")
            if self._is_closing:
                raise UsageError("the engine is closed")
            self._incoming.append(request)
            self._changed.notify()

    def statistics(self) -> dict[str, float]:
        """As of the last step, with the requests that have not reached the loop yet among the waiting."""
        with self._changed:
            waiting = self._statistics["requests_waiting"] + len(self._incoming)
            return {**self._statistics, "requests_waiting": waiting}

    def close(self) -> None:
        """End every request as cancelled, and the thread. A second call does nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._loop.step()
        except Exception as error:  # a defect of the loop: nobody may be left waiting for an answer
            self._end(repr(error))
        else:
            self._end(None)

    def _take_in(self) -> bool:
        """Hand new requests to the loop; sleep while there are none. False when it is time to end."""
        with self._changed:
            self._statistics = self._loop.statistics()
            while not (self._incoming or self._loop.has_work or self._is_closing):
                self._changed.wait()
            while self._incoming:
                self._loop.add(self._incoming.popleft())
            return not self._is_closing

    def _end(self, failure: str | None) -> None:
        with self._changed:
            self._failure, self._is_closing = failure, True
            while self._incoming:
                self._loop.add(self._incoming.popleft())
        self._loop.end_all(failure)
        with self._changed:
            self._statistics = self._loop.statistics()


class AsyncLLM:
    """Submit from any thread. Callbacks come from the loop's thread: a slow one holds up every request."""

    def __init__(self, engine_dir: Path, *, tokenizer_dir: Path | None = None, threads: int | None = None,
                 max_kv_tokens: int | None = None, kv_cache_fraction: float = 0.9, block_reuse: bool = True,
                 communicator: Communicator | None = None, executor: Executor | None = None) -> None:
        """Open the engine and start the thread; see `opening.open_engine` for what is raised."""
        if communicator is not None and communicator.size > 1:
            raise UsageError(f"AsyncLLM serves engines of one rank; this one was started with {communicator.size}",
                             mend="convert and build with --tp_size 1, or use LLM")
        opened = open_engine(engine_dir, tokenizer_dir=tokenizer_dir, threads=threads, max_kv_tokens=max_kv_tokens,
                             kv_cache_fraction=kv_cache_fraction, block_reuse=block_reuse, communicator=communicator,
                             executor=executor)
        self.engine = opened.engine
        self.tokenizer = opened.tokenizer
        self._plan, self._factory = opened.plan, opened.factory
        self._thread = LoopThread(opened.loop)

    def submit(self, prompt: Prompt, parameters: SamplingParameters,
               on_update: Callable[[Update], None]) -> Request:
        """Check, tokenise (both here, on the caller's thread) and queue. `request.cancel()` ends it within one step.

        Raises:
            UsageError: a request that cannot be run, or a closed engine.
            LimitError: over a limit; the message holds the numbers.
        """
        request = self._factory.make(prompt, parameters, on_update)
        self._thread.add(request)
        return request

    @property
    def is_ready(self) -> bool:
        """Whether requests are served: false once the loop was closed or has failed."""
        return self._thread.is_alive

    def memory_table(self) -> list[tuple[str, str]]:
        """Names and values: weights, activations, KV cache, and how much fits."""
        return self._plan.table(self.engine.limits)

    def statistics(self) -> dict[str, float]:
        """Totals and gauges (see `RequestLoop.statistics`)."""
        return self._thread.statistics()

    def close(self) -> None:
        """End every request as cancelled and stop the thread."""
        self._thread.close()
