"""The command `tensorwright`: fast help, unknown verbs, exit statuses and how errors look."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import tensorwright
from tensorwright.cli import main as cli
from tensorwright.cli.options import Parser
from tensorwright.errors import EngineError, LimitError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tensorwright.__file__).parents[1])}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tensorwright", *words], capture_output=True, text=True, check=False,
                          env=ENVIRONMENT)


def verb_that(action: Callable[[], int]) -> ModuleType:
    module = ModuleType("tensorwright.cli.doctor")

    def configure(parser: Parser) -> None:
        parser.add_argument("--n", type=int)

    def main(arguments: argparse.Namespace) -> int:
        return action()

    module.configure, module.main = configure, main
    return module


def test_help_names_every_verb_and_is_fast() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        result = command("--help")
        times.append(time.perf_counter() - started)
        assert result.returncode == 0
    assert all(f"\n  {verb}" in result.stdout for verb in cli.VERBS)
    assert min(times) < 0.6  # the goal is 0.15 s on a quiet machine


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from tensorwright.cli.main import main; main(['--help']); "
            "print([m for m in ('numpy', 'argparse', 'tokenizers', 'jinja2') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env=ENVIRONMENT)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", ["build", "bench", "inspect", "doctor"])
def test_help_of_a_verb_imports_no_numpy(verb: str) -> None:
    code = f"import sys; from tensorwright.cli.main import main; main(['{verb}', '--help'])"
    result = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True,
                            check=True, env=ENVIRONMENT)
    assert f"usage: tensorwright {verb}" in result.stdout
    assert "numpy" not in result.stderr


def test_version_and_no_verb() -> None:
    assert command("--version").stdout.startswith("tensorwright ")
    assert command().returncode == 2


def test_an_unknown_verb_suggests() -> None:
    result = command("biuld")
    assert result.returncode == 2
    assert "did you mean build?" in result.stderr


def _raise(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error
    return action


@pytest.mark.parametrize(("error", "status", "printed"), [
    (EngineError("it is broken", mend="tensorwright build"), 1, "error: it is broken\n  try: tensorwright build\n"),
    (LimitError("7 is over 5"), 2, "error: 7 is over 5\n"),
    (OSError(28, "No space left on device", "/x/y"), 1, "error: [Errno 28] No space left on device: '/x/y'\n"),
    (MemoryError(), 1, "error: the machine has not enough memory for this\n  try: tensorwright doctor\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")])
def test_errors_become_messages_and_statuses(error: BaseException, status: int, printed: str,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tensorwright.cli.doctor", verb_that(_raise(error)))
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == printed


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorwright.cli.doctor", verb_that(_raise(ZeroDivisionError())))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


PRINTING_VERB = """
import sys, types
from tensorwright.cli.main import main
verb = types.ModuleType("verb")
verb.configure = lambda parser: None
verb.main = lambda arguments: print("x" * 100_000) or 0
sys.modules["tensorwright.cli.doctor"] = verb
sys.stdin.readline()
sys.exit(main(["doctor"]))
"""


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen([sys.executable, "-c", PRINTING_VERB], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 141
