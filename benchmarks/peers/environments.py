"""Sets up the engines that are compared: an environment for each peer, and the same model for each engine.

Every step is a command that is run when what it makes is not there yet. It knows versions, folders and commands, and
measures nothing. Tensorwright runs in the environment of the caller, and its engine is always built anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = {  # the first of each is the peer, the others make its model
    "llama.cpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
    "openvino": ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "transformers==5.5.4",
                 "torch==2.13.0"),
}
VARIABLES = {"llama.cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release"}}
PROGRAMS = {"tensorwright": "run_tensorwright.py", "llama.cpp": "run_llama_cpp.py", "openvino": "run_openvino.py"}
VERSIONS = "import sys, json; from importlib import metadata; " \
           "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in metadata.distributions()}))"


class SetupError(Exception):
    """A command of the setup failed."""


@dataclass(frozen=True)
class Step:
    """A command, whether what it makes is there, and variables that it needs."""

    command: tuple[str, ...]
    is_done: Callable[[], bool]
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([*(f"{name}='{value}'" for name, value in self.variables.items()), *self.command])


@dataclass(frozen=True)
class Place:
    """Where an engine lives: its Python, its program for `protocol.py`, its model, and the steps that lead there."""

    python: Path
    program: Path
    model: Path
    steps: tuple[Step, ...]

    def set_up(self, log: Path) -> None:
        """Do what is not done yet; SetupError with the last lines of a command that failed."""
        for step in self.steps:
            if not step.is_done():
                _run(step, log)

    def versions(self, names: tuple[str, ...]) -> dict[str, str]:
        """Versions of these packages in this environment."""
        found = _versions(self.python)
        return {name: found[name] for name in names if name in found}


def place(name: str, work: Path, config: dict[str, Any], folder: Path, limits: tuple[str, ...]) -> Place:
    """The place of an engine, for the model of a Hugging Face config that is written into the model's folder."""
    model_dir = folder / "config"
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    if name == "tensorwright":
        steps = tuple(_tensorwright(model_dir, folder, limits))
        return Place(Path(sys.executable), HERE / PROGRAMS[name], folder / "engine", steps)
    environment = work / name
    python = environment / "bin" / "python"
    script, model = {"llama.cpp": ("write_gguf.py", folder / "model.gguf"),
                     "openvino": ("export_openvino.py", folder / "openvino")}[name]
    make = Step((str(python), str(HERE / script), str(model_dir / "config.json"), str(model)), model.exists)
    return Place(python, HERE / PROGRAMS[name], model, (*_packages(name, environment, python), make))


def _packages(name: str, environment: Path, python: Path) -> Iterator[Step]:
    yield Step((sys.executable, "-m", "venv", str(environment)), python.exists)
    wanted = dict(package.split("==") for package in PACKAGES[name])

    def is_installed() -> bool:
        found = _versions(python)
        return all(found.get(package, "").split("+")[0] == version for package, version in wanted.items())

    yield Step((str(python), "-m", "pip", "install", *PACKAGES[name]), is_installed, VARIABLES.get(name, {}))
    if name == "openvino":
        # Only pictures need it, and one made for another build of torch than the one found here breaks every import.
        yield Step((str(python), "-m", "pip", "uninstall", "-y", "torchvision"),
                   lambda: "torchvision" not in _versions(python))


def _tensorwright(model_dir: Path, folder: Path, limits: tuple[str, ...]) -> Iterator[Step]:
    verb = (sys.executable, "-m", "tensorwright")
    checkpoint, engine = str(folder / "checkpoint"), str(folder / "engine")
    yield Step((*verb, "convert", "--model_dir", str(model_dir), "--output_dir", checkpoint, "--dummy_weights",
                "--dtype", "float16", "--use_weight_only", "--weight_only_precision", "int4", "--quantize_lm_head"),
               lambda: False)
    yield Step((*verb, "build", "--checkpoint_dir", checkpoint, "--output_dir", engine, *limits), lambda: False)


def _versions(python: Path) -> dict[str, str]:
    answer = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def _run(step: Step, log: Path) -> None:
    print(f"setup: {step}", file=sys.stderr, flush=True)
    started = time.monotonic()
    result = subprocess.run(step.command, env={**os.environ, **step.variables}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, check=False)
    with log.open("a", encoding="utf-8") as lines:
        lines.write(f"{step}\n{result.stdout}\n")
    if result.returncode != 0:
        raise SetupError(f"{step}: exit status {result.returncode}: {' / '.join(result.stdout.splitlines()[-5:])}")
    print(f"setup: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
