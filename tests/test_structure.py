"""The structure holds: folders import what they may, and running an engine needs only the runtime."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from tensorwright.testing.engines import Recipe, build_engine

ROOT = Path(__file__).resolve().parent.parent


def test_folders_import_what_they_may_and_files_stay_short() -> None:
    spec = importlib.util.spec_from_file_location("check_structure", ROOT / "scripts" / "check_structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.problems() == []


def test_the_runtime_runs_an_engine_alone(tmp_path: Path) -> None:
    """No model, builder, checkpoint or quantisation code, no transformers, torch or compiler is needed to generate."""
    engine_dir = build_engine(Recipe(), tmp_path)
    code = (
        "import json, sys; from pathlib import Path; from tensorwright import LLM, SamplingParameters\n"
        "result = LLM(Path(sys.argv[1])).generate([[1, 5, 9]], SamplingParameters(max_tokens=3, end_ids=()))[0]\n"
        "print(json.dumps([len(result.sequences[0].token_ids), list(sys.modules)]))\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PATH": "/nonexistent"}
    result = subprocess.run([sys.executable, "-c", code, engine_dir], capture_output=True, text=True, check=False,
                            env=environment)
    assert result.returncode == 0, result.stderr
    tokens, modules = json.loads(result.stdout)
    assert tokens == 3
    forbidden = {"tensorwright.models", "tensorwright.builder", "tensorwright.checkpoint", "tensorwright.quantization",
                 "transformers", "torch", "triton", "mpi4py"}
    assert forbidden.isdisjoint(modules)
