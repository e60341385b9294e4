"""What deploy writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tensorwright.engine.config import write_config
from tensorwright.errors import EngineError, ServeError, UsageError
from tensorwright.serve.triton.config_pbtxt import config_text
from tensorwright.serve.triton.options import DeployOptions, LaunchOptions
from tensorwright.serve.triton.repository import write_model
from tensorwright.serve.triton.settings import ServeSettings


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    limits = {"max_batch_size": 16, "max_seq_len": 100, "max_input_len": 99, "max_num_tokens": 64,
              "max_beam_width": 1, "gather_context_logits": False, "gather_generation_logits": False,
              "logits_dtype": "float16"}
    write_config(folder, {"build_config": limits, "pretrained_config": {}})
    (folder / "rank0.engine").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def text(settings: ServeSettings | None = None, logits_dtype: str = "float16") -> str:
    return config_text("ensemble", max_batch_size=16, logits_dtype=logits_dtype, settings=settings or ServeSettings(),
                       parameters={"engine_dir": 'a "quoted" \\ path'})


def test_config_says_what_old_clients_expect() -> None:
    config = text()
    assert 'name: "ensemble"' in config
    assert "max_batch_size: 16" in config
    assert "decoupled: true" in config
    assert '{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }' in config
    assert '{ name: "stop_words" data_type: TYPE_STRING dims: [ -1 ] optional: true }' in config
    assert '{ name: "generation_logits" data_type: TYPE_FP16 dims: [ -1, -1, -1 ] }' in config
    assert config.count("optional: true") == config.count("{ name:") - 2 - 10  # but required inputs and outputs
    assert r'string_value: "a \"quoted\" \\ path"' in config
    assert "decoupled: false" in text(ServeSettings(decoupled=False))
    assert "TYPE_FP32 dims: [ -1, -1, -1 ]" in text(logits_dtype="bfloat16")


def test_settings_come_back_from_the_config() -> None:
    settings = ServeSettings(decoupled=False, request_timeout_s=2.5, threads=3, block_reuse=False)
    found = re.findall(r'key: "(\w+)" value \{ string_value: "([^"]*)" \}', text(settings))
    assert ServeSettings.from_parameters(dict(found)) == settings
    assert ServeSettings.from_parameters({}) == ServeSettings()


@pytest.mark.parametrize("parameters", [{"threads": "many"}, {"decoupled": "yes"}, {"request_timeout_s": "-1"},
                                        {"kv_cache_fraction": "0"}, {"max_kv_tokens": "0"}])
def test_edited_nonsense_is_named(parameters: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(parameters))):
        ServeSettings.from_parameters(parameters)


def test_the_folder(engine_dir: Path, tmp_path: Path) -> None:
    place = write_model(DeployOptions(engine_dir, tmp_path / "repository"), ServeSettings())
    version = place / "1"
    assert place == tmp_path / "repository" / "ensemble"
    assert "class TritonPythonModel" in (version / "model.py").read_text()
    assert (version / "engine" / "rank0.engine").samefile(engine_dir / "rank0.engine")
    assert not (version / "engine" / "config.json").samefile(engine_dir / "config.json")
    assert json.loads((version / "engine" / "config.json").read_text())["build_config"]["max_batch_size"] == 16
    for part in ("errors.py", "runtime/parameters.py", "serve/triton/model.py", "engine/engine.py"):
        assert (version / "tensorwright" / part).is_file()
    for part in ("builder", "checkpoint", "models", "cli", "testing"):
        assert not (version / "tensorwright" / part).exists()
    assert [entry.name for entry in (tmp_path / "repository").iterdir()] == ["ensemble"]


def test_the_folder_is_whole(engine_dir: Path, tmp_path: Path) -> None:
    """Its runtime imports in a Python that knows no other Tensorwright, and without what builds engines."""
    version = write_model(DeployOptions(engine_dir, tmp_path / "repository"), ServeSettings()) / "1"
    code = (f"import sys; sys.path.insert(0, {str(version)!r})\n"
            "import tensorwright.serve.triton.model, tensorwright.runtime.async_llm, tensorwright.runtime.executor\n"
            "print(tensorwright.__file__, *sorted(sys.modules))")
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    place, *modules = done.stdout.split()
    assert place.startswith(str(version))
    for part in ("builder", "models", "checkpoint", "quantization"):
        assert f"tensorwright.{part}" not in modules
    assert not {"torch", "transformers"} & set(modules)


def test_deploying_again_replaces_our_folder(engine_dir: Path, tmp_path: Path) -> None:
    options = DeployOptions(engine_dir, tmp_path / "repository")
    place = write_model(options, ServeSettings())
    (place / "1" / "left_over").touch()
    write_model(options, ServeSettings(threads=2))
    assert not (place / "1" / "left_over").exists()
    assert 'key: "threads" value { string_value: "2" }' in (place / "config.pbtxt").read_text()


def test_a_folder_of_someone_else_stays(engine_dir: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "repository" / "ensemble"
    foreign.mkdir(parents=True)
    (foreign / "config.pbtxt").write_text('name: "ensemble"')
    options = DeployOptions(engine_dir, tmp_path / "repository")
    with pytest.raises(ServeError, match="not written by tensorwright"):
        write_model(options, ServeSettings())
    assert (foreign / "config.pbtxt").read_text() == 'name: "ensemble"'
    write_model(DeployOptions(engine_dir, tmp_path / "repository", force=True), ServeSettings())
    assert (foreign / "1" / "model.py").is_file()


def test_a_tokenizer_of_its_own(engine_dir: Path, tmp_path: Path) -> None:
    (engine_dir / "tokenizer.json").unlink()
    with pytest.raises(ServeError, match=r"no tokenizer\.json"):
        write_model(DeployOptions(engine_dir, tmp_path / "r"), ServeSettings())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    place = write_model(DeployOptions(engine_dir, tmp_path / "r", tokenizer_dir=tmp_path / "model"), ServeSettings())
    assert (place / "1" / "tokenizer" / "tokenizer.json").is_file()
    assert 'key: "tokenizer_dir" value { string_value: "tokenizer" }' in (place / "config.pbtxt").read_text()


def test_leftovers_of_a_killed_deploy_are_removed(engine_dir: Path, tmp_path: Path) -> None:
    """Triton takes every folder of a repository for a model, and does not start when one cannot be loaded."""
    repository = tmp_path / "repository"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f".ensemble.{ended.pid}.part", f".ensemble.{ended.pid}.old", f".ensemble.{os.getppid()}.part",
             f".ensemble.b.{ended.pid}.part", ".ensemble.mine"]
    for name in names:
        (repository / name / "1").mkdir(parents=True)
    write_model(DeployOptions(engine_dir, repository), ServeSettings())
    assert {entry.name for entry in repository.iterdir()} == {"ensemble", *names[2:]}


def test_what_is_no_engine_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no engine folder"):
        write_model(DeployOptions(tmp_path / "nothing", tmp_path / "r"), ServeSettings())
    (engine_dir / "rank1.engine").touch()
    with pytest.raises(ServeError, match="2 ranks"):
        write_model(DeployOptions(engine_dir, tmp_path / "r"), ServeSettings())
    assert not (tmp_path / "r").exists()


def test_a_place_that_cannot_be_written(engine_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match="cannot be written"):
        write_model(DeployOptions(engine_dir, tmp_path / "file"), ServeSettings())


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_model_names(engine_dir: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="model name"):
        write_model(DeployOptions(engine_dir, tmp_path / "r", model_name=name), ServeSettings())


@pytest.mark.parametrize("ports", [(0, 1, 2), (8000, 8000, 8002), (8000, 8001, 70000)])
def test_ports(ports: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        LaunchOptions(http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2])


@pytest.mark.parametrize("host", ["localhost", "::1", "", "127.0.0.1:8000"])
def test_a_host_that_the_server_would_misread(host: str) -> None:
    with pytest.raises(UsageError, match="IPv4"):
        LaunchOptions(host=host)
    assert LaunchOptions(host="0.0.0.0").url(8000) == "http://127.0.0.1:8000"
