"""Conversions that are stopped, that run out of room, and that must not run out of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorwright.checkpoint import convert as convert_module
from tensorwright.checkpoint.convert import ConvertOptions, convert
from tensorwright.checkpoint.reader import Checkpoint
from tensorwright.checkpoint.tensor_file import write_tensors
from tensorwright.errors import CheckpointError
from tensorwright.testing import tiny


def converted(model: Path, output: Path, **options: Any) -> Path:
    convert(model, output, ConvertOptions(**{"dtype": "float32", **options}), lambda size, what: None)
    return output


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tensorwright.checkpoint.convert import ConvertOptions, convert
from tensorwright.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions("float32"), lambda size, what: None)
except CheckpointError as error:
    sys.exit(str(error))
"""


def test_a_write_that_fails_midway_leaves_nothing(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(model), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    assert "cannot be written" in result.stderr
    assert "File too large" in result.stderr
    assert not (tmp_path / "out").exists()


def _environment() -> dict[str, str]:
    source = str(Path(convert_module.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": source}


KILLED = """
import sys, time
from pathlib import Path
from tensorwright.checkpoint.convert import ConvertOptions, convert
def report(size, what):
    print(what, flush=True)
    time.sleep(60)
convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions("float32"), report)
"""


def test_a_killed_run_leaves_an_earlier_checkpoint_whole_and_the_next_run_cleans_up(model: Path,
                                                                                    tmp_path: Path) -> None:
    output = converted(model, tmp_path / "out", tp_size=2)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    command = [sys.executable, "-c", KILLED, str(model), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    left = {path.name: path.read_bytes() for path in output.iterdir()}
    assert {name for name in left if name not in before} == {".rank0.safetensors.partial"}
    assert before.items() <= left.items()
    converted(model, output)
    assert [path.name for path in output.iterdir() if path.name.startswith((".", "rank"))] == ["rank0.safetensors"]
    assert Checkpoint(output).config.tp_size == 1


def test_a_folder_without_its_config_is_no_checkpoint(model: Path, tmp_path: Path) -> None:
    output = converted(model, tmp_path / "out")
    (output / "config.json").unlink()
    with pytest.raises(CheckpointError, match="written last"):
        Checkpoint(output)


def test_a_checkpoint_without_a_rank_is_refused(model: Path, tmp_path: Path) -> None:
    output = converted(model, tmp_path / "out", tp_size=2)
    (output / "rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank1\.safetensors"):
        Checkpoint(output)
    with pytest.raises(CheckpointError, match="no tensor"):
        Checkpoint(converted(model, tmp_path / "out")).tensor(0, "transformer.layers.9.mlp.fc")


def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    described = tiny.TinyModel(dtype="bfloat16", vocab_size=8192, hidden_size=1024, num_heads=8, head_size=128)
    weights = tiny.tensors(replace(described, num_layers=1, vocab_size=320))
    table = np.zeros((65536, 1024), ml_dtypes.bfloat16)
    weights |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    model = tiny.write_model(tmp_path / "model", replace(described, num_layers=1, vocab_size=320))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 65536}), encoding="utf-8")
    write_tensors(model / "model.safetensors", weights)
    script = ("import resource, sys\nfrom pathlib import Path\n"
              "from tensorwright.checkpoint.convert import ConvertOptions, convert\n"
              "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "options = ConvertOptions('float16', num_threads=2)\n"
              "convert(Path(sys.argv[1]), Path(sys.argv[2]), options, lambda size, what: None)\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)")
    result = subprocess.run([sys.executable, "-c", script, str(model), str(tmp_path / "out")], capture_output=True,
                            text=True, check=True, env=_environment())
    assert int(result.stdout) * 1024 < 150 << 20, f"grew by {result.stdout} KiB"
