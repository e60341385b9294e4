"""The GPU executor's own code over a GPU that is played. What kernels compute is the fake executor's and the
reference's here; they are tested for themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
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


class Caches(FakeExecutor):
    """KV blocks, and the model that reads them."""

    def __init__(self, gpu: Any, num_blocks: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=BLOCK)
        self.gpu = gpu

    def copy_block(self, source: int, destination: int) -> None:
        self.gpu.launch(lambda: self.copy_blocks([(source, destination)]))


class Plan:
    """The launches of a step, as notes to the GPU."""

    def __init__(self, engine: Any, _weights: Any, caches: Caches, activations: Any, _processors: int, *,
                 stretches: bool, ranks: None) -> None:
        self.gpu, self.model, self.logits = caches.gpu, caches, activations.buffer()

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
        self.gpu.launch(step)

    def take(self, tokens: int, token_ids: int, drawn: int, stream: int) -> None:
        def step() -> None:
            ids = ints(token_ids, tokens)
            for i in np.flatnonzero(ids < 0):
                ids[i] = ints(drawn, 4 * int(-ids[i]))[-4]
        self.gpu.launch(step)

    def choose(self, rows: int, logits: Any, chosen: int, drawn: int, stream: int) -> None:
        def step() -> None:
            for into in (chosen, drawn):
                store(into, logits.numpy()[:rows], [SamplingRow()] * rows)
        self.gpu.launch(step)

    def draw(self, rows: int, logits: Any, samplings: int, adjustments: int, chosen: int, drawn: int,
             stream: int) -> None:
        from tensorwright.runtime.cuda.sampling import SAMPLING

        def step() -> None:
            settings = ints(samplings, 12 * rows).view(SAMPLING)
            lines = logits.numpy()[settings["row"]]
            store(drawn, lines, [SamplingRow(float(s["temperature"]), int(s["top_k"]), float(s["top_p"]),
                                             uniform=int(s["uniform"]) * 2.0**-32) for s in settings])
        self.gpu.launch(step)


def ints(address: int, count: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))


def store(address: int, lines: Any, rows: list[SamplingRow]) -> None:
    tokens, log_probs = choose(lines, rows)
    into = ints(address, 4 * len(rows)).reshape(-1, 4)
    into[:, 0], into[:, 1], into[:, 2] = tokens, log_probs.view(np.int32), lines.sum(axis=1).view(np.int32)


@contextmanager
def stand_ins() -> Iterator[Any]:
    """For weights, memory and launches; gives the GPU."""
    from tensorwright.testing.played_gpu import PlayedGpu, played

    def activations(_: Any, rows: dict[str, int], __: Any) -> Any:
        logits = torch.zeros(rows["outputs"], VOCAB)
        return SimpleNamespace(buffer=lambda *_: logits)

    gpu = PlayedGpu()
    with played(gpu, Plan=Plan, Weights=lambda *_: None, Caches=lambda _, count, __: Caches(gpu, count),
                Activations=activations, check_ranks=lambda *_: None):
        yield gpu


def open_executor(num_blocks: int, *, graphs: bool = True, limits: Limits = LIMITS) -> Any:
    from tensorwright.runtime.cuda.executor import CudaExecutor

    op = SimpleNamespace(outputs=("logits",))
    engine = SimpleNamespace(target="", directory="", world_size=1, program=SimpleNamespace(ops=(op,) * OPS),
                             vocab_size=VOCAB, tokens_per_block=BLOCK, limits=limits, manifest={})
    return CudaExecutor(engine, num_blocks=num_blocks, graphs=graphs)


def harness_over(executor: Any, limits: Limits = LIMITS) -> Harness:
    harness = Harness(num_blocks=executor.num_blocks)
    harness.executor, harness.loop = executor, RequestLoop(executor, limits)
    return harness


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("runs_ahead", [True, False])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "top_k": 5}, {"num_return_sequences": 3, "temperature": 1.0},
                                 {"beam_width": 2}, {"return_generation_logits": True}])
def test_tokens_are_the_plain_run_s(graphs: bool, runs_ahead: bool, how: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(3, 7, length).tolist()) for length in (3, 120, 17, 1, 9, 12)]
    asked = [{"max_tokens": count, **how} for count in (12, 3, 1, 20, 9, 15)]
    with stand_ins() as gpu:
        executor = open_executor(80, graphs=graphs)
        executor.runs_ahead = runs_ahead
        harness = harness_over(executor)
        requests = [harness.submit(prompt, **wanted) for prompt, wanted in zip(prompts, asked, strict=True)]
        results = harness.run()
        assert (gpu.replays > 10) == graphs
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


def test_a_step_is_on_its_way_while_the_host_does_something_else() -> None:
    with stand_ins() as gpu:
        harness = harness_over(open_executor(80))
        harness.submit((3, 4, 5), max_tokens=12, end_ids=())
        harness.step()
        for number in range(10):
            steps = harness.executor._caches.num_steps
            assert steps == number  # the last one that was started has not begun
            assert gpu.done < len(gpu.work)
            harness.step()


def test_prompts_in_many_pieces_are_not_overwritten_on_their_way() -> None:
    with stand_ins():
        harness = harness_over(open_executor(80))
        prompt = tuple(np.random.default_rng(2).integers(3, 7, 190).tolist())
        harness.submit(prompt, max_tokens=2, end_ids=())
        (result,) = harness.run().values()
    assert [list(result.sequences[0].token_ids)] == plain_run(prompt, SamplingParameters(max_tokens=2), end_ids=())


def test_memory_that_grows_keeps_what_was_drawn() -> None:
    """Context logits take more rows than there were, while another request's token is on its way."""
    limits = replace(LIMITS, max_batch_size=2, max_beam_width=1)
    with stand_ins():
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
