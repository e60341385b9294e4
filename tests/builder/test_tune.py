"""Measuring at build: what is measured once, what is taken from files, and that no choice changes a bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorwright.builder import cpu_backend, measure
from tensorwright.builder.build import build
from tensorwright.builder.clock import Case
from tensorwright.builder.measure import Stopwatch
from tensorwright.builder.options import BuildOptions
from tensorwright.builder.tactics import BUCKETS, TimingKey
from tensorwright.builder.timing_cache import default_path, load
from tensorwright.cli.main import main
from tensorwright.engine.engine import Engine
from tensorwright.engine.format import MANIFEST, Writer
from tensorwright.kernels.cpu.linear import Linear
from tensorwright.kernels.cpu.targets import resolve_target
from tensorwright.kernels.interface import Source, Tactic
from tensorwright.program.program import Op, Program
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.testing.engines import Recipe, convert_tiny
from tensorwright.testing.tiny import TinyModel

WAITS = (1_000_000, 0)  # the parameter of the tactics of `several_tactics`

PROMPTS = [np.random.default_rng(3).integers(3, 320, length).tolist() for length in (21, 5, 1)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_tiny(Recipe(TinyModel("mistral"), algorithm="W4A16", group_size=32),
                        tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several_tactics: None) -> None:
    """No times of other tests, and none for them; compiled code may be shared, and is linked."""
    from tensorwright.kernels.cpu import compile as compile_module

    shared = compile_module.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_module, "cache_folder", lambda: shared)
    for name, short in (("ROTATED_BYTES", 1 << 20), ("BUDGET_S", 0.002), ("READ_BYTES", 1 << 22), ("ROUNDS", 1000)):
        monkeypatch.setattr(measure, name, short)


def built(checkpoint: Path, folder: Path, **more: Any) -> Engine:
    options = {"max_seq_len": 64, "max_batch_size": 4, "tokens_per_block": 16, **more}
    build(BuildOptions(checkpoint_dir=checkpoint, output_dir=folder, **options), lambda size, what: None)
    return Engine.open(folder)


def whys(engine: Engine) -> set[str]:
    return {pick["why"] for group in engine.manifest["tuning"]["groups"] for pick in group["picks"]}


def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(Stopwatch, "__init__", refuse)


def test_a_shape_is_measured_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(checkpoint, tmp_path / "e")
    assert whys(first) == {"measured"}
    assert first.metadata["tuned"] == "yes"
    groups = first.manifest["tuning"]["groups"]
    assert len(groups) > 4
    assert all(pick["tactic"].endswith("wait=0") and pick["limit_s"] > 0 for group in groups for pick in group["picks"])
    forbid_measuring(monkeypatch)
    again = built(checkpoint, tmp_path / "f", tokens_per_block=32)
    assert whys(again) == {"cached"}
    assert [step.parameters for step in again.steps] == [step.parameters for step in first.steps]


def test_other_code_is_measured_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(checkpoint, tmp_path / "e")
    before = Linear.source

    def changed(self: Linear, op: Op, program: Program, tactic: Tactic) -> Source:
        source = before(self, op, program, tactic)
        return Source(source.headers, source.function.replace("volatile", "volatile /* changed */", 1))

    monkeypatch.setattr(Linear, "source", changed)
    assert whys(built(checkpoint, tmp_path / "f", tokens_per_block=32)) == {"measured"}


def test_no_tune_measures_nothing_and_is_satisfied_by_a_tuned_engine(
        checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        forbid_measuring(context)
        plain = built(checkpoint, tmp_path / "plain", no_tune=True)
    assert (whys(plain), plain.metadata["tuned"]) == ({"model"}, "no")
    assert {step.parameters["wait"] for step in plain.steps if step.kernel == "linear"} == {WAITS[0]}
    assert whys(built(checkpoint, tmp_path / "tuned")) == {"measured"}  # the plain one did not do
    again = built(checkpoint, tmp_path / "again", no_tune=True)
    assert again.reader.path.samefile(tmp_path / "tuned" / "rank0.engine")


def test_a_build_for_another_machine_takes_times_from_there(
        checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = tmp_path / "times.json"
    built(checkpoint, tmp_path / "e", output_timing_cache=times)
    content = json.loads(times.read_text())
    (table,) = content["machines"].values()
    content["machines"] = {"the other machine": table}
    times.write_text(json.dumps(content))
    monkeypatch.setattr("tensorwright.builder.cpu_backend.can_measure", lambda target: False)
    forbid_measuring(monkeypatch)
    engine = built(checkpoint, tmp_path / "f", tokens_per_block=32, input_timing_cache=times)
    assert whys(engine) == {"cached"}
    assert engine.manifest["tuning"]["machine"] == "the other machine"
    default_path().unlink()  # which has learnt them
    assert whys(built(checkpoint, tmp_path / "g", tokens_per_block=8)) == {"model"}


def test_a_damaged_cache_costs_time_only(checkpoint: Path, tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    times.write_text("{")
    report = build(BuildOptions(checkpoint_dir=checkpoint, output_dir=tmp_path / "e", max_seq_len=64,
                                input_timing_cache=times, output_timing_cache=times), lambda size, what: None)
    assert any("is ignored" in note for note in report.notes)
    (table,) = load(times)[0].values()
    assert len(table) > 10


def test_ranks_share_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    plain = Stopwatch.times

    def noted(self: Stopwatch, case: Case) -> Iterator[tuple[TimingKey, float]]:
        measured.append(next(iter(case.ways)).signature)
        yield from plain(self, case)

    monkeypatch.setattr(Stopwatch, "times", noted)
    two = convert_tiny(Recipe(TinyModel("mistral"), algorithm="W4A16", group_size=32, tp_size=2), tmp_path)
    first = built(two, tmp_path / "e")
    second = Engine.open(tmp_path / "e", 1)
    assert len(measured) == len(set(measured)) > 4
    assert [step.parameters for step in first.steps] == [step.parameters for step in second.steps]


def generated(folder: Path) -> list[tuple[int, ...]]:
    asked = SamplingParameters(max_tokens=12, end_ids=())
    return [sequence.token_ids for result in LLM(folder, threads=2).generate(PROMPTS, asked)
            for sequence in result.sequences]


def test_other_tactics_for_other_sizes_give_the_same_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """Times are invented, so that tactics change from size to size and from op to op."""
    times = tmp_path / "times.json"
    plain = built(checkpoint, tmp_path / "plain", no_tune=True)
    built(checkpoint, tmp_path / "e", output_timing_cache=times)
    content = json.loads(times.read_text())
    random = np.random.default_rng(7)
    for table in content["machines"].values():
        table.update({name: [random.uniform(1, 2), what] for name, (_, what) in table.items()})
    times.write_text(json.dumps(content))
    mixed = built(checkpoint, tmp_path / "mixed", tokens_per_block=8, no_tune=True, input_timing_cache=times)
    assert len({variant.parameters["wait"] for step in mixed.steps for variant in step.few_rows}) > 1
    assert generated(tmp_path / "mixed") == generated(plain.directory)


def test_the_tactic_of_a_step_follows_its_rows(checkpoint: Path, tmp_path: Path) -> None:
    engine = built(checkpoint, tmp_path / "e")
    for step in engine.steps:
        edges = [variant.max_rows for variant in step.few_rows if variant.max_rows]
        assert edges == sorted(set(edges))
        assert [step.at(edge) for edge in edges] == list(step.few_rows)
        assert step.at(10**6).symbol == step.symbol


def test_engines_of_format_1_run(checkpoint: Path, tmp_path: Path) -> None:
    """As version 0.1.0 wrote them: one tactic a step, and no word of times."""
    engine = built(checkpoint, tmp_path / "new", no_tune=True)
    old = tmp_path / "old"
    shutil.copytree(engine.directory, old)
    manifest = {**engine.manifest, "steps": [{name: value for name, value in step.items() if name != "few_rows"}
                                             for step in engine.manifest["steps"]]}
    del manifest["tuning"]
    content = json.dumps(manifest).encode()
    metadata = {**engine.metadata, "format_version": "1"}
    for name in ("header_sha256", "tuned"):
        del metadata[name]
    with Writer(old / "rank0.engine", len(engine.reader.names)) as writer:
        for name in engine.reader.names:
            writer.add(name, content if name == MANIFEST else engine.reader.section(name))
        metadata[f"{MANIFEST}.sha256"] = hashlib.sha256(content + b"\0" * (-len(content) % 4096)).hexdigest()
        writer.finish(metadata)
    assert Engine.open(old).steps[0].few_rows == ()
    assert generated(old) == generated(engine.directory)


def test_build_and_inspect_say_what_was_chosen(checkpoint: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), "--max_seq_len", "64"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Tactics on " in printed
    assert "linear qkv" in printed
    assert main(["inspect", str(tmp_path / "e"), "--tactics"]) == 0
    groups = Engine.open(tmp_path / "e").manifest["tuning"]["groups"]
    assert capsys.readouterr().out.count("measured") == len(BUCKETS) * len(groups)
    assert main([*words, "--no_tune", "--max_batch_size", "3"]) == 0
    assert "Tactics" not in capsys.readouterr().out  # the engine was there
    assert main(["inspect", str(tmp_path / "e"), "--tactics", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tactics"]["bytes_per_s"] > 1e8


def test_what_can_be_measured() -> None:
    assert cpu_backend.can_measure(resolve_target("portable"))
    assert not cpu_backend.can_measure(resolve_target("aarch64" if "x86" in resolve_target("portable").architecture
                                                      else "x86-64-v3"))
