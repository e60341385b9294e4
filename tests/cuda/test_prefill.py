"""Steps of many tokens: which programs have a stretch for them, and which steps take it. Nothing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.launch import from_json, scratch_offsets
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384}


def engine_of(model: TinyModel, folder: Path, **options: Any) -> Engine:
    recipe = Recipe(model, "float16", "W8A16", build={"target": "sm_90"}, **options)
    return Engine.open(build_engine(recipe, folder))


def stretches(engine: Engine) -> list[dict[str, Any]]:
    return list(engine.manifest["kernels"]["stretches"])


@pytest.mark.parametrize("model", [
    TinyModel("mistral", head_size=128, **SIZES), TinyModel("qwen2", sliding_window=9, **SIZES),
    TinyModel("qwen3", head_size=64, **SIZES), TinyModel("llama", attention_bias=True, mlp_bias=True, **SIZES)],
    ids=lambda model: model.family)
def test_every_family_has_one_for_its_layers(model: TinyModel, tmp_path: Path) -> None:
    engine = engine_of(model, tmp_path, int8_kv_cache=model.family == "qwen3")
    stretch, = stretches(engine)
    assert [op.kind for op in engine.program.ops[stretch["end"]:]] == ["gather_rows", "linear"]
    source = from_json(engine.manifest["kernels"]["entries"][stretch["entry"]])
    products = [launch for launch in source.launches if launch.function == "matmul"]
    assert len(products) == 4 * model.num_layers
    known = {f"named.{name}" for name in (*engine.program.buffers, *engine.program.weights)}
    known |= {f"scratch.{name}" for name, _ in source.scratch} | {f"zeros.{name}" for name, _ in source.zeros}
    known |= {f"batch.{name}" for name in engine.program.buffers}
    for launch in source.launches:
        flat = [each for a in launch.arguments for each in (a if isinstance(a, tuple) else (a,))]
        given = {each.partition("+")[0] for each in flat if isinstance(each, str) and "." in each}
        assert given <= known | {"sizes.tokens", "sizes.sequences", "sizes.table_width"}, launch


def test_products_fit_into_their_memory(tmp_path: Path) -> None:
    engine = engine_of(TinyModel("mistral", head_size=128, **SIZES), tmp_path)
    source = from_json(engine.manifest["kernels"]["entries"][stretches(engine)[0]["entry"]])
    symbols = {"tokens": 77, "one": 1, "processors": 132, "sequences": 3}
    starts, end = scratch_offsets(dict(source.scratch), symbols)
    ends = dict(zip(starts, [*list(starts.values())[1:], end], strict=True))
    for launch in source.launches:
        if launch.function == "matmul":
            a, b, c, columns, inner = (str(each).removeprefix("scratch.") for each in launch.arguments[:5])
            assert starts[a] + 77 * int(inner) * 2 <= ends[a]
            assert starts[b] + int(columns) * int(inner) * 2 <= ends[b]
            assert starts[c] + 77 * int(columns) * 2 <= ends[c]


def test_widths_that_units_do_not_divide_run_op_by_op(tmp_path: Path) -> None:
    assert stretches(engine_of(TinyModel("mistral", hidden_size=192, intermediate_size=320), tmp_path)) == []


def test_steps_take_it_from_some_tokens_on() -> None:
    pytest.importorskip("torch", reason="needs torch")
    from tensorwright.runtime.cuda.inputs import Sizes
    from tensorwright.runtime.cuda.plan import stretch_for

    found = [{"begin": 0, "end": 9, "tokens": 16, "processors": 0, "window": 0, "least": 0, "entry": "decode"},
             {"begin": 0, "end": 7, "tokens": 0, "processors": 0, "window": 0, "least": 9, "entry": "many"}]

    def entry(tokens: int, *, begin: int = 0, end: int = 9, is_decode: bool = False) -> Any:
        sizes = Sizes(tokens, 3, 3, 4, tokens, is_decode=is_decode)
        stretch = stretch_for(found, begin, end, sizes, 132)
        return stretch and stretch["entry"]

    assert [entry(8), entry(9), entry(4096), entry(16)] == [None, "many", "many", "many"]
    assert [entry(16, is_decode=True), entry(32, is_decode=True), entry(8, is_decode=True)] == ["decode", "many", None]
    assert [entry(9, end=6), entry(9, begin=1)] == [None, None]
