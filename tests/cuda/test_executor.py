"""The GPU executor over a device that is played: what it is asked for happens late, when somebody waits for it.

So a buffer that is written again too early, a token that the host would have to know, or a recorded step that looks at
the wrong place gives other tokens. What kernels compute is the fake executor's and the reference's; they are tested
for themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorwright.engine.limits import Limits
from tensorwright.program.ops import BATCH_INPUTS
from tensorwright.runtime.batch import Batch, SamplingRow
from tensorwright.runtime.loop import RequestLoop
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.sampling import choose
from tensorwright.testing.fake_executor import FakeExecutor
from tensorwright.testing.plain_run import LIMITS, Harness, plain_run

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
VOCAB, BLOCK, OPS = 32, 4, 3


class Device:
    """Work in the order in which it was given; `launch` only notes it."""

    def __init__(self) -> None:
        self.done = 0
        self.work: list[Callable[[], object]] = []
        self.recording: list[Callable[[], object]] | None = None
        self.replays = 0

    def launch(self, work: Callable[[], object]) -> None:
        (self.work if self.recording is None else self.recording).append(work)

    def wait(self, until: int | None = None) -> None:
        for work in self.work[self.done:until]:
            self.done += 1
            work()


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.until = device, 0

    def record(self) -> None:
        self.until = len(self.device.work)

    def synchronize(self) -> None:
        self.device.wait(self.until)


class Graph:
    def __init__(self, device: Device) -> None:
        self.device = device

    def capture_begin(self, **_: Any) -> None:
        self.device.recording = self.work = list[Callable[[], object]]()

    def capture_end(self) -> None:
        self.device.recording = None

    def replay(self) -> None:
        self.device.replays += 1
        for work in self.work:
            self.device.launch(work)


class Caches(FakeExecutor):
    """KV blocks, and the model that reads them."""

    def __init__(self, device: Device, num_blocks: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=BLOCK)
        self.device = device

    def copy_block(self, source: int, destination: int) -> None:
        self.device.launch(lambda: self.copy_blocks([(source, destination)]))


class Plan:
    """The launches of a step, as notes to the device."""

    device: Device

    def __init__(self, engine: Any, _weights: Any, caches: FakeExecutor, activations: Any, _processors: int, *,
                 stretches: bool) -> None:
        self.model, self.logits = caches, activations.logits

    def stretch(self, begin: int, end: int, sizes: Any) -> None:
        """None: every op by itself."""

    def run(self, begin: int, end: int, sizes: Any, inputs: dict[str, int], stream: int) -> None:
        def step() -> None:
            arrays = {name: ints(inputs[name], sizes.of(name)) for name in BATCH_INPUTS}
            count = int((arrays["query_lengths"] > 0).sum()) if sizes.is_decode else sizes.sequences
            tokens = count if sizes.is_decode else sizes.tokens
            arrays["block_tables"] = arrays["block_tables"].reshape(-1, sizes.table_width)
            cut = {name: np.ascontiguousarray(array[:tokens if name in ("token_ids", "positions", "slots") else
                                                    count if name != "output_rows" or sizes.is_decode else None])
                   for name, array in arrays.items()}
            assert (cut["token_ids"] >= 0).all()
            logits = self.model.execute(Batch(**cut))
            self.logits.numpy()[:len(logits)] = logits
        self.device.launch(step)

    def take(self, tokens: int, token_ids: int, drawn: int, stream: int) -> None:
        def step() -> None:
            ids = ints(token_ids, tokens)
            for i in np.flatnonzero(ids < 0):
                ids[i] = ints(drawn, 4 * int(-ids[i]))[-4]
        self.device.launch(step)

    def choose(self, rows: int, logits: Any, chosen: int, drawn: int, stream: int) -> None:
        def step() -> None:
            for into in (chosen, drawn):
                store(into, logits.numpy()[:rows], [SamplingRow()] * rows)
        self.device.launch(step)

    def draw(self, rows: int, logits: Any, samplings: int, adjustments: int, chosen: int, drawn: int,
             stream: int) -> None:
        from tensorwright.runtime.cuda.sampling import SAMPLING

        def step() -> None:
            settings = ints(samplings, 12 * rows).view(SAMPLING)
            lines = logits.numpy()[settings["row"]]
            store(drawn, lines, [SamplingRow(float(s["temperature"]), int(s["top_k"]), float(s["top_p"]),
                                             uniform=int(s["uniform"]) * 2.0**-32) for s in settings])
        self.device.launch(step)


def ints(address: int, count: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))


def store(address: int, lines: Any, rows: list[SamplingRow]) -> None:
    tokens, log_probs = choose(lines, rows)
    into = ints(address, 4 * len(rows)).reshape(-1, 4)
    into[:, 0], into[:, 1], into[:, 2] = tokens, log_probs.view(np.int32), lines.sum(axis=1).view(np.int32)


@contextmanager
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Launches and what torch asks of a GPU, over the device that is played."""
    from tensorwright.runtime.cuda import executor, inputs, logits

    device, copy, to_host = Device(), torch.Tensor.copy_, torch.Tensor.cpu

    def copy_later(into: Any, source: Any, non_blocking: bool = False) -> Any:
        if non_blocking:
            device.launch(lambda: copy(into, source))
            return into
        device.wait()
        return copy(into, source)

    def to_host_now(tensor: Any) -> Any:
        device.wait()
        return to_host(tensor).clone()

    cuda = SimpleNamespace(
        Event=lambda: Event(device), Stream=lambda _: SimpleNamespace(cuda_stream=0, synchronize=device.wait),
        CUDAGraph=lambda: Graph(device), stream=lambda _: nullcontext(), synchronize=lambda _: device.wait(),
        current_device=lambda: 0, get_device_properties=lambda _: SimpleNamespace(multi_processor_count=1))
    names = {"cuda": cuda, "device": lambda *_: torch.device("cpu"), "no_grad": torch.no_grad, "float32": torch.float32,
             "int32": torch.int32, "zeros": lambda *size, pin_memory=False, **how: torch.zeros(*size, **how)}
    with monkeypatch.context() as patch:
        for module in (executor, inputs, logits):
            patch.setattr(module, "torch", SimpleNamespace(**names))
        patch.setattr(torch.Tensor, "copy_", copy_later)
        patch.setattr(torch.Tensor, "cpu", to_host_now)
        patch.setattr(executor, "Plan", type("Plan", (Plan,), {"device": device}))
        patch.setattr(executor, "Weights", lambda *_: None)
        patch.setattr(executor, "Caches", lambda _, count, __: Caches(device, count))
        patch.setattr(executor, "Activations", lambda _, rows, __: SimpleNamespace(
            logits=torch.zeros(rows["outputs"], VOCAB), buffer=None))
        for name in ("check_target", "check_ranks", "use_context", "current_context"):
            patch.setattr(executor, name, lambda *_, **__: None)
        patch.setattr(executor.CudaExecutor, "logits", property(lambda self: self._activations.logits))
        yield device


def open_executor(num_blocks: int, *, graphs: bool = True, limits: Limits = LIMITS) -> Any:
    from tensorwright.runtime.cuda.executor import CudaExecutor

    op = SimpleNamespace(outputs=("logits",))
    engine = SimpleNamespace(target="", directory="", world_size=1, program=SimpleNamespace(ops=(op,) * OPS),
                             vocab_size=VOCAB, tokens_per_block=BLOCK, limits=limits, manifest={})
    return CudaExecutor(engine, num_blocks=num_blocks, graphs=graphs)  # type: ignore[arg-type]


def harness_over(executor: Any, limits: Limits = LIMITS) -> Harness:
    harness = Harness(num_blocks=executor.num_blocks)
    harness.executor, harness.loop = executor, RequestLoop(executor, limits)
    return harness


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("runs_ahead", [True, False])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "top_k": 5}, {"num_return_sequences": 3, "temperature": 1.0},
                                 {"beam_width": 2}, {"return_generation_logits": True}])
def test_tokens_are_the_plain_run_s(graphs: bool, runs_ahead: bool, how: dict[str, Any],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(3, 7, length).tolist()) for length in (3, 120, 17, 1, 9, 12)]
    asked = [{"max_tokens": count, **how} for count in (12, 3, 1, 20, 9, 15)]
    with played(monkeypatch) as device:
        executor = open_executor(80, graphs=graphs)
        executor.runs_ahead = runs_ahead
        harness = harness_over(executor)
        requests = [harness.submit(prompt, **wanted) for prompt, wanted in zip(prompts, asked, strict=True)]
        results = harness.run()
        assert (device.replays > 10) == graphs
    for request, prompt, wanted in zip(requests, prompts, asked, strict=True):
        result = results[request.id]
        assert result.error is None
        if "beam_width" not in how:
            tokens = plain_run(prompt, SamplingParameters(**wanted))
            assert [list(sequence.token_ids) for sequence in result.sequences] == tokens
        else:
            alone = Harness()
            alone.submit(prompt, **wanted)
            assert [s.token_ids for s in result.sequences] == [s.token_ids for s in alone.run()[0].sequences]


def test_a_step_is_on_its_way_while_the_host_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with played(monkeypatch) as device:
        harness = harness_over(open_executor(80))
        harness.submit((3, 4, 5), max_tokens=12, end_ids=())
        harness.step()
        for number in range(10):
            steps = harness.executor._caches.num_steps  # type: ignore[attr-defined]
            assert steps == number  # the last one that was started has not begun
            assert device.done < len(device.work)
            harness.step()


def test_prompts_in_many_pieces_are_not_overwritten_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with played(monkeypatch):
        harness = harness_over(open_executor(80))
        prompt = tuple(np.random.default_rng(2).integers(3, 7, 190).tolist())
        harness.submit(prompt, max_tokens=2, end_ids=())
        (result,) = harness.run().values()
    assert [list(result.sequences[0].token_ids)] == plain_run(prompt, SamplingParameters(max_tokens=2), end_ids=())


def test_memory_that_grows_keeps_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context logits take more rows than there were, while another request's token is on its way."""
    limits = replace(LIMITS, max_batch_size=2, max_beam_width=1)
    with played(monkeypatch):
        harness = harness_over(open_executor(200, limits=limits), limits)
        harness.submit((3, 4, 5), max_tokens=12, end_ids=())
        for _ in range(4):
            harness.step()
        harness.submit((3, 4, 5, 6) * 6, max_tokens=2, end_ids=(), return_context_logits=True)
        results = harness.run()
    first, second = results[0], results[1]
    assert [list(first.sequences[0].token_ids)] == plain_run((3, 4, 5), SamplingParameters(max_tokens=12), end_ids=())
    assert second.context_logits is not None
    assert second.context_logits.shape == (24, VOCAB)
