"""A request's life in the deployed model, with a fake engine and fake response senders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorwright.errors import LimitError
from tensorwright.serve.triton.fields import OUTPUTS
from tensorwright.serve.triton.model import Model
from tensorwright.serve.triton.settings import ServeSettings
from tensorwright.testing.fake_triton import FakeError, FakeHandle, FakeLLM, FakeRequest, fake_pb, wait_until


class Harness:
    """A model on fakes."""

    def __init__(self, llm: FakeLLM, **settings: Any) -> None:
        self.llm = llm
        self.pb = fake_pb()
        parameters = ServeSettings(**settings).to_parameters()
        config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()},
                  "output": [{"name": field.name, "data_type": "TYPE_FP16"} for field in OUTPUTS]}
        args = {"model_config": json.dumps(config), "model_repository": "/nowhere", "model_version": "1",
                "model_name": "ensemble"}
        self.model = Model(self.pb, args, open_llm=lambda *_, **__: llm)

    def ask(self, parameters: dict[str, Any] | None = None, **inputs: Any) -> SimpleNamespace:
        request = FakeRequest({"text_input": "hi", "max_tokens": 4, **inputs}, parameters)
        known = len(self.llm.handles)
        self.model.execute([request])
        wait_until(lambda: len(self.llm.handles) > known or request.sender.final.is_set())
        handles = self.llm.handles[known:]
        return SimpleNamespace(sender=request.sender, handle=handles[0] if handles else None)


@pytest.fixture
def start() -> Iterator[Callable[..., Harness]]:
    running: list[Harness] = []

    def open_model(llm: FakeLLM | None = None, **settings: Any) -> Harness:
        running.append(Harness(llm or FakeLLM(), **settings))
        return running[-1]

    yield open_model
    for harness in running:
        if not harness.llm.closed:
            harness.model.close()


def ended(asked: SimpleNamespace) -> Any:
    """The responses of a request that has ended, exactly once and never touched afterwards."""
    assert asked.sender.final.wait(5)
    assert asked.sender.num_final == 1
    assert not asked.sender.used_after_final
    return asked.sender.responses


def test_whole_answer(start: Callable[..., Harness]) -> None:
    asked = start().ask()
    asked.handle.news(" the", [1])
    asked.handle.news(" end", [1, 2], reason="length")
    [response] = ended(asked)
    assert response.values() == {"text_output": [["hi the end"]], "finish_reason": [["length"]],
                                 "num_input_tokens": [[3]], "num_output_tokens": [[2]], "batch_index": [[0]]}


@pytest.mark.parametrize(("deployed", "given", "text"), [
    (False, None, "hi x"), (True, None, " x"), (False, True, " x"), (True, False, "hi x")])
def test_the_prompt_in_the_answer(start: Callable[..., Harness], deployed: bool, given: bool | None,
                                  text: str) -> None:
    inputs: dict[str, Any] = {} if given is None else {"exclude_input_in_output": given}
    asked = start(exclude_input_in_output=deployed).ask(**inputs)
    asked.handle.news(" x", [1], reason="stop")
    assert ended(asked)[0].values()["text_output"] == [[text]]


def test_stream_sends_pieces_and_the_reason_last(start: Callable[..., Harness]) -> None:
    asked = start().ask(stream=True, return_log_probs=True)
    asked.handle.news(" a", [1], log_probs=(-0.5,))
    asked.handle.news("", [2], log_probs=(-0.25,))
    asked.handle.news(" b", [3], reason="stop", log_probs=(-0.25,))
    values = [response.values() for response in ended(asked)]
    assert [v["text_output"] for v in values] == [[[" a"]], [[""]], [[" b"]]]
    assert [v["cum_log_probs"] for v in values] == [[[-0.5]], [[-0.75]], [[-1.0]]]
    assert [v.get("finish_reason") for v in values] == [None, None, [["stop"]]]
    assert values[-1]["num_output_tokens"] == [[3]]
    assert values[-1]["num_input_tokens"] == [[3]]


def test_text_held_back_sends_nothing(start: Callable[..., Harness]) -> None:
    asked = start().ask(stream=True)
    asked.handle.news("", [1])
    asked.handle.news("é", [2], reason="length")
    assert len(ended(asked)) == 1


def test_several_sequences(start: Callable[..., Harness]) -> None:
    harness = start()
    asked = harness.ask(num_return_sequences=2)
    asked.handle.news("a", [1], sequence=1, reason="stop", num_sequences=2)
    asked.handle.news("b", [1, 2], sequence=0, reason="length", num_sequences=2)
    assert ended(asked)[0].values()["text_output"] == [["hib", "hia"]]
    streamed = harness.ask(num_return_sequences=2, stream=True)
    streamed.handle.news("a", [1], sequence=1, reason="stop", num_sequences=2)
    streamed.handle.news("b", [1, 2], sequence=0, reason="length", num_sequences=2)
    values = [response.values() for response in ended(streamed)]
    assert [(v["sequence_index"], v["text_output"]) for v in values] == [([[1]], [["a"]]), ([[0]], [["b"]])]


@pytest.mark.parametrize("decoupled", [True, False])
def test_rows_of_one_request(start: Callable[..., Harness], decoupled: bool) -> None:
    harness = start(decoupled=decoupled)
    asked = harness.ask(text_input=np.array([[b"p"], [b"q"]], dtype=object), max_tokens=np.array([[4], [5]]))
    wait_until(lambda: len(harness.llm.handles) == 2)
    first, second = harness.llm.handles
    second.news("2", [1], reason="stop")
    first.news("1", [1], reason="length")
    values = [response.values() for response in ended(asked)]
    if decoupled:
        assert [(v["batch_index"], v["text_output"]) for v in values] == [([[1]], [["q2"]]), ([[0]], [["p1"]])]
    else:
        assert [(v["batch_index"], v["text_output"]) for v in values] == [([[0], [1]], [["p1"], ["q2"]])]


@pytest.mark.parametrize("inputs", [{}, {"stream": True}])
def test_a_client_that_leaves_stops_its_request(start: Callable[..., Harness], inputs: dict[str, Any]) -> None:
    harness = start()
    asked, other = harness.ask(**inputs), harness.ask(**inputs)
    asked.sender.client_left = True
    wait_until(lambda: asked.handle.num_cancels)
    assert ended(asked)[-1].error.code == FakeError.CANCELLED
    asked.handle.news("late", [1], reason="cancelled")
    other.handle.news("fine", [1], reason="stop")
    assert ended(other)[-1].error is None
    assert asked.sender.num_final == 1
    assert harness.pb.metrics["tensorwright_requests_total", "cancelled"] == 1


def test_deadline_of_a_plain_request(start: Callable[..., Harness]) -> None:
    harness = start(request_timeout_s=0.05)
    asked, streamed = harness.ask(), harness.ask(stream=True)
    error = ended(asked)[-1].error
    assert "0.05 s" in error.message
    assert "--request_timeout_s" in error.message
    assert asked.handle.num_cancels == 1
    assert not streamed.sender.final.is_set()


def test_a_silent_stream_is_opened_once(start: Callable[..., Harness]) -> None:
    harness = start(opening_event_s=0.05)
    asked = harness.ask(stream=True)
    wait_until(lambda: asked.sender.responses)
    plain = harness.ask()
    asked.handle.news("x", [1], reason="stop")
    assert [r.values()["text_output"] for r in ended(asked)] == [[[""]], [["x"]]]
    assert not plain.sender.responses


def test_limits_and_unknown_fields_are_the_clients_errors(start: Callable[..., Harness]) -> None:
    llm = FakeLLM(LimitError("prompt of 9 tokens plus 4 is over max_seq_len 12"))
    harness = start(llm)
    error = ended(harness.ask())[-1].error
    assert (error.code, error.message) == (FakeError.INVALID_ARG, "prompt of 9 tokens plus 4 is over max_seq_len 12")
    error = ended(harness.ask({"temprature": 1}))[-1].error
    assert error.code == FakeError.INVALID_ARG
    assert "temperature" in error.message


def test_a_defect_fails_one_request_only(start: Callable[..., Harness]) -> None:
    llm = FakeLLM(KeyError("defect"))
    harness = start(llm)
    assert ended(harness.ask())[-1].error.code == FakeError.INTERNAL
    llm.error = None
    asked = harness.ask()
    asked.handle.news("x", [1], reason="stop", error=None)
    assert ended(asked)[-1].error is None


def test_an_answer_that_cannot_be_made_ends_its_request(start: Callable[..., Harness],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    harness = start()
    asked, streamed = harness.ask(), harness.ask(stream=True)
    monkeypatch.setattr(harness.pb, "Tensor", lambda name, array: 1 // 0)
    asked.handle.news("x", [1], reason="stop")
    streamed.handle.news("x", [1])
    for each in (asked, streamed):
        assert "ZeroDivisionError" in ended(each)[-1].error.message
        assert each.handle.num_cancels == 1
    assert harness.pb.metrics["tensorwright_requests_total", "error"] == 2


def test_a_client_that_cannot_be_reached_stops_its_request(start: Callable[..., Harness]) -> None:
    harness = start()
    asked, other = harness.ask(stream=True), harness.ask()
    asked.sender.is_broken = True
    asked.handle.news("x", [1])
    wait_until(lambda: asked.handle.num_cancels)
    other.handle.news("fine", [1], reason="stop")
    assert ended(other)[-1].error is None


def test_inputs_that_cannot_be_read_fail_one_request_only(start: Callable[..., Harness],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    harness = start()
    broken, sound = FakeRequest({"text_input": "hi"}), FakeRequest({"text_input": "hi", "max_tokens": 1})
    monkeypatch.setattr(broken.inputs()[0], "as_numpy", lambda: 1 // 0)
    harness.model.execute([broken, sound])
    assert ended(SimpleNamespace(sender=broken.sender))[-1].error.code == FakeError.INTERNAL
    wait_until(lambda: harness.llm.handles)


def test_an_error_of_the_engine(start: Callable[..., Harness]) -> None:
    asked = start().ask()
    asked.handle.news("", reason="error", error="out of KV blocks")
    error = ended(asked)[-1].error
    assert (error.code, error.message) == (FakeError.INTERNAL, "out of KV blocks")


def test_a_bad_row_fails_the_whole_request(start: Callable[..., Harness]) -> None:
    harness = start()
    asked = harness.ask(text_input=np.array([[b"p"], [b"\xff"]], dtype=object), max_tokens=np.array([[4], [5]]))
    assert ended(asked)[-1].error.code == FakeError.INVALID_ARG
    assert not harness.llm.handles


def test_streaming_needs_decoupled(start: Callable[..., Harness]) -> None:
    error = ended(start(decoupled=False).ask(stream=True))[-1].error
    assert "Streaming is only supported" in error.message


def test_bias_words_become_tokens(start: Callable[..., Harness]) -> None:
    asked = start().ask(embedding_bias_words=["ab", "b"], embedding_bias_weights=[1.0, 0.5])
    assert asked.handle.parameters.logit_bias == {97: 1.0, 98: 1.5}


def test_close_ends_everything(start: Callable[..., Harness]) -> None:
    harness = start()
    asked = harness.ask(stream=True)
    harness.model.close()
    assert "stopping" in ended(asked)[-1].error.message
    assert asked.handle.num_cancels == 1
    assert harness.llm.closed


def test_close_reaches_everyone(start: Callable[..., Harness]) -> None:
    harness = start()
    asked = [harness.ask(stream=True) for _ in range(3)]
    for each in asked[:2]:
        each.sender.is_broken = True
    harness.model.close()
    assert "stopping" in ended(asked[2])[-1].error.message
    assert [each.handle.num_cancels for each in asked] == [1, 1, 1]


def test_every_request_ends_exactly_once(start: Callable[..., Harness]) -> None:
    """Answers, clients that leave, deadlines and the end of the model race with each other."""
    harness = start(request_timeout_s=0.05, opening_event_s=0.01)
    requests = [FakeRequest({"text_input": "hi", "max_tokens": 4, "stream": i % 2 == 0}) for i in range(200)]
    choose = Random(0)

    def engine() -> None:
        while not harness.llm.closed:
            for handle in list(harness.llm.handles):
                handle.news("x", [1], reason=choose.choice([None, None, None, "stop"]))
            choose.choice(requests).sender.client_left = True

    thread = Thread(target=engine)
    thread.start()
    for request in requests:
        harness.model.execute([request])
    wait_until(lambda: len(harness.llm.handles) > 100)
    harness.model.close()
    thread.join()
    assert [(r.sender.num_final, r.sender.used_after_final) for r in requests] == [(1, False)] * 200
    assert sum(value for (name, _), value in harness.pb.metrics.items() if name == "tensorwright_requests_total") == 200


def test_metrics(start: Callable[..., Harness]) -> None:
    harness = start()
    asked = harness.ask()
    handle: FakeHandle = asked.handle
    handle.news("a", [1])
    handle.news("b", [2, 3], reason="length")
    ended(asked)
    wait_until(lambda: harness.pb.metrics.get(("tensorwright_requests_active", "")))
    metrics = harness.pb.metrics
    assert metrics["tensorwright_input_tokens_total", ""] == 3
    assert metrics["tensorwright_output_tokens_total", ""] == 3
    assert metrics["tensorwright_first_token_seconds_count", ""] == 1
    assert metrics["tensorwright_requests_total", "length"] == 1
    assert metrics["nv_trt_llm_request_metrics", "active"] == 1
    assert metrics["tensorwright_engine_ready", ""] == 1
    assert not harness.pb.log
