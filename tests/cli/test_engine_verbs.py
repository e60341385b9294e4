"""Build, inspect and bench on a real small engine, as their users call them."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorwright.checkpoint.config import Quantization
from tensorwright.checkpoint.convert import ConvertOptions, convert
from tensorwright.cli import arithmetic, bandwidth
from tensorwright.cli.bench import time_per_token
from tensorwright.cli.main import main
from tensorwright.cli.profile import find_outliers
from tensorwright.cli.roofline import Limits, Step, operand_widths, prefill_steps, total, work_of
from tensorwright.engine.engine import Engine
from tensorwright.errors import UsageError
from tensorwright.testing.tiny import TinyModel, write_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = write_model(folder / "model", TinyModel(dtype="float16", max_position_embeddings=1_024_000))
    convert(model, folder / "c", ConvertOptions(quantization=Quantization("W4A16", 128)), lambda size, what: None)
    return folder / "c"


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "e"
    assert main(["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(folder), "--max_seq_len", "256",
                 "--max_batch_size", "4", "--log_level", "error"]) == 0
    return folder


def test_build_says_what_people_search_for(checkpoint: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "e")]) == 0
    printed = capsys.readouterr()
    assert "Set max_batch_size to 64.\n" in printed.out
    assert "max_seq_len is not specified, using deduced value 131072\n" in printed.out
    assert printed.out.count("max_seq_len is not specified") == 1
    assert re.search(r"^Total time of building all engines: \d\d:\d\d:\d\d$", printed.out, re.M)
    assert re.search(r"^  KV tokens that fit +[1-9]\d*", printed.out, re.M)
    assert "Longest prompt: 131071 tokens" in printed.out
    assert "build: done" in printed.err


def test_other_limits_reuse_the_engine(checkpoint: Path, engine: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"),
                 "--max_seq_len", "100"]) == 0
    assert "only the limits are new" in capsys.readouterr().out
    assert (tmp_path / "e" / "rank0.engine").read_bytes() == (engine / "rank0.engine").read_bytes()


def test_a_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), "--dry_run"]) == 0
    assert "Dry run: nothing was written." in capsys.readouterr().out
    assert not (tmp_path / "e").exists()


def test_limits_of_zero_are_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), "--max_batch_size", "0"]
    assert main(["build", *words]) == 2
    assert "max_batch_size must be 1 or more; got 0" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_an_engines_config_is_a_build_config(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    assert main(["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), "--build_config",
                 str(engine / "config.json")]) == 0
    limits = [json.loads((folder / "config.json").read_text())["build_config"] for folder in (engine, tmp_path / "e")]
    assert limits[0] == limits[1]


def test_inspect_an_engine(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, kind in ((engine, "engine folder"), (engine / "rank0.engine", "engine file")):
        assert main(["inspect", str(path), "--json", "--verify", "--weights", "--program"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["kind"] == kind
        assert facts["verified"] == "every section of 1 engine file is sound"
        assert facts["weights"]["int4 group 128"] > 0
        assert facts["activations"] == "float32, int8 in 8 of 9 linears"
        assert any("lm_head" in name for name, *_ in facts["tensors"])
        assert "= attention(" in facts["program"]


def test_inspect_an_exact_engine(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), "--exact"]
    assert main(["build", *words, "--log_level", "error"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "e")]) == 0
    assert re.search(r"activations +float32 \(built with --exact\)", capsys.readouterr().out)


def test_inspect_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Checkpoint folder")
    assert re.search(r"quantization +W4A16", printed)


def test_verify_finds_a_flipped_bit(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((engine / "rank0.engine").read_bytes())
    content[20_000] ^= 4
    damaged = tmp_path / "rank0.engine"
    damaged.write_bytes(content)
    assert main(["inspect", str(damaged), "--verify"]) == 1
    assert "damaged" in capsys.readouterr().err


def test_a_foreign_safetensors_file_is_no_engine(checkpoint: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank0.engine").write_bytes((checkpoint / "rank0.safetensors").read_bytes())
    assert main(["inspect", str(tmp_path / "rank0.engine")]) == 1
    assert "engine" in capsys.readouterr().err


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "read_bandwidth", partial(bandwidth.read_bandwidth, buffer_bytes=1 << 24))
    monkeypatch.setattr(arithmetic, "arithmetic_rates", partial(arithmetic.arithmetic_rates, rounds=1000))


def bench(engine: Path, *words: str) -> list[str]:
    return ["bench", "--engine_dir", str(engine), "--input_len", "40", "--output_len", "12", "--repeats", "1", *words]


@pytest.mark.usefixtures("quick_limits")
def test_bench(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.json"
    assert main(bench(engine, "--batch_sizes", "1,4", "--threads", "1", "--json", str(file))) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    assert [line["batch"] for line in result["decode"]] == [1, 4]
    assert result["threads"] == 1
    assert result["target"] == "native"
    assert result["peak_rss_bytes"] > 1 << 20
    for line in result["decode"]:
        assert line["tok_s"] == pytest.approx(line["batch"] / line["tpot_ms"] * 1e3)
        assert line["share_of_bandwidth"] == pytest.approx(line["bytes_s"] / line["bandwidth_bytes_s"])
    prefill = result["prefill"]
    assert prefill["share_of_bandwidth"] == pytest.approx(prefill["bytes_s"] / result["bandwidth_bytes_s"])
    for line in (result["prefill"], *result["decode"]):
        assert line["share_of_limit"] == max(line["share_of_bandwidth"], line["share_of_arithmetic"]) > 0
    assert result["decode"][1]["bytes_per_step"] > result["decode"][0]["bytes_per_step"]
    assert result["decode"][1]["operations_per_step"] == 4 * result["decode"][0]["operations_per_step"]
    assert "of arithmetic" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_limits")
def test_a_profile_explains_what_was_measured(engine: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.json"
    assert main(bench(engine, "--batch_sizes", "2", "--threads", "1", "--profile", "--json", str(file))) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    prefill, decode = result["profile"]
    assert (prefill["phase"], prefill["length"], decode["phase"], decode["batch"]) == ("prefill", 40, "decode", 2)
    assert prefill["measured_ms"] == result["prefill"]["ttft_ms"]
    assert decode["measured_ms"] == result["decode"][0]["tpot_ms"]
    for profile, line in ((prefill, result["prefill"]), (decode, result["decode"][0])):
        parts = profile["kernels_ms"] + profile["sampling_ms"] + profile["rest_ms"]
        assert parts == pytest.approx(profile["measured_ms"])
        assert sum(kind["ms"] for kind in profile["kinds"]) == pytest.approx(profile["kernels_ms"])
        assert sum(kind["operations"] for kind in profile["kinds"]) == pytest.approx(line["operations_per_step"])
        assert profile["rest_ms"] > 0
    assert "scheduling and Python" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_limits")
def test_an_engine_without_a_probe_is_compared_with_memory_alone(
        engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b.json"
    monkeypatch.setattr(arithmetic, "PROBE", "tw_of_another_day")
    assert main(bench(engine, "--threads", "1", "--json", str(file))) == 0
    result = json.loads(file.read_text())
    assert result["arithmetic_operations_s"] is None
    assert result["prefill"]["share_of_arithmetic"] is None
    assert result["prefill"]["share_of_limit"] == result["prefill"]["share_of_bandwidth"]
    assert "--rebuild_kernels" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "numbers"), [
    (["--input_len", "250"], ("250", "262", "256")), (["--batch_sizes", "1,8"], ("8", "4")),
    (["--output_len", "1"], ("1",)), (["--batch_sizes", "0"], ("got 0",)), (["--batch_sizes", "x"], ("invalid",))])
def test_bench_refuses_what_the_engine_cannot_hold(engine: Path, words: list[str], numbers: tuple[str, ...],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(bench(engine, *words))
    except SystemExit as stopped:  # argparse's own way out
        status = stopped.code
    assert status == 2
    printed = capsys.readouterr().err
    assert all(number in printed for number in numbers)


def test_time_per_token_counts_only_while_all_decode() -> None:
    events = [(0, 1.0, 1), (0, 9.0, 1), (1, 10.0, 1), (0, 10.0, 1), (0, 12.0, 1), (1, 12.0, 1), (0, 14.0, 1),
              (1, 14.0, 1), (1, 15.0, 1)]
    assert time_per_token(events) == pytest.approx(2.0)


def test_time_per_token_with_several_tokens_in_an_update() -> None:
    assert time_per_token([(0, 0.0, 1), (0, 1.0, 1), (0, 4.0, 3)]) == pytest.approx(1.0)


def test_sequences_that_never_decode_together_are_no_measurement() -> None:
    with pytest.raises(UsageError, match="never decoded together"):
        time_per_token([(0, 0.0, 1), (0, 1.0, 1), (1, 2.0, 1), (1, 3.0, 1)])


def test_only_layers_that_fall_behind_their_like_stand_out() -> None:
    times = np.array([1.0, 1.0, 1.2, 1.5, 7.0, 1e-4, 1e-4, 9e-4])
    assert find_outliers(times, [[0, 1, 2, 3], [4], [5, 6, 7]]) == [3]


def test_a_prompt_in_chunks_scores_what_one_step_scores() -> None:
    assert prefill_steps(5, 2) == [Step(2, 0, 2, 3), Step(2, 0, 4, 7), Step(1, 1, 5, 5)]
    assert [step.kv_scored for step in prefill_steps(5, 8)] == [15]


def test_the_limit_is_the_larger_of_the_two_times(engine: Path) -> None:
    opened = Engine.open(engine)
    widths = operand_widths(opened)
    memory = total(work_of(opened, [Step(1, 1, 8, 8)], Limits(1e9, dict.fromkeys(widths, 1e15))))
    assert memory.limit_s == memory.memory_s == pytest.approx(memory.bytes / 1e9)
    arithmetic_ = total(work_of(opened, [Step(1, 1, 8, 8)], Limits(1e15, dict.fromkeys(widths, 1e9))))
    assert arithmetic_.limit_s == arithmetic_.arithmetic_s == pytest.approx(arithmetic_.operations / 1e9)
    without_output = work_of(opened, [Step(1, 0, 8, 8)], Limits(1e9, None))
    assert without_output[-1].bytes == 0
