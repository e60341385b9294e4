"""Two ranks give the tokens of one: the commands that users type, under the real mpirun."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tensorwright.testing.tiny import TinyModel, write_model

ROOT = Path(__file__).resolve().parent.parent
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="needs mpirun (pip install 'tensorwright[mpi]')")
pytestmark = pytest.mark.mpi


def command(*words: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [MPIRUN, "-n", ranks, "--allow-run-as-root", "--oversubscribe"] if ranks else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([str(word) for word in (*launcher, sys.executable, *words)], text=True, capture_output=True,
                          env=environment, cwd=ROOT, check=False, timeout=120)


def engine(folder: Path, model: Path, ranks: int) -> Path:
    checkpoint, out = folder / f"checkpoint{ranks}", folder / f"engine{ranks}"
    converted = command("examples/llama/convert_checkpoint.py", "--model_dir", model, "--output_dir", checkpoint,
                        "--dtype", "float32", "--tp_size", ranks)
    assert converted.returncode == 0, converted.stderr
    built = command("-m", "tensorwright", "build", "--no_tune", "--checkpoint_dir", checkpoint, "--output_dir", out,
                    "--max_seq_len", 64, "--max_batch_size", 4, "--workers", 2)
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module", params=["untied", "tied, one kv head for each rank's copy"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    tiny = TinyModel("mistral", num_layers=3) if request.param == "untied" else TinyModel(
        "llama", num_kv_heads=1, tied_embeddings=True, vocab_size=321, attention_bias=True, mlp_bias=True)
    model = write_model(folder / "model", tiny)
    return engine(folder, model, 1), engine(folder, model, 2)


def outputs(text: str) -> list[str]:
    return re.findall(r"^Output .*", text, flags=re.MULTILINE)


@needs_mpi
@pytest.mark.parametrize("sampling", [(), ("--temperature", "0.8", "--num_return_sequences", "2")])
def test_two_ranks_give_the_tokens_of_one(engines: tuple[Path, Path], sampling: tuple[str, ...]) -> None:
    prompts = ("--input_text", "hi how are you?", "numbers 1 2 3", "--max_output_len", "20", *sampling)
    one = command("examples/run.py", "--engine_dir", engines[0], *prompts)
    two = command("examples/run.py", "--engine_dir", engines[1], *prompts, "--debug_mode", ranks=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert len(outputs(one.stdout)) >= 2
    assert outputs(two.stdout) == outputs(one.stdout)
    assert two.stderr.count("note: --debug_mode") == 1, "only the first rank speaks"


@needs_mpi
def test_too_many_ranks_print_both_numbers_and_the_right_command(engines: tuple[Path, Path]) -> None:
    words = ("examples/run.py", "--engine_dir", engines[0], "--input_text", "hi", "--max_output_len", "2")
    result = command(*words, ranks=2)
    assert result.returncode != 0
    assert "1 rank" in result.stderr
    assert "2" in result.stderr
    assert "try: python3 examples/run.py --engine_dir" in result.stderr


def test_too_few_ranks_print_both_numbers_and_the_right_command(engines: tuple[Path, Path]) -> None:
    result = command("examples/run.py", "--engine_dir", engines[1], "--input_text", "hi", "--max_output_len", "2")
    assert result.returncode == 1
    assert "mpirun -n 2" in result.stderr
