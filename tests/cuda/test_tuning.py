"""What times decide about GPU engines: tactics for rows, stretches for steps, and where the times come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tensorwright.builder import cuda_backend
from tensorwright.builder.backends import Report
from tensorwright.builder.build import program_of
from tensorwright.builder.clock import Case
from tensorwright.builder.cuda_backend import CudaBackend, GpuClock
from tensorwright.builder.decode_steps import OP_BY_OP, choose_stretches, layouts_of
from tensorwright.builder.measure import random_tensor
from tensorwright.builder.plan import choose
from tensorwright.builder.timing_cache import Entry as TimingEntry
from tensorwright.builder.timing_cache import entry_name, save
from tensorwright.builder.tune import CacheFiles, Tuning
from tensorwright.checkpoint.config import CheckpointConfig, Quantization
from tensorwright.cli.main import main
from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.launch import GpuSource, flat, is_library_call
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.models.families import from_huggingface
from tensorwright.program.program import Program
from tensorwright.testing.engines import build_dummy
from tensorwright.testing.tiny import TinyModel, config

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
TARGET, MACHINE = resolve_target("sm_90"), "NVIDIA H200, as invented here"
MODEL = TinyModel("mistral", hidden_size=2560, num_heads=16, num_kv_heads=8, head_size=128, intermediate_size=7168,
                  vocab_size=2048, num_layers=6)
ABSENT = ("", "weights.bias", "weights.norm", "inputs.residual", "weights.q_norm", "weights.k_norm")  # from some ops


@pytest.fixture(scope="module")
def program() -> Program:
    model = from_huggingface(config(replace(MODEL, dtype="float16")))
    return program_of(CheckpointConfig(model, Quantization("W4A16", 128)), 16, target=TARGET)


@pytest.fixture(scope="module")
def cases(program: Program) -> list[Case]:
    return GpuClock(False).cases([program], TARGET)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No times of other tests, and none of the package's."""
    monkeypatch.setattr("tensorwright.builder.tune.default_path", lambda: tmp_path / "times.json")
    monkeypatch.setattr(cuda_backend, "SHIPPED", tmp_path / "shipped")


def invented(cases: list[Case], seconds: dict[str, float], path: Path) -> None:
    """A file of times: those of the tactics in `seconds`, and a millisecond for all others."""
    clock = GpuClock(False)
    save(path, MACHINE, {
        entry_name(*TARGET.flags, clock.code(source), of.signature, of.tactic, str(of.rows)): TimingEntry(
            seconds.get(of.tactic, 1e-3), "invented")
        for case in cases for of, source in case.ways.items()})


def quiet(size: int, what: str) -> None:
    """Nobody watches."""


def tuned(program: Program, *, measure: bool = False, report: Report = quiet) -> Tuning:
    return CudaBackend().tune([program], TARGET, measure=measure, files=CacheFiles(), report=report)


def test_every_op_and_step_with_a_choice_is_a_case(cases: list[Case]) -> None:
    assert {case.what for case in cases if case.candidates} == {
        "linear int4 [4096, 2560] float32 [2560]", "linear int4 [2560, 2048]", "linear int4 [2560, 7168]",
        "linear int4 [14336, 2560] float32 [2560]", "linear float16 [2048, 2560] float32 [2560]"}
    steps = [case for case in cases if case.candidates is None]
    assert sorted({of.rows for case in steps for of in case.ways}) == [1, 2, 4, 8, 16, 32, 64] and len(steps) == 7
    assert all(OP_BY_OP in {of.tactic for of in case.ways} for case in steps)
    assert {of.tactic for of in steps[0].ways} == {"decode_1_on_132", "decode_1", OP_BY_OP}


def test_a_tactic_for_few_rows_is_not_timed_with_more(cases: list[Case]) -> None:
    for case in cases:
        for of in case.ways if case.candidates else ():
            tokens = next((int(word[7:]) for word in of.tactic.split() if word.startswith("tokens=")), of.rows)
            assert of.rows <= tokens
        assert {of.rows for of in case.ways} in ({1, 4, 8, 16, 64, 512}, {next(iter(case.ways)).rows})


def test_without_times_the_rules_decide(program: Program) -> None:
    tuning = tuned(program)
    assert (dict(tuning.timings), tuning.machine) == ({}, "")
    choices = choose_stretches(program, TARGET, layouts_of(program, TARGET), tuning.timings)
    assert [choice.stretches[0].entry for choice in choices[:2]] == ["decode_1_on_132", "decode_2_on_132"]
    assert {choice.facts(None)["why"] for choice in choices} == {"model"}


def test_another_machine_s_build_takes_the_times_of_the_package(program: Program, cases: list[Case],
                                                                 tmp_path: Path) -> None:
    invented(cases, {"decode_1": 5e-4, "decode_4": 2e-3}, tmp_path / "shipped" / "sm_90.json")
    tuning = tuned(program)
    assert tuning.machine == MACHINE
    choices = {choice.tokens: choice for choice in
               choose_stretches(program, TARGET, layouts_of(program, TARGET), tuning.timings)}
    assert [stretch.entry for stretch in choices[1].stretches] == ["decode_1", "decode_1_on_132"]
    assert [stretch.entry for stretch in choices[2].stretches] == ["decode_2_on_132", "decode_2"]
    assert choices[4].stretches == ()  # op by op is faster
    assert choices[4].facts(1e12) | {"bytes": 0, "limit_s": 0} == {
        "max_rows": 4, "tactic": OP_BY_OP, "why": "cached", "seconds": 1e-3, "bytes": 0, "operations": 0.0,
        "next_best": ["decode_4", 2e-3], "limit_s": 0}
    assert tuned(program).timings == tuning.timings


def test_times_choose_among_the_tactics_that_can_run(program: Program, cases: list[Case], tmp_path: Path) -> None:
    unpacking, eight = "units", next(of.tactic for case in cases for of in case.ways if "tokens=8" in of.tactic
                                     and of.tactic.startswith("units "))
    invented(cases, {unpacking: 1e-4, eight: 1e-5}, tmp_path / "shipped" / "sm_90.json")
    plan = choose(program, TARGET, KERNELS, tuned(program))
    dense = next(choice for choice in plan.choices if choice.op.name == "layers.0.attention.dense")
    assert [(pick.max_rows, dict(pick.tactic.parameters).get("tokens")) for pick in dense.picks] == [
        (1, 8), (4, 8), (8, 8), (16, None), (64, None), (512, None)]
    assert {pick.why for pick in dense.picks} == {"cached"}
    assert dense.picks[-1].next_best is None  # nothing else runs so many rows


def test_a_gpu_that_cannot_be_measured_costs_the_times_only(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs torch")
    from tensorwright.builder import measure_gpu

    def full() -> int:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measure_gpu, "num_processors", full)
    tuning = tuned(program, measure=True)
    assert not tuning.timings
    assert any("out of memory" in note for note in tuning.notes)


def test_what_is_timed_has_memory_for_all_that_it_names(cases: list[Case]) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    from tensorwright.builder.gpu_memory import Memory

    pool = torch.zeros(1 << 20, dtype=torch.uint8)
    for case in cases:
        for of, source in case.ways.items():
            assert isinstance(source, GpuSource)
            memory = Memory(case, of.rows, source, 132, lambda count: pool)
            for launch in source.launches:
                for argument in flat(launch.arguments) if not is_library_call(launch.function) else ():
                    if isinstance(argument, str) and argument not in ABSENT:
                        assert memory.value(argument) != 0, (case.title, of.tactic, argument)


def test_copies_hold_what_kernels_pack(program: Program, cases: list[Case]) -> None:
    pytest.importorskip("torch", reason="needs torch")
    from tensorwright.builder.gpu_memory import packed_bytes

    random = np.random.default_rng(0)
    for case in cases:
        found = case.candidates
        for role, name in found.op.weights.items() if found else ():
            weight = program.weights[name]
            packed = found.kernel.pack(found.op, program, role, random_tensor(weight, random), found.tactics[0])
            assert packed.nbytes <= packed_bytes(weight)


def test_build_and_inspect_tell_of_steps(cases: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    invented(cases, {"decode_4": 5e-4}, tmp_path / "shipped" / "sm_90.json")
    folder = build_dummy(MODEL, tmp_path / "engine", "float16", target="sm_90", tokens_per_block=16)
    engine = Engine.open(folder)
    group = engine.manifest["tuning"]["groups"][-1]
    assert (engine.manifest["tuning"]["machine"], group["name"]) == (MACHINE, "decode step, 4 layers")
    assert {pick["why"] for pick in group["picks"]} == {"cached"}
    capsys.readouterr()
    assert main(["inspect", str(folder), "--tactics"]) == 0
    printed = capsys.readouterr().out
    assert MACHINE in printed and "+100% op by op" in printed
    assert json.loads(json.dumps(engine.manifest["tuning"], allow_nan=False))
