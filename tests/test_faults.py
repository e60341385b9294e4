"""Bad input through the real commands: message and mend, the right status, no traceback, nothing lost or left."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorwright.engine.format import MANIFEST, Reader
from tensorwright.testing.engines import Recipe, build_engine

ROOT = Path(__file__).resolve().parent.parent
LIMITS = ("--max_seq_len", "64", "--max_batch_size", "4", "--tokens_per_block", "16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, checkpoint and engine."""
    folder = tmp_path_factory.mktemp("whole")
    build_engine(Recipe(), folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(whole, tmp_path / "w")


def tensorwright(*words: object, max_file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes or 0, max_file_bytes or 0))

    return subprocess.run(
        [sys.executable, "-m", "tensorwright", *(word if isinstance(word, bytes) else str(word) for word in words)],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        preexec_fn=limit if max_file_bytes else None)  # noqa: PLW1509


def refused(result: subprocess.CompletedProcess[str], status: int, *messages: str) -> None:
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    errors = result.stderr[result.stderr.index("error: "):]
    assert all(message in errors for message in messages), errors
    assert "\n  try: " in errors


def run(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return tensorwright("run", "--engine_dir", folder / "engine", "--max_output_len", 4, *words)


def build(folder: Path, *words: object, **more: int) -> subprocess.CompletedProcess[str]:
    return tensorwright("build", "--no_tune", "--checkpoint_dir", folder / "checkpoint", *LIMITS, *words, **more)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip_a_bit(engine_file: Path, section: str) -> None:
    reader = Reader(engine_file)
    position = reader.section(section).ctypes.data - reader.section(reader.names[0]).ctypes.data
    content = bytearray(engine_file.read_bytes())
    content[len(content) - sum(reader.section(name).nbytes for name in reader.names) + position + 100] ^= 1
    engine_file.unlink()  # it may be a hard link
    engine_file.write_bytes(content)


@pytest.mark.parametrize(("damage", "status", "message"), [
    (lambda c: c.write_text("{"), 1, "not JSON"),
    (lambda c: c.unlink(), 1, "no config.json"),
    (lambda c: change(c, '"num_hidden_layers": 2', '"num_hidden_layers": 3'), 1, "lacks: transformer.layers.2."),
    (lambda c: change(c, '"num_hidden_layers": 2', '"num_hidden_layers": 1'), 1, "beyond what config.json describes"),
    (lambda c: change(c, '"hidden_size": 128', '"hidden_size": 64'), 1, "rows of [128]"),
    (lambda c: change(c, '"dtype": "float32"', '"dtype": "float16"'), 1, "asks for [128] float16"),
    (lambda c: change(c, '"tp_size": 1', '"tp_size": 2'), 1, "rank1.safetensors"),
])
def test_a_damaged_checkpoint_builds_nothing(folder: Path, damage: Callable[[Path], None], status: int,
                                             message: str) -> None:
    damage(folder / "checkpoint" / "config.json")
    if message == "no config.json":
        message = "config.json cannot be read"
    refused(build(folder, "--output_dir", folder / "new"), status, message)
    assert not (folder / "new").exists()


@pytest.mark.parametrize("place", ["checkpoint", "model"])
def test_a_build_never_replaces_another_folders_config(folder: Path, place: str) -> None:
    before = (folder / place / "config.json").read_bytes()
    result = build(folder, "--output_dir", folder / place)
    refused(result, 2, "not an engine's", f"--output_dir {folder / place}-engine")
    assert (folder / place / "config.json").read_bytes() == before


def test_a_full_disk_stops_a_build_and_keeps_the_old_engine(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "engine").iterdir()}
    os.utime(folder / "checkpoint" / "rank0.safetensors")  # so that nothing is reused but compiled kernels
    refused(build(folder, "--output_dir", folder / "engine", max_file_bytes=200_000), 1, "File too large")
    assert {path.name: path.read_bytes() for path in (folder / "engine").iterdir()} == before
    assert run(folder, "--input_text", "hi").returncode == 0


@pytest.mark.parametrize("section", [MANIFEST, "kernels.so", "weights/lm_head.weight"])
def test_building_again_mends_flipped_bits(folder: Path, section: str) -> None:
    """The mend that the message names must mend: a damaged file is not taken for one that is already there."""
    flip_a_bit(folder / "engine" / "rank0.engine", section)
    result = run(folder, "--input_text", "hi", "--verify")
    refused(result, 1, section, "tensorwright build")
    assert build(folder, "--output_dir", folder / "engine").returncode == 0
    assert run(folder, "--input_text", "hi", "--verify").returncode == 0


def test_rebuilding_kernels_gives_damaged_weights_no_new_checksums(folder: Path) -> None:
    flip_a_bit(folder / "engine" / "rank0.engine", "weights/lm_head.weight")
    result = tensorwright("build", "--no_tune", "--rebuild_kernels", folder / "engine", "--output_dir", folder / "new")
    refused(result, 1, "1 damaged: weights/lm_head.weight")
    assert not (folder / "new").exists()


@pytest.mark.parametrize(("build_config", "message"), [
    ({"max_seq_len": 0}, "max_seq_len is 0, expected 1 or more"),
    ({"max_seq_len": "64"}, "max_seq_len is '64', expected 1 or more"),
    ({"gather_context_logits": 1}, "gather_context_logits is 1, expected a bool"),
    (None, "max_batch_size is None"),
])
def test_a_senseless_engine_config(folder: Path, build_config: dict[str, object] | None, message: str) -> None:
    path = folder / "engine" / "config.json"
    config = json.loads(path.read_text())
    config["build_config"] = None if build_config is None else {**config["build_config"], **build_config}
    path.write_text(json.dumps(config))
    refused(run(folder, "--input_text", "hi"), 1, message, "only writes config.json anew")


def test_other_folders_are_named_with_the_next_command(whole: Path) -> None:
    for name, mend in (("model", "tensorwright convert --model_dir"), ("checkpoint", "tensorwright build")):
        refused(tensorwright("run", "--engine_dir", whole / name, "--input_text", "hi"), 1, f"a {name} folder", mend)


def test_prompts_that_cannot_be(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(b"ten bytes " * (1 << 20))
    (tmp_path / "ids.csv").write_text("1,5\n1,99999\n")
    (tmp_path / "latin.txt").write_bytes("größer\n".encode("latin1"))
    for words, messages in (
            (("--input_file", tmp_path / "big.txt"), ("prompt 0", "10485760 characters", "max_seq_len 64")),
            (("--input_file", tmp_path / "ids.csv"), ("prompt 1: token id 99999", "0 to 319")),
            (("--input_file", tmp_path / "latin.txt"), ("not UTF-8 at byte 2", "iconv")),
            (("--input_text", b"hi \xff\xfe"), ("not valid Unicode at character 3",)),
            (("--input_text", ""), ("prompt 0 is empty",)),
            (("--input_text", "hi", "--max_output_len", "0"), ("--max_output_len is 0",))):
        refused(run(whole, *words), 2, *messages)


def test_results_have_a_place_before_anything_runs(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flag in ("--output_csv", "--output_npy", "--output_log_probs_npy"):
        result = run(whole, "--input_text", "hi", flag, tmp_path / "file" / "out")
        refused(result, 1, "cannot be written")
        assert "Output" not in result.stdout
    refused(tensorwright("bench", "--engine_dir", whole / "engine", "--json", tmp_path / "file" / "b.json",
                         "--input_len", 4, "--output_len", 4), 1, "b.json cannot be written")
    refused(run(whole, "--input_text", "hi", "--output_csv", tmp_path), 1, "it is a folder")


def test_a_device_takes_results_and_stays_a_device(whole: Path) -> None:
    result = run(whole, "--input_text", "hi", "--log_level", "error", "--output_csv", "/dev/stdout")
    assert len(result.stdout.strip().split(",")) >= 4
    assert Path("/dev/stdout").is_symlink()
    refused(run(whole, "--input_text", "hi", "--output_csv", "/dev/full"), 1, "No space left on device")
    assert Path("/dev/full").is_char_device()
