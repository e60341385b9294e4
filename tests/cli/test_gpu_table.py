"""The table of bars of `benchmarks/gpu.py`: shares of the limit, sections that stay, what is said of failures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tensorwright.cli.main import main

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


FIGURES = {"limits": {"read_bytes_s": 4e12}, "tpot:16:128": {"tpot_s": 4e-3, "tokens_s": 4000.0, "mean_context": 257.0},
           "memory": {"weight_bytes": 9_000_000_000, "embedding_bytes": 1_000_000_000, "kv_bytes_per_token": 160_000}}


def test_the_limit_of_a_step_is_its_bytes_at_the_read_rate(gpu: ModuleType) -> None:
    found = gpu.schemes.shares(FIGURES)["tpot:16:128"]
    assert found["step_bytes"] == 8_000_000_000 + 16 * 257 * 160_000
    assert found["limit_s"] == found["step_bytes"] / 4e12
    assert found["share"] == found["limit_s"] / 4e-3
    assert gpu.schemes.shares({**FIGURES, "limits": {"failure": "no GPU"}}) == {}


def test_engines_are_built_together_while_they_fit(gpu: ModuleType) -> None:
    names = ["int4", "int8", "float16"]  # 9, 15 and 26 GB
    assert gpu.groups(names, 50) == [names]
    assert gpu.groups(names, 30) == [["int4", "int8"], ["float16"]]
    assert gpu.groups(names, 0) == [["int4"], ["int8"], ["float16"]]


@pytest.mark.parametrize("name", ["int4", "int4_lm_head_int8", "int4_kv_fp8", "fp8", "fp8_all", "int8", "float16"])
def test_each_scheme_is_one_that_engines_are_built_for(gpu: ModuleType, name: str, tmp_path: Path) -> None:
    assert name in gpu.SCHEMES
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text(json.dumps({**gpu.schemes.CONFIG, "num_hidden_layers": 2}))
    assert main(["convert", "--model_dir", str(model), "--output_dir", str(tmp_path / "c"), "--dtype", "float16",
                 "--save_config_only", *gpu.SCHEMES[name].convert]) == 0
    assert main(["build", "--checkpoint_dir", str(tmp_path / "c"), "--output_dir", str(tmp_path / "e"), "--dry_run",
                 "--dummy_weights", "--target", "sm_90", *map(str, gpu.schemes.LIMITS)]) == 0


def test_an_engine_that_cannot_be_built_fails_alone(gpu: ModuleType, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*words: object) -> float:
        if words[0] == "build" and "fp8" in str(words[2]):
            raise subprocess.CalledProcessError(1, ["python", "-m", "tensorwright", "build"])
        return 3.0

    monkeypatch.setattr(gpu.processes, "command", command)
    engines = gpu.processes.Engines(tmp_path, 1, "sm_90")
    engines.build(["int8", "fp8"])
    assert (engines.made["int8"].seconds, engines.made["int8"].failure) == (3.0, "")
    found = gpu.processes.measure(engines.made["fp8"], ["limits", "memory"], new_tokens=1, repeats=1, limit_s=1)
    assert found == dict.fromkeys(["limits", "memory"], {"failure": "build ended with status 1"})


def test_a_worker_that_takes_too_long_leaves_what_it_had(gpu: ModuleType, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import json, sys, time; print(json.dumps({'figure': 'limits', 'x': 1}), flush=True); time.sleep(60)"
    (tmp_path / "worker.py").write_text(f"import sys; sys.stdin.readline(); exec({script!r})")
    monkeypatch.setattr(gpu.processes, "HERE", tmp_path)
    found = gpu.processes.measure(gpu.processes.Built(tmp_path), ["limits", "memory"], new_tokens=1, repeats=1,
                                  limit_s=1)
    assert found == {"limits": {"x": 1}, "memory": {"failure": "stopped after 1 s"}}


def test_each_goal_names_a_figure_that_the_worker_knows(gpu: ModuleType) -> None:
    from gpu_table.worker import Meter

    for goal in gpu.goals.GOALS:
        name, *numbers = goal.figure.split(":")
        assert hasattr(Meter, name) and all(map(int, numbers))


def test_what_could_not_be_measured_is_said_and_the_rest_stays(gpu: ModuleType, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    def int4(*_: Any) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        figures = {**FIGURES, "tpot:1:128": {"failure": "stopped after 9 s"}}
        bars = [goal.bar(gpu.goals.value_of(goal, figures)) for goal in gpu.goals.GOALS]
        yield {"figures": figures, "limits": gpu.schemes.shares(figures)}, bars

    def start(*_: Any) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        yield {"whole_s": 5.0}, [gpu.goals.FIRST_TOKEN.bar(5.0)]
        raise OSError("the disk is full")

    monkeypatch.setattr(gpu, "int4", int4)
    monkeypatch.setattr(gpu, "start", start)
    command = ["gpu.py", "--json", str(file := tmp_path / "r.json"), "--work", str(tmp_path), "--commit", "abc"]
    for sections in ("int4", "start"):
        monkeypatch.setattr(sys, "argv", [*command, "--sections", sections])
        assert gpu.main() == 1
    assert list(json.loads(file.read_text())["sections"]) == ["int4", "start"]
    printed = capsys.readouterr()
    assert "the disk is full" in printed.err
    assert "| TPOT, batch 1, 128 in, ms | 5.14 | 4.94 | – | – | ≤ 2.6 | ≤ 2 | not measured |" in printed.out
    assert "| TPOT, batch 16, 128 in, ms | 5.34 | 5.09 | 4 | 1.27 × |" in printed.out
    assert "| ≤ 3.4 | ≤ 2.6 | missed: 0.85 × must |" in printed.out
    assert "must reached: 1.60 ×; aim missed: 0.80 ×" in printed.out
    assert "| int4, groups of 128 | failed | 4.00 (54%) | failed | failed |" in printed.out


def test_the_time_of_a_token_leaves_out_the_first(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_table.worker import Meter

    monkeypatch.setattr(Meter, "_time", lambda self, batch, input_len, new_tokens: input_len * 0.5 + new_tokens * 0.25)
    meter = Meter(None, new_tokens=8, repeats=3)  # type: ignore[arg-type]  # nothing asks for an engine
    found = meter.tpot(4, 100)
    assert (found["tpot_s"], found["tokens_s"], found["mean_context"]) == (0.25, 16.0, 105.0)
    assert meter.prefill(4, 100)["tokens_s"] == 400 / 50.25
    assert meter.serving(10, 100, 6)["tokens_s"] == 60 / 51.5
