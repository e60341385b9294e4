"""The convert command line: the guide's line, what has no effect, what is refused, and what is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tensorwright.checkpoint.reader import Checkpoint
from tensorwright.cli.main import convert_checkpoint, run_verb
from tensorwright.errors import BuildError
from tensorwright.testing import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def convert(*words: object) -> int:
    return run_verb("convert", [str(word) for word in words])


def test_the_guides_line(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status = convert("--model_dir", model, "--output_dir", tmp_path / "out", "--dtype", "float16", "--per_token",
                     "--per_channel", "--use_weight_only", "--weight_only_precision", "int4")
    out, err = capfd.readouterr()
    assert status == 0
    assert re.search(r"Total time of converting checkpoints: \d\d:\d\d:\d\d\n$", out)
    assert re.search(r"note: --per_token has no effect here", err)
    assert re.search(r"note: --per_channel has no effect here", err)
    for kind in ("qkv", "dense", "fc", "gate", "proj"):
        assert re.search(rf"{kind} +0\.0\d+ +0\.0\d+ +[01]\n", out)
    config = Checkpoint(tmp_path / "out").config
    assert (config.quantization.algorithm, config.quantization.group_size) == ("W4A16", 128)
    assert config.model.dtype == "float16"


@pytest.mark.parametrize(("words", "algorithm", "group_size", "kv_cache"), [
    ((), None, -1, None), (("--use-weight-only",), "W8A16", -1, None),
    (("--use_weight_only", "--weight_only_precision", "--int8_kv_cache"), "W8A16", -1, "INT8"),
    (("--use_weight_only", "--weight_only_precision=int4", "--group-size", "-1"), "W4A16", -1, None),
    (("--weight_only_precision", "int4"), None, -1, None),
    (("--use_fp8_rowwise", "--quantize_lm_head"), "FP8_PER_CHANNEL_PER_TOKEN", -1, None),
    (("--use_fp8", "--fp8_kv_cache", "--int8_kv_cache"), "FP8_PER_CHANNEL_PER_TOKEN", -1, "FP8"),
    (("--quantize_lm_head",), None, -1, None), (("--use_fp8", "--use_weight_only"), "W8A16", -1, None),
    (("--fp8_kv_cache",), None, -1, "FP8"),
])
def test_flags_become_algorithms(model: Path, tmp_path: Path, words: tuple[str, ...], algorithm: str | None,
                                 group_size: int, kv_cache: str | None) -> None:
    assert convert("--model_dir", model, "--output_dir", tmp_path, "--pp_size", 1, "--workers", 4, *words) == 0
    quantization = Checkpoint(tmp_path).config.quantization
    assert (quantization.algorithm, quantization.group_size, quantization.kv_cache) == (algorithm, group_size, kv_cache)


@pytest.mark.parametrize(("words", "expected"), [
    (("--smoothquant", "0.5"), "--use_weight_only"), (("-sq", "0.5"), "not supported"),
    (("--use_qserve",), "--use_fp8_rowwise"), (("--pp_size", "2"), "--tp_size"),
    (("--use_weight_only", "--weight_only_precision", "int4_awq"), "int8 or int4"),
    (("--meta_ckpt_dir", "x"), "Hugging Face"), (("--quant_ckpt_path", "x"), "not supported"),
    (("--moe_num_experts", "8"), "experts"),
    (("--tp_size", "3"), "do not divide"), (("--weight_only_precison", "int4"), "did you mean"),
    (("--group_size", "48"), "128"), (("--dtype", "fp8"), "float16"),
])
def test_what_cannot_be_meant_says_what_can(model: Path, tmp_path: Path, words: tuple[str, ...], expected: str,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    try:
        status = convert("--model_dir", model, "--output_dir", tmp_path / "out", *words)
    except SystemExit as ending:
        status = int(str(ending.code))
    assert status == 2
    assert expected in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bad_model_is_status_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert("--model_dir", tmp_path, "--output_dir", tmp_path / "out") == 1
    err = capfd.readouterr().err
    assert "error:" in err
    assert "try:" in err


def test_config_only(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert("--model_dir", model, "--output_dir", tmp_path / "a", "--save_config_only") == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]
    shape = ("--n_layer", 2, "--n_head", 4, "--n_embd", 256, "--n_kv_head", 2)
    assert convert("--output_dir", tmp_path / "b", *shape) == 0
    values = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (values["num_hidden_layers"], values["num_key_value_heads"], values["head_size"]) == (2, 2, 64)
    assert convert("--model_dir", model, "--output_dir", tmp_path / "c") == 0
    assert convert("--model_dir", model, "--output_dir", tmp_path / "c", "--save_config_only") == 2
    assert "holds weights" in capfd.readouterr().err


def test_dummy_weights_from_shape_flags(tmp_path: Path) -> None:
    assert convert("--output_dir", tmp_path, "--dummy_weights", "--n_layer", 1, "--n_head", 2, "--n_embd", 128,
                   "--inter_size", 256, "--vocab_size", 300, "--use_weight_only") == 0
    assert Checkpoint(tmp_path).tensor(0, "transformer.layers.0.mlp.fc").values.shape == (256, 128)


def test_without_a_compiler_numpy_gives_the_same_bits(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capfd: pytest.CaptureFixture[str]) -> None:
    from tensorwright.kernels.cpu import compile as compile_module

    words = ("--model_dir", model, "--use_weight_only", "--weight_only_precision", "int4", "--output_dir")
    assert convert(*words, tmp_path / "native") == 0
    assert "NumPy" not in capfd.readouterr().err

    def no_compiler(*arguments: object) -> bytes:
        raise BuildError("no C++ compiler found")

    monkeypatch.setattr(compile_module, "compile_shared", no_compiler)
    assert convert(*words, tmp_path / "numpy") == 0
    assert capfd.readouterr().err.count("quantised by NumPy") == 1
    first, second = Checkpoint(tmp_path / "native"), Checkpoint(tmp_path / "numpy")
    for name in first.names(0):
        np.testing.assert_array_equal(first.tensor(0, name).values, second.tensor(0, name).values)


def test_the_script_is_the_same_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "--tp_sise", "2"])
    with pytest.raises(SystemExit):
        convert_checkpoint()
    assert "did you mean --tp_size" in capfd.readouterr().err
    script = Path(__file__).parents[2] / "examples" / "llama" / "convert_checkpoint.py"
    source = str(Path(__file__).parents[2] / "src")
    result = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True,
                            env={"PYTHONPATH": source})
    assert "--weight_only_precision" in result.stdout
