"""Inspecting models, checkpoints and engines, and things that are none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorwright.cli.main import main
from tensorwright.testing.tiny import TinyModel, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), TinyModel(num_shards=2))


def inspected(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["inspect", *words, "--json"]) == 0
    facts: dict[str, object] = json.loads(capsys.readouterr().out)
    return facts


def test_a_model_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspected(capsys, str(model))
    assert facts["kind"] == "Hugging Face model folder"
    assert facts["architecture"] == "MistralForCausalLM"
    assert facts["heads"] == "4 of 32, 2 for keys and values"
    assert facts["files"] == 2
    assert facts["convertible"] == "yes"


def test_a_consolidated_copy_is_not_counted_twice(model: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m")
    before = inspected(capsys, str(folder))["weight_bytes"]
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert inspected(capsys, str(folder))["weight_bytes"] == before


def test_a_model_that_cannot_be_converted_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    facts = inspected(capsys, str(tmp_path))
    assert facts["architecture"] == "MambaForCausalLM"
    assert str(facts["convertible"]).startswith("no: ")


def test_weights_are_listed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--weights"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj.weight" in printed
    assert "[128, 256]" in printed


@pytest.mark.parametrize(("content", "message"), [
    (None, "it has no config.json"), ("{", "is not JSON"), ("[]", "is not a JSON object"),
    ("{}", "none of architectures, quantization and build_config")])
def test_unknown_folders(content: str | None, message: str, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content", "status", "message"), [
    ("x.engine", b"", 1, "x.engine"), ("x.engine", b"\xff" * 5000, 1, "x.engine"), ("x.safetensors", b"12", 1, "x.s"),
    ("x.txt", b"", 2, "neither")])
def test_damaged_and_foreign_files(name: str, content: bytes, status: int, message: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["inspect", str(tmp_path / name)]) == status
    assert message in capsys.readouterr().err


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "there is nothing at" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--program", "--tactics", "--verify"])
def test_a_model_has_no_program_and_no_checksums(flag: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), flag]) == 2
    assert "only engines hold" in capsys.readouterr().err
