"""Engines for GPUs are built on machines without one: cubins for every target, launches and limits in the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorwright.builder.rebuild import EngineSource
from tensorwright.engine.config import read_config
from tensorwright.engine.engine import Engine
from tensorwright.engine.format import Reader
from tensorwright.errors import BuildError, IncompatibleEngineError, UsageError
from tensorwright.kernels.cuda.launch import from_json, is_library_call, to_json
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.runtime.llm import LLM
from tensorwright.testing.cubin import argument_sizes, parameter_sizes
from tensorwright.testing.engines import INT4, Recipe, build_dummy, build_engine
from tensorwright.testing.launch_limits import over_limits
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
LARGER = TinyModel("mistral", hidden_size=2560, num_heads=16, num_kv_heads=8, head_size=128, intermediate_size=7168,
                   vocab_size=2048)
TINY = Recipe(TinyModel("mistral", head_size=128), "float16", "W4A16", 128)
FLOAT8 = Recipe(TinyModel("mistral", head_size=128), "bfloat16", "FP8_PER_CHANNEL_PER_TOKEN", fp8_kv_cache=True,
                quantize_lm_head=True)


def built(recipe: Recipe, folder: Path, target: str) -> Path:
    return build_engine(Recipe(**{**vars(recipe), "build": {"target": target}}), folder)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(TINY, tmp_path_factory.mktemp("sm_90"), "sm_90")


def check_arguments(engine_dir: Path) -> None:
    """Every launch hands over as many bytes for each parameter as the compiled kernel takes."""
    engine = Engine.open(engine_dir)
    code, facts = engine.kernels(), engine.manifest["kernels"]
    wanted: dict[str, list[int]] = {}
    for start, size in facts["modules"]:
        wanted |= parameter_sizes(code[start:start + size])
    for entry in facts["entries"].values():
        for launch in from_json(entry).launches:
            if not is_library_call(launch.function):
                symbol = facts["functions"][launch.function]["symbol"]
                assert argument_sizes(launch.arguments) == wanted[symbol], launch.function


def kernels_of(engine_dir: Path) -> dict[str, Any]:
    return dict(Engine.open(engine_dir).manifest["kernels"])


@pytest.mark.parametrize(("flags", "from_so_many"), [
    (INT4, [9]), (("--use_weight_only",), [9]), (("--use_fp8_rowwise",), [65, 9]), ((), [9])],
    ids=["int4", "int8", "float8", "float16"])
def test_a_plain_decoder_gets_a_stretch_for_every_bucket(flags: tuple[str, ...], from_so_many: list[int],
                                                         tmp_path: Path) -> None:
    folder = build_dummy(LARGER, tmp_path, "float16", flags, target="sm_90")
    facts = kernels_of(folder)
    check_arguments(folder)
    assert over_limits(facts, "sm_90") == []
    assert [stretch["tokens"] or stretch["least"] for stretch in facts["stretches"]] == [
        1, 1, 2, 2, 4, 8, 8, 16, 16, 32, 32, 64, 64, *from_so_many]
    for stretch in facts["stretches"]:
        source = from_json(facts["entries"][stretch["entry"]])
        after = 0 if stretch["tokens"] else 2  # rows with logits, and lm_head
        assert (stretch["begin"], stretch["end"]) == (0, len(Engine.open(folder).program.ops) - after)
        assert len(dict(source.tables).get("layers", ())) == (2 * 7 if stretch["processors"] else 0)


def test_launches_hand_over_what_kernels_take(engine_dir: Path) -> None:
    check_arguments(engine_dir)


def test_decode_steps_of_other_programs_run_op_by_op(engine_dir: Path) -> None:
    assert all(stretch["least"] for stretch in kernels_of(engine_dir)["stretches"])


def test_cubins_are_of_the_exact_target(engine_dir: Path) -> None:
    engine = Engine.open(engine_dir)
    code, facts = engine.kernels(), engine.manifest["kernels"]
    assert facts["flags"] == ["-arch=sm_90a"]
    for start, size in facts["modules"]:
        assert code[start:start + 4] == b"\x7fELF" and size > 0
    assert {op["kernel"] for op in engine.manifest["steps"]} >= {"linear", "attention", "rope_cache"}


def test_launches_survive_the_manifest(engine_dir: Path) -> None:
    for entry in kernels_of(engine_dir)["entries"].values():
        assert json.loads(json.dumps(to_json(from_json(entry)))) == entry


@pytest.mark.parametrize("recipe", [TINY, FLOAT8], ids=["int4", "float8"])
def test_weights_come_back_from_the_engine(recipe: Recipe, tmp_path: Path) -> None:
    """As a rebuild for another target reads them: the checkpoint's codes, whatever the row order."""
    from tensorwright.builder.pack import CheckpointSource
    from tensorwright.checkpoint.reader import Checkpoint

    engine_dir = built(recipe, tmp_path, "sm_90")
    engine = Engine.open(engine_dir)
    packed = EngineSource(engine.reader, engine.manifest)
    given = CheckpointSource(Checkpoint(engine_dir.parent / "checkpoint"), 0)
    layouts = {entry["layout"] for entry in engine.manifest["weights"]}
    assert {"units", "units.rope", "units.gated"} <= layouts
    for weight in engine.program.weights.values():
        if weight.parts:
            np.testing.assert_array_equal(packed(weight).values, given(weight).values)


def test_int4_weights_take_float8_activations_where_asked(tmp_path: Path) -> None:
    """From 65 rows on, with the weight rounded too; lm_head stays as it is. Not on CPUs, and not with --exact."""
    recipe = Recipe(TINY.model, "float16", "W4A16", 128)
    asked = {"target": "sm_90", "fp8_activations": True}
    engine = Engine.open(build_engine(Recipe(**{**vars(recipe), "build": asked}), tmp_path))
    rounded = {op.name: (op.attributes["float8_rows"], op.attributes["weight_bits"])
               for op in engine.program.ops if op.kind == "linear"}
    assert {rounded.pop("lm_head")} == {(0, 0)} and set(rounded.values()) == {(65, 4)}
    for wrong in ({"target": "cpu"}, {"target": "sm_80"}, {"exact": True}):
        with pytest.raises(UsageError, match="fp8_activations"):
            build_engine(Recipe(**{**vars(recipe), "build": {**asked, **wrong}}), tmp_path)


def test_weights_of_float32_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="sm_90"):
        built(Recipe(TinyModel("mistral")), tmp_path, "sm_90")


@pytest.mark.parametrize("recipe", [FLOAT8, Recipe(TINY.model, "float16", "W8A16", fp8_kv_cache=True)],
                         ids=["weights", "cache"])
def test_float8_needs_a_gpu(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="float8" if recipe is FLOAT8 else "rope_cache") as error:
        built(recipe, tmp_path, "cpu")
    assert "--target sm_90" in str(error.value.mend)


def test_dummy_weights_of_float8(tmp_path: Path) -> None:
    folder = build_dummy(TINY.model, tmp_path, "float16", ("--use_fp8_rowwise",), target="sm_90")
    weights = {weight.dtype for weight in Engine.open(folder).program.weights.values()}
    assert weights == {"float8_e4m3", "float16", "float32"}


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="sm_90"):
        resolve_target("sm_75")


def test_an_engine_of_another_machine_is_refused(engine_dir: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(IncompatibleEngineError):
        LLM(engine_dir)


def test_inspecting_needs_no_gpu(engine_dir: Path) -> None:
    engine = Engine(Reader(engine_dir / "rank0.engine"), read_config(engine_dir), engine_dir)
    assert engine.target == "sm_90"
