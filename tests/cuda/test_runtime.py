"""What of the GPU runtime needs no GPU: sampling with torch, the padding of steps, names that launches give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorwright.engine.engine import Engine
from tensorwright.errors import LimitError
from tensorwright.kernels.cuda.launch import Launch, Size, from_json, is_library_call, scratch_offsets
from tensorwright.program.ops import BATCH_INPUTS, OPS
from tensorwright.runtime.batch import SamplingRow
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel

torch = pytest.importorskip("torch", reason="needs torch")

def test_settings_of_a_draw_are_packed_as_the_kernel_reads_them() -> None:
    from tensorwright.runtime.cuda.sampling import ADJUSTMENT, SAMPLING, pack

    rows = [SamplingRow(), SamplingRow(temperature=0.7, top_k=2**40, top_p=0.9, uniform=0.75),
            SamplingRow(biased=(7,), biases=(-np.inf,), seen=(1, 2), counts=np.array([0, 3]), repetition_penalty=1.5),
            SamplingRow(min_p=0.5, biased=(3, 4), biases=(9.0, -1.0))]
    samplings, adjustments = pack([3, 0, 1, 1], rows)
    assert (SAMPLING.itemsize, ADJUSTMENT.itemsize) == (48, 8)  # as in native/draw.cuh
    assert samplings["row"].tolist() == [3, 0, 1, 1]
    assert samplings["temperature"].tolist() == [0, np.float32(0.7), 0, 0]
    assert samplings["top_k"].tolist() == [0, 2**31 - 1, 0, 0]
    assert samplings["uniform"].tolist() == [0, 3 << 30, 0, 0]
    assert samplings[["first", "biased", "seen"]].tolist() == [(0, 0, 0), (0, 0, 0), (0, 1, 2), (3, 2, 0)]
    assert adjustments.tolist() == [(7, -np.inf), (1, 0), (2, 3), (3, 9), (4, -1)]


def test_decode_steps_are_padded_to_buckets_and_others_are_not() -> None:
    from tensorwright.runtime.cuda.inputs import decode_bucket, sizes_of

    def step(queries: list[int], rows: list[int]) -> object:
        batch = make_batch([(query, query + 5) for query in queries], 4)[0]
        batch = type(batch)(**{**vars(batch), "output_rows": np.array(rows, np.int32)})
        return decode_bucket(batch, (1, 2, 4), 8) or sizes_of(batch)

    padded = step([1, 1, 1], [0, 1, 2])
    assert (padded.tokens, padded.sequences, padded.outputs, padded.table_width) == (4, 4, 4, 8)
    for queries, rows in (([1, 2], [0, 2]), ([1, 1], [1, 0]), ([1, 1], [1]), ([1] * 5, [0, 1, 2, 3, 4])):
        plain = step(queries, rows)
        assert not plain.is_decode and plain.sequences == len(queries)


def test_batch_inputs_do_not_overlap() -> None:
    from tensorwright.runtime.cuda.inputs import Sizes

    sizes = Sizes(tokens=7, sequences=3, outputs=2, table_width=5, max_query_length=4)
    starts, end = sizes.offsets()
    ends = [starts[name] + sizes.of(name) for name in BATCH_INPUTS]
    assert all(last <= start for last, start in zip(ends, [*list(starts.values())[1:], end], strict=True))


def test_every_argument_of_a_launch_names_something(tmp_path: Path) -> None:
    from tensorwright.runtime.cuda.inputs import Sizes

    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
    recipe = Recipe(TinyModel("qwen3", head_size=32), "float16", "W4A16", int8_kv_cache=True, build={"target": "sm_90"})
    engine = Engine.open(build_engine(recipe, tmp_path))
    entries = engine.manifest["kernels"]["entries"]
    for op, step in zip(engine.program.ops, engine.steps, strict=True):
        spec = OPS[op.kind]
        known = {"inputs": {n.rstrip("?") for n in spec.inputs}, "outputs": {n.rstrip("?") for n in spec.outputs},
                 "weights": {n.rstrip("?") for n in spec.weights}, "sizes": {"rows", *vars(Sizes(0, 0, 0, 0, 0))}}
        for variant in step.variants:
            source = from_json(entries[variant.symbol])
            known |= {"scratch": set(dict(source.scratch)), "zeros": set(dict(source.zeros))}
            for argument in names(source.launches):
                kind, _, name = argument.partition("+")[0].partition(".")
                assert name in known[kind], (op.name, argument)


def names(launches: tuple[Launch, ...]) -> list[str]:
    flat = [each for launch in launches if not is_library_call(launch.function) for argument in launch.arguments
            for each in (argument if isinstance(argument, tuple) else (argument,))]
    return [each for each in flat if isinstance(each, str) and each]


def test_sizes_and_scratch() -> None:
    assert Size("tokens", per=64, times=3).at({"tokens": 65}) == 6
    assert scratch_offsets({"x": Size("rows", times=10), "y": Size(times=300)}, {"rows": 7, "one": 1}) == (
        {"x": 0, "y": 256}, 768)


def test_a_gpu_that_is_too_small_is_answered_with_the_largest_step_that_fits(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
    from tensorwright.runtime import machines
    from tensorwright.runtime.llm import LLM
    from tensorwright.testing.fake_executor import FakeExecutor

    def open_with(max_num_tokens: int) -> LLM:
        build = {"target": "sm_90", "max_seq_len": 64, "max_num_tokens": max_num_tokens}
        engine_dir = build_engine(Recipe(TinyModel("mistral", head_size=32), "float16", "W4A16", build=build), tmp_path)
        return LLM(engine_dir, executor=FakeExecutor())

    monkeypatch.setattr(machines._Gpu, "available_bytes", lambda self, engine, communicator: 7_500_000)
    with pytest.raises(LimitError) as caught:
        open_with(256)
    found = int((caught.value.mend or "").rpartition("--max_num_tokens ")[2])
    assert 16 < found < 255
    assert open_with(found).memory_table()
    with pytest.raises(LimitError):
        open_with(found + 1)
