"""Runs what is measured in processes of its own: workers that answer line by line, and commands with their times."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu import command
from gpu_table.schemes import CONFIG, LIMITS, SCHEMES

HERE = Path(__file__).resolve().parent
FRESH_STARTS = 3


@dataclass(frozen=True)
class Built:
    """An engine folder and the seconds that its build took; or the command that failed."""

    folder: Path
    seconds: float = 0.0
    failure: str = ""


@dataclass
class Engines:
    """Engines of dummy weights under a folder, each built once until it is removed."""

    folder: Path
    layers: int
    target: str
    made: dict[str, Built] = field(default_factory=dict)

    def build(self, names: Sequence[str]) -> None:
        """All of them that are not there, side by side; tactics are measured by one build at a time."""
        missing = [name for name in names if name not in self.made]
        with ThreadPoolExecutor(max(1, len(missing))) as pool:
            self.made |= dict(zip(missing, pool.map(self._build, missing), strict=True))

    def remove(self, name: str) -> None:
        """Make room."""
        self.made.pop(name, None)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _build(self, name: str) -> Built:
        folder = self.folder / name
        model, checkpoint, engine = (folder / part for part in ("model", "checkpoint", "engine"))
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": self.layers}))
        try:
            command("convert", "--model_dir", model, "--output_dir", checkpoint, "--dtype", "float16",
                    "--save_config_only", *SCHEMES[name].convert)
            return Built(engine, command("build", "--checkpoint_dir", checkpoint, "--output_dir", engine,
                                         "--dummy_weights", "--target", self.target, *LIMITS))
        except subprocess.CalledProcessError as error:  # it said why; the others may do better
            return Built(engine, failure=f"{error.cmd[3]} ended with status {error.returncode}")


def measure(engine: Built, figures: Sequence[str], *, new_tokens: int, repeats: int,
            limit_s: float) -> dict[str, dict[str, Any]]:
    """A worker's answers by figure. One that dies or takes longer than `limit_s` leaves what it had, and says so."""
    if engine.failure:
        return dict.fromkeys(figures, {"failure": engine.failure})
    process = subprocess.Popen([sys.executable, str(HERE / "worker.py")], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    job = {"engine": str(engine.folder), "figures": list(figures), "new_tokens": new_tokens, "repeats": repeats}
    with _stopped_after(process, limit_s) as stopped:
        found = {}
        for line in _answers(process, json.dumps(job)):
            answer = json.loads(line)
            found[answer.pop("figure")] = answer
            print(line, end="", file=sys.stderr, flush=True)
        status = process.wait()
    why = f"stopped after {limit_s:.0f} s" if stopped.is_set() else f"the process ended with status {status}"
    return found | {figure: {"failure": why} for figure in figures if figure not in found}


def first_tokens(engine: Path) -> dict[str, Any]:
    """The median of some fresh processes, by the seconds until the first token; all of them beside it."""
    runs = [json.loads(subprocess.run([sys.executable, str(HERE / "first_token.py"), str(engine), repr(time.time())],
                                      check=True, capture_output=True, text=True).stdout)
            for _ in range(FRESH_STARTS)]
    return {"whole_s": statistics.median(run["whole_s"] for run in runs), "runs": runs}


def _answers(process: subprocess.Popen[str], job: str) -> Iterator[str]:
    if process.stdin is None or process.stdout is None:
        return
    with suppress(BrokenPipeError), process.stdin as ask:  # it may have died already; its status tells
        ask.write(f"{job}\n")
    with process.stdout as lines:
        yield from lines


@contextmanager
def _stopped_after(process: subprocess.Popen[str], limit_s: float) -> Iterator[threading.Event]:
    """Kill it when the time is over; the event tells."""
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(limit_s, stop)
    timer.start()
    try:
        yield stopped
    finally:
        timer.cancel()
        process.kill()
