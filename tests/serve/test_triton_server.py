"""The real tritonserver with a tiny engine: protocols, errors, clients that leave, and a clean end."""

from __future__ import annotations

import importlib.metadata
import os
import queue
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorwright.errors import ServeError
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.serve.triton.launch import _children, _stop_signals, serve
from tensorwright.serve.triton.options import DeployOptions, LaunchOptions
from tensorwright.serve.triton.repository import write_model
from tensorwright.serve.triton.settings import ServeSettings
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.fake_triton import wait_until
from tensorwright.testing.tiny import TinyModel
from tensorwright.testing.triton_server import DeployedServer, free_ports

try:
    importlib.metadata.version("nvidia-pytriton")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs nvidia-pytriton (pip install 'tensorwright[triton]')", allow_module_level=True)
if int(importlib.metadata.version("numpy").split(".")[0]) >= 2:
    pytest.skip("needs numpy below 2 (pip install 'tensorwright[triton]')", allow_module_level=True)

pytestmark = pytest.mark.triton
PROMPT = "hi how are you?"
LONG = 6000
OPTIONS = ("--threads", "1", "--max_kv_tokens", "16384")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TinyModel(hidden_size=256, num_layers=6, intermediate_size=768, max_position_embeddings=8192)
    recipe = Recipe(model,  # large enough that LONG tokens take seconds
                    build={"max_seq_len": 8192, "max_batch_size": 8, "gather_context_logits": True,
                           "gather_generation_logits": True})
    return build_engine(recipe, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def expected(engine_dir: Path) -> Callable[[str, int], str]:
    llm = LLM(engine_dir, threads=1, max_kv_tokens=8192)
    return lambda prompt, n: llm.generate([prompt], SamplingParameters(max_tokens=n, end_ids=()))[0].sequences[0].text


@pytest.fixture(scope="module")
def server(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedServer]:
    words = ("--opening_event_s", "0.3", *OPTIONS)
    with DeployedServer(engine_dir, tmp_path_factory.mktemp("repository"), *words) as running:
        yield running


@pytest.fixture(scope="module")
def unary(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedServer]:
    words = ("--no_decoupled", "--request_timeout_s", "1", *OPTIONS)
    with DeployedServer(engine_dir, tmp_path_factory.mktemp("repository"), *words) as running:
        yield running


def test_generate_gives_the_runtimes_text(server: DeployedServer, expected: Callable[[str, int], str]) -> None:
    status, answer = server.generate(text_input=PROMPT, max_tokens=12, end_id=-1)
    assert status == 200
    assert answer["text_output"] == PROMPT + expected(PROMPT, 12)
    assert (answer["finish_reason"], answer["num_output_tokens"]) == ("length", 12)
    answer = server.generate(text_input=PROMPT, max_tokens=12, end_id=-1, exclude_input_in_output=True)[1]
    assert answer["text_output"] == expected(PROMPT, 12)


def test_pieces_of_a_stream_are_the_same_text(server: DeployedServer, expected: Callable[[str, int], str]) -> None:
    events = list(server.stream(text_input=PROMPT, max_tokens=12, end_id=-1))
    assert "".join(event["text_output"] for event in events) == expected(PROMPT, 12)
    assert [event.get("finish_reason") for event in events] == [*[None] * (len(events) - 1), "length"]
    assert events[-1]["num_output_tokens"] == 12
    [whole] = server.stream(text_input=PROMPT, max_tokens=12, end_id=-1, stream=False)
    assert whole["text_output"] == PROMPT + expected(PROMPT, 12)


def test_a_request_of_an_old_client(server: DeployedServer) -> None:
    status, answer = server.generate(
        text_input=PROMPT, max_tokens=8, bad_words="", stop_words=["</s>"], end_id=2, pad_id=2, top_k=40, top_p=0.9,
        temperature=0.7, random_seed=7, length_penalty=1.0, repetition_penalty=1.1, presence_penalty=0.1, min_length=1,
        beam_width=1, stream=False, return_log_probs=True, return_context_logits=True, return_generation_logits=True)
    assert status == 200, answer
    assert len(answer["output_log_probs"]) == answer["num_output_tokens"]
    assert answer["cum_log_probs"] == pytest.approx(sum(answer["output_log_probs"]), rel=1e-4)
    assert len(answer["context_logits"]) == answer["num_input_tokens"] * 320
    assert len(answer["generation_logits"]) == answer["num_output_tokens"] * 320


def test_temperature_alone_samples(server: DeployedServer) -> None:
    texts = {server.generate(text_input=PROMPT, max_tokens=8, temperature=1.0, seed=seed)[1]["text_output"]
             for seed in range(4)}
    assert len(texts) > 1


def test_streams_at_once(server: DeployedServer, expected: Callable[[str, int], str]) -> None:
    prompts = [f"{PROMPT} {i}" for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda p: "".join(
            event["text_output"] for event in server.stream(text_input=p, max_tokens=20, end_id=-1)), prompts))
    assert texts == [expected(prompt, 20) for prompt in prompts]


@pytest.mark.parametrize(("body", "parts"), [
    ({"text_input": "hi", "max_tokens": 4, "temprature": 1}, ["temprature", "temperature"]),
    ({"text_input": "hi", "max_tokens": 0}, ["max_tokens", "0"]),
    ({"text_input": "", "max_tokens": 4}, ["empty"]),
    ({"text_input": "hi", "max_tokens": 9000}, ["9000", "8192"]),
    ({"text_input": "hi " * 9000, "max_tokens": 4}, ["8191"]),
    ({"text_input": "hi", "max_tokens": 4, "beam_width": 3}, ["beam_width", "3", "1"]),
    ({"text_input": "hi"}, ["max_tokens"])])
def test_bad_requests(server: DeployedServer, body: dict[str, Any], parts: list[str]) -> None:
    status, answer = server.generate(**body)
    assert status == 400
    assert all(part in answer["error"] for part in parts), answer
    assert server.generate(text_input="hi", max_tokens=1)[0] == 200


def test_other_errors_over_http(server: DeployedServer) -> None:
    assert server.post("/v2/models/nothing/generate", {"text_input": "hi", "max_tokens": 1})[0] == 404
    status, answer = server.post("/v2/models/ensemble/generate", '{"text_input": ')
    assert status >= 400
    assert "JSON" in answer["error"]
    assert "exactly 1 response" in server.generate(text_input="hi", max_tokens=4, stream=True)[1]["error"]
    assert server.generate(text_input="hi", max_tokens=1, id="42")[1]["id"] == "42"
    [event] = server.stream(text_input="", max_tokens=4)
    assert "empty" in event["error"]


def test_a_closed_stream_stops_its_request(server: DeployedServer) -> None:
    cancelled = server.metric("tensorwright_requests_total", outcome="cancelled")
    events = server.stream(text_input=PROMPT, max_tokens=LONG, end_id=-1)
    next(events)
    wait_until(lambda: server.metric("tensorwright_requests_active") == 1)
    events.close()
    wait_until(lambda: server.metric("tensorwright_requests_active") == 0)
    assert server.metric("tensorwright_requests_total", outcome="cancelled") == cancelled + 1
    steps = server.metric("tensorwright_steps")
    time.sleep(1)
    assert server.metric("tensorwright_steps") == steps


def test_a_stream_that_waits_is_opened_and_can_be_closed(server: DeployedServer) -> None:
    cancelled = server.metric("tensorwright_requests_total", outcome="cancelled")
    running = [server.stream(text_input=f"{i} {PROMPT}", max_tokens=LONG, end_id=-1) for i in range(8)]
    for events in running:
        next(events)
    waiting = server.stream(text_input="one more", max_tokens=4)
    assert next(waiting)["text_output"] == ""
    waiting.close()
    wait_until(lambda: server.metric("tensorwright_requests_total", outcome="cancelled") == cancelled + 1)
    for events in running:
        events.close()
    wait_until(lambda: server.metric("tensorwright_requests_total", outcome="cancelled") == cancelled + 9)
    wait_until(lambda: server.metric("tensorwright_requests_active") == 0)


def _input(grpc: Any, name: str, datatype: str, array: np.ndarray[Any, Any]) -> Any:
    tensor = grpc.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def test_a_cancelled_grpc_stream_stops_its_request(server: DeployedServer) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    cancelled = server.metric("tensorwright_requests_total", outcome="cancelled")
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("ensemble", [
            _input(grpc, "text_input", "BYTES", np.array([[PROMPT.encode()]], dtype=object)),
            _input(grpc, "max_tokens", "INT32", np.array([[LONG]], dtype=np.int32)),
            _input(grpc, "end_id", "INT32", np.array([[-1]], dtype=np.int32)),
            _input(grpc, "stream", "BOOL", np.array([[True]]))])
        result, error = answers.get(timeout=20)
        assert error is None
        assert result.as_numpy("text_output").shape == (1, 1)
        client.stop_stream(cancel_requests=True)
    wait_until(lambda: server.metric("tensorwright_requests_total", outcome="cancelled") == cancelled + 1)
    wait_until(lambda: server.metric("tensorwright_requests_active") == 0)


def test_infer_without_decoupling(unary: DeployedServer, expected: Callable[[str, int], str]) -> None:
    def infer(rows: int) -> tuple[int, Any]:
        inputs = [{"name": "text_input", "shape": [rows, 1], "datatype": "BYTES", "data": ["hi", PROMPT][:rows]},
                  {"name": "max_tokens", "shape": [rows, 1], "datatype": "INT32", "data": [4, 6][:rows]},
                  {"name": "end_id", "shape": [rows, 1], "datatype": "INT32", "data": [-1] * rows}]
        return unary.post("/v2/models/ensemble/infer", {"inputs": inputs, "outputs": [{"name": "text_output"}]})

    status, answer = infer(2)
    assert status == 200, answer
    assert answer["outputs"][0]["shape"] == [2, 1]
    assert answer["outputs"][0]["data"] == ["hi" + expected("hi", 4), PROMPT + expected(PROMPT, 6)]
    assert unary.generate(text_input="hi", max_tokens=4, end_id=-1)[1]["text_output"] == "hi" + expected("hi", 4)
    assert "decoupled" in unary.generate(text_input="hi", max_tokens=4, stream=True)[1]["error"]


def test_deadline_and_other_requests_meanwhile(unary: DeployedServer) -> None:
    answers: list[tuple[int, Any]] = []
    slow = threading.Thread(target=lambda: answers.append(
        unary.generate(text_input="hi", max_tokens=8000, end_id=-1, num_return_sequences=2)))
    slow.start()
    time.sleep(0.2)
    assert unary.generate(text_input="hi", max_tokens=1)[0] == 200
    assert not answers
    slow.join()
    status, answer = answers[0]
    assert status == 400
    assert "deadline of 1 s" in answer["error"]


def test_a_dead_model_process_ends_the_server(engine_dir: Path, tmp_path: Path) -> None:
    with DeployedServer(engine_dir, tmp_path, *OPTIONS) as running:
        [launched] = _children(running.process.pid)
        [stub] = _children(launched)
        os.kill(stub, signal.SIGKILL)
        assert running.wait() == 1
    assert f"process of model ensemble died (pid {stub})" in running.output
    assert not list(Path("/dev/shm").glob(f"tensorwright_{running.process.pid}_*"))


def test_a_failed_engine_loop_ends_the_server(engine_dir: Path, tmp_path: Path) -> None:
    place = write_model(DeployOptions(engine_dir, tmp_path), ServeSettings(threads=1, max_kv_tokens=1024))
    module = place / "1" / "tensorwright" / "runtime" / "async_llm.py"
    text = module.read_text()
    assert text.count("self._loop.step()") == 1
    module.write_text(text.replace("self._loop.step()", "raise RuntimeError('a defect')"))
    ports = free_ports(3)
    options = LaunchOptions(http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2])
    errors: list[str] = []

    def ask() -> None:
        url = f"{options.url(options.http_port)}/v2/models/ensemble/generate"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url, b'{"text_input": "hi", "max_tokens": 4}', timeout=20)
        with caught.value as answer:
            errors.append(answer.read().decode())

    with pytest.raises(ServeError, match="loop has failed"):
        serve(tmp_path, "ensemble", options, ask)
    assert "a defect" in errors[0]


def test_a_killed_deploy_takes_the_server_with_it(engine_dir: Path, tmp_path: Path) -> None:
    with DeployedServer(engine_dir, tmp_path, *OPTIONS) as running:
        [launched] = _children(running.process.pid)
        [stub] = _children(launched)
        [folder] = {word for word in Path(f"/proc/{launched}/cmdline").read_text().split("\0") if "backend-dir" in word}
        running.process.kill()
        assert running.wait() == -signal.SIGKILL
        wait_until(lambda: not is_running(launched) and not is_running(stub), timeout_s=20)
        shutil.rmtree(Path(folder.partition("=")[2]).parent)  # nobody was left to do it
    assert not list(Path("/dev/shm").glob(f"tensorwright_{running.process.pid}_*"))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_closed_terminal_is_a_stop_signal() -> None:
    with _stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.wait(1)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with _stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.05)
    finally:
        signal.signal(signal.SIGHUP, old)


def test_sigterm_leaves_nothing_and_ports_in_use_are_named(engine_dir: Path, tmp_path: Path) -> None:
    with DeployedServer(engine_dir, tmp_path, *OPTIONS) as running:
        pid = running.process.pid
        [launched] = _children(pid)
        second = DeployedServer(engine_dir, tmp_path / "second", "--http_port", str(running.http_port))
        assert second.wait() == 1
        assert f"port {running.http_port} for http cannot be used" in second.output
        assert running.stop() == 0
    assert running.lines[-1] == "stopped\n"
    assert not Path(f"/proc/{launched}").exists()
    assert not list(Path("/dev/shm").glob(f"tensorwright_{pid}_*"))
