"""An engine folder from a checkpoint: what is reused, what is refused, what a damaged or foreign one says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tensorwright.builder.build import build
from tensorwright.builder.options import BuildOptions
from tensorwright.builder.rebuild import EngineSource
from tensorwright.engine.engine import Engine
from tensorwright.engine.format import Reader, Writer
from tensorwright.errors import (
    BuildError,
    CheckpointError,
    EngineError,
    IncompatibleEngineError,
    RanksError,
    UsageError,
)
from tensorwright.testing.engines import Recipe, build_engine, convert_tiny
from tensorwright.testing.tiny import TinyModel

TINY = TinyModel("mistral")
INT4 = Recipe(TINY, algorithm="W4A16", group_size=32)


def quiet(size: int, what: str) -> None:
    """Nobody looks at these builds' progress."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_tiny(INT4, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    build(options(checkpoint, folder), quiet)
    return folder


def options(checkpoint: Path, folder: Path, **more: object) -> BuildOptions:
    values = {"max_seq_len": 64, "max_batch_size": 4, "tokens_per_block": 16, "no_tune": True, **more}
    return BuildOptions(checkpoint_dir=checkpoint, output_dir=folder, **values)


def test_other_limits_reuse_the_engine_file(checkpoint: Path, engine_dir: Path, tmp_path: Path) -> None:
    report = build(options(checkpoint, tmp_path, max_seq_len=48, max_batch_size=2), quiet)
    assert report.reused
    assert Engine.open(tmp_path).limits.max_seq_len == 48
    assert Engine.open(engine_dir).limits.max_seq_len == 64
    assert (tmp_path / "rank0.engine").samefile(engine_dir / "rank0.engine")


def test_what_changes_code_or_weights_builds_anew(checkpoint: Path, engine_dir: Path, tmp_path: Path) -> None:
    for index, change in enumerate(({"tokens_per_block": 32}, {"exact": True})):
        assert not build(options(checkpoint, tmp_path / str(index), **change), quiet).reused
        assert Engine.open(tmp_path / str(index)).metadata["build_key"] != Engine.open(engine_dir).metadata["build_key"]


def test_exact_engines_round_no_activations(checkpoint: Path, engine_dir: Path, tmp_path: Path) -> None:
    build(options(checkpoint, tmp_path, exact=True), quiet)
    groups, attention_bits = {}, {}
    for folder in (engine_dir, tmp_path):
        program = Engine.open(folder).program
        linears = [op for op in program.ops if op.kind == "linear"]
        groups[folder] = {op.attributes["activation_group"] for op in linears
                          if program.weights[op.weights["weight"]].is_quantized}
        attention_bits[folder] = {op.attributes["activation_bits"] for op in program.ops if op.kind == "attention"}
        assert json.loads((folder / "config.json").read_text())["build_config"]["exact"] is (folder == tmp_path)
    assert groups == {engine_dir: {32}, tmp_path: {0}}
    assert attention_bits == {engine_dir: {16}, tmp_path: {0}}


def test_rebuilding_kernels_keeps_exactness(checkpoint: Path, engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was built without --exact"):
        build(BuildOptions(rebuild_kernels=engine_dir, output_dir=tmp_path / "f", exact=True), quiet)
    build(options(checkpoint, tmp_path / "e", exact=True), quiet)
    before = Engine.open(tmp_path / "e").program
    build(BuildOptions(rebuild_kernels=tmp_path / "e", output_dir=tmp_path / "e", no_tune=True), quiet)
    assert Engine.open(tmp_path / "e").program == before
    assert Engine.open(tmp_path / "e").config["build_config"]["exact"] is True


def test_another_compiler_builds_anew(checkpoint: Path, engine_dir: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    assert not build(options(checkpoint, tmp_path), quiet).reused


def test_the_folder_holds_what_other_tools_read(engine_dir: Path) -> None:
    config = json.loads((engine_dir / "config.json").read_text())
    assert config["pretrained_config"]["quantization"]["quant_algo"] == "W4A16"
    assert config["build_config"]["max_seq_len"] == 64
    assert config["build_config"]["plugin_config"]["paged_kv_cache"] is True
    assert {"tokenizer.json", "config.json", "rank0.engine"} <= {path.name for path in engine_dir.iterdir()}


def test_rebuilt_kernels_keep_the_weights(engine_dir: Path, tmp_path: Path) -> None:
    """Another target repacks from layout ids; unpacking both engines gives the same codes and scales."""
    build(BuildOptions(rebuild_kernels=engine_dir, output_dir=tmp_path, target="portable", no_tune=True), quiet)
    before, after = Engine.open(engine_dir), Engine.open(tmp_path)
    assert after.target == "portable"
    sources = [EngineSource(engine.reader, engine.manifest) for engine in (before, after)]
    for weight in before.program.weights.values():
        first, second = (source(weight) for source in sources)
        np.testing.assert_array_equal(first.values, second.values)
        if first.scales is not None:
            np.testing.assert_array_equal(first.scales, second.scales)


def test_a_rebuild_in_place_that_was_stopped_can_be_run_again(engine_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(engine_dir, tmp_path, dirs_exist_ok=True)
    rebuilt = BuildOptions(rebuild_kernels=tmp_path, output_dir=tmp_path, no_tune=True)
    build(rebuilt, quiet)
    key = Engine.open(tmp_path).metadata["build_key"]
    (tmp_path / "config.json").write_bytes((engine_dir / "config.json").read_bytes())  # as if stopped just before
    with pytest.raises(EngineError, match="different builds"):
        Engine.open(tmp_path)
    build(rebuilt, quiet)
    assert Engine.open(tmp_path).metadata["build_key"] == key


def test_a_rank_of_another_build_is_not_rebuilt(engine_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(engine_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((engine_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "build_key": "another"}))
    with pytest.raises(EngineError, match="different builds"):
        build(BuildOptions(rebuild_kernels=tmp_path, output_dir=tmp_path), quiet)


def test_an_engine_of_one_rank_has_no_second(engine_dir: Path) -> None:
    with pytest.raises(EngineError, match="no engine file .*rank1.engine"):
        Engine.open(engine_dir, 1)


def test_a_renamed_rank_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((engine_dir / "config.json").read_bytes())
    (tmp_path / "rank1.engine").write_bytes((engine_dir / "rank0.engine").read_bytes())
    with pytest.raises(RanksError, match="rank 0"):
        Engine.open(tmp_path, 1)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("format_version", "99", "format 99.*pip install --upgrade"),
    ("architecture", "riscv64", "built for riscv64.*rebuild_kernels"),
    ("rank", None, "no rank in its header"),
])
def test_a_foreign_engine_is_refused_before_weights_are_read(
        engine_dir: Path, tmp_path: Path, field: str, value: str | None, message: str) -> None:
    metadata = {**Reader(engine_dir / "rank0.engine").metadata}
    metadata.pop("header_sha256")
    metadata.pop(field)
    with Writer(tmp_path / "rank0.engine", 0) as writer:
        writer.finish(metadata if value is None else {**metadata, field: value})
    (tmp_path / "config.json").write_bytes((engine_dir / "config.json").read_bytes())
    with pytest.raises(EngineError, match=f"(?s){message}") as error:
        Engine.open(tmp_path)
    assert isinstance(error.value, IncompatibleEngineError) == (value is not None)


def test_a_half_finished_build_is_noticed(engine_dir: Path, tmp_path: Path) -> None:
    """A killed build may leave a new engine file beside the old config.json."""
    config = json.loads((engine_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "build_key": "of another build"}))
    os.link(engine_dir / "rank0.engine", tmp_path / "rank0.engine")
    with pytest.raises(EngineError, match="different builds"):
        Engine.open(tmp_path)


def test_flipped_bits_in_weights_are_found_by_verify(engine_dir: Path, tmp_path: Path) -> None:
    engine = Engine.open(engine_dir)
    engine.verify()
    content = bytearray((engine_dir / "rank0.engine").read_bytes())
    name = engine.manifest["weights"][3]["name"]
    position = engine.weight(name).ctypes.data - engine.reader.section(engine.reader.names[0]).ctypes.data
    header = len(content) - sum(engine.reader.section(n).nbytes for n in engine.reader.names)
    content[header + position + 5] ^= 4
    (tmp_path / "rank0.engine").write_bytes(content)
    (tmp_path / "config.json").write_bytes((engine_dir / "config.json").read_bytes())
    with pytest.raises(EngineError, match=name):
        Engine.open(tmp_path).verify()


def test_a_model_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CheckpointError):
        build(options(tmp_path, tmp_path / "engine"), quiet)


def test_an_output_folder_below_a_file_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be made"):
        build(options(checkpoint, tmp_path / "file" / "engine"), quiet)


def test_a_full_disk_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    """The kernel's file size limit stands in for a full disk: both fail a write half way."""
    code = (
        "import os, resource, signal, sys; from pathlib import Path\n"
        "from tensorwright.builder.build import build; from tensorwright.builder.options import BuildOptions\n"
        "def run(folder): build(BuildOptions(checkpoint_dir=Path(sys.argv[1]), output_dir=Path(folder), "
        "max_seq_len=64, tokens_per_block=16, no_tune=True), lambda size, what: None)\n"
        "run(sys.argv[3])\n"  # so that the kernels are compiled already
        "os.utime(sys.argv[1] + '/rank0.safetensors')\n"  # and the engine is not reused
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "run(sys.argv[2])\n")
    full = tmp_path / "full"
    words = [sys.executable, "-c", code, checkpoint, full, tmp_path / "room"]
    result = subprocess.run(words, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert result.returncode == 1
    assert "BuildError" in result.stderr
    assert "could not be written" in result.stderr
    assert not full.exists()


def test_recipes_share_engines(engine_dir: Path, tmp_path: Path) -> None:
    """What the other tests build with: the recipe's own folder, whole and loadable."""
    assert Engine.open(build_engine(INT4, tmp_path)).program == Engine.open(engine_dir).program


def test_parts_of_killed_builds_are_removed(checkpoint: Path, tmp_path: Path) -> None:
    """Those of a process that still runs are left alone: it may be building."""
    gone, running = tmp_path / ".rank0.engine.999999999.part", tmp_path / f".rank0.engine.{os.getppid()}.part"
    gone.write_bytes(b"x")
    running.write_bytes(b"x")
    build(options(checkpoint, tmp_path), quiet)
    assert not gone.exists()
    assert running.exists()
