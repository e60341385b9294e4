"""Stand-ins for what Triton's Python backend gives a model, and for the engine behind it. For tests of serving only.

They record what was sent, and fail where the real ones would crash the server: a sender used after its final flag.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.results import FinishReason, Generated, Result, Update

FINAL = 1


class FakeTensor:
    """pb_utils.Tensor."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name = name
        self._array = array

    def name(self) -> str:
        """The tensor's name."""
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        """Its values."""
        return self._array


class FakeError:
    """pb_utils.TritonError."""

    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = 1, 3, 4, 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self.message = message
        self.code = code


@dataclass
class FakeResponse:
    """pb_utils.InferenceResponse."""

    output_tensors: list[FakeTensor] = field(default_factory=list)
    error: FakeError | None = None

    def values(self) -> dict[str, Any]:
        """Every output as nested lists, texts decoded."""
        return {t.name(): np.vectorize(lambda x: x.decode(), otypes=[object])(t.as_numpy()).tolist()
                if t.as_numpy().dtype == object else t.as_numpy().tolist() for t in self.output_tensors}


class FakeSender:
    """A response sender that remembers."""

    def __init__(self) -> None:
        self.responses: list[FakeResponse] = []
        self.num_final = 0
        self.client_left = False
        self.is_broken = False
        self.used_after_final = False
        self.final = threading.Event()

    def send(self, response: FakeResponse | None = None, flags: int = 0) -> None:
        """Take a response."""
        self.used_after_final |= self.final.is_set()
        if self.is_broken:
            raise OSError("the pipe is broken")
        if response is not None:
            self.responses.append(response)
        if flags & FINAL:
            self.num_final += 1
            self.final.set()

    def is_cancelled(self) -> bool:
        """Whether the test let the client leave."""
        self.used_after_final |= self.final.is_set()
        return self.client_left

    @property
    def error(self) -> FakeError | None:
        """The error that ended the request."""
        return self.responses[-1].error if self.responses else None


class FakeRequest:
    """One request with the shapes that Triton gives: [rows, ...]."""

    def __init__(self, inputs: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> None:
        self.sender = FakeSender()
        self._inputs = [FakeTensor(name, as_input(value)) for name, value in inputs.items()]
        self._parameters = json.dumps(parameters or {})

    def inputs(self) -> list[FakeTensor]:
        """The tensors."""
        return self._inputs

    def parameters(self) -> str:
        """JSON keys that are no input."""
        return self._parameters

    def get_response_sender(self) -> FakeSender:
        """Where the responses go."""
        return self.sender


class FakeMetricFamily:
    """pb_utils.MetricFamily; values are shared by label set."""

    COUNTER, GAUGE = 0, 1
    values: dict[tuple[str, str], float]

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.name = name

    def Metric(self, labels: Mapping[str, str]) -> Any:  # noqa: N802 - Triton's name
        """One labelled value."""
        own = [value for name, value in labels.items() if name not in ("model", "version")]
        values, key = self.values, (self.name, own[0] if own else "")
        values.setdefault(key, 0.0)
        return SimpleNamespace(increment=lambda amount: values.__setitem__(key, values[key] + amount),
                               set=lambda value: values.__setitem__(key, value))


def fake_pb() -> Any:
    """A module like triton_python_backend_utils; `metrics` holds what was counted, `log` what was logged."""
    metrics: dict[tuple[str, str], float] = {}
    log: list[str] = []
    family = type("MetricFamily", (FakeMetricFamily,), {"values": metrics})
    return SimpleNamespace(Tensor=FakeTensor, InferenceResponse=FakeResponse, TritonError=FakeError,
                           TritonModelException=RuntimeError, TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
                           MetricFamily=family, Logger=SimpleNamespace(log_error=log.append), metrics=metrics, log=log)


@dataclass
class FakeHandle:
    """What FakeLLM.submit returns. `news` reports like the engine's thread would."""

    prompt: str
    parameters: SamplingParameters
    on_update: Callable[[Update], None]
    num_cancels: int = 0
    texts: dict[int, str] = field(default_factory=dict)

    def cancel(self) -> None:
        """Count."""
        self.num_cancels += 1

    def news(self, text: str = "", token_ids: Sequence[int] = (), *, sequence: int = 0,
             reason: FinishReason | None = None, num_sequences: int = 1, error: str | None = None,
             log_probs: tuple[float, ...] | None = None) -> None:
        """One update; a reason for the last of `num_sequences` ends the request."""
        self.texts[sequence] = self.texts.get(sequence, "") + text
        finished = reason is not None and len(self.texts) == num_sequences
        result = None
        if finished and reason is not None:
            sequences = tuple(Generated(tuple(token_ids), self.texts[s], reason, log_probs, sum(log_probs or ()), None)
                              for s in sorted(self.texts))
            result = Result(1, self.prompt, (5, 6, 7), sequences, None, 0, 0.0, 0.0, error)
        self.on_update(Update(1, sequence, text, tuple(token_ids), log_probs, finished, reason, result))


class FakeLLM:
    """An AsyncLLM that generates only what a test tells its handles to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.handles: list[FakeHandle] = []
        self.closed = False
        self.tokenizer = SimpleNamespace(encode_plain=lambda text: [ord(c) for c in text])

    def submit(self, prompt: str, parameters: SamplingParameters,
               on_update: Callable[[Update], None]) -> FakeHandle:
        """Remember the row."""
        if self.error is not None:
            raise self.error
        self.handles.append(FakeHandle(prompt, parameters, on_update))
        return self.handles[-1]

    def statistics(self) -> dict[str, float]:
        """One number."""
        return {"requests_active": float(len(self.handles))}

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        return not self.closed

    def memory_table(self) -> list[tuple[str, str]]:
        """One line."""
        return [("weights", "0 B")]

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def as_input(value: Any) -> NDArray[Any]:
    """A scalar as [1, 1], a flat list as [1, n], an array as it is; texts as bytes."""
    if isinstance(value, np.ndarray):
        return value
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, (str, bytes)) for item in items) or not items:
        return np.array([[i.encode() if isinstance(i, str) else i for i in items]], dtype=object)
    return np.array([items])


def wait_until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    """Wait for a condition of another thread.

    Raises:
        TimeoutError: it did not come true.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.002)
