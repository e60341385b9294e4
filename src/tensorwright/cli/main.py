"""Entry points: find the verb, parse its options, run it, and turn errors into messages and exit statuses.

It knows the names of the verbs and imports the module of the one that is asked for. Exit statuses: 0 done, 1 an error
of the tree in `errors.py` or of the operating system, 2 a command line that cannot be meant, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from tensorwright import __version__
from tensorwright.errors import TensorwrightError, UsageError

VERBS = {
    "convert": "turn a Hugging Face model folder into a checkpoint folder, quantised if asked",
    "build": "compile a checkpoint for one machine into an engine folder",
    "run": "generate text with an engine",
    "deploy": "write a Triton model repository for an engine, and start the server",
    "chat": "talk to an engine in the terminal",
    "bench": "measure an engine: load, first token, prefill, decode, memory",
    "inspect": "say what a model, checkpoint or engine is, without running it",
    "doctor": "say what this machine can build and run, and how to get what is missing",
}


def main(words: Sequence[str] | None = None) -> int:
    """The command `tensorwright`."""
    given = list(sys.argv[1:] if words is None else words)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if given else 2
    if given[0] in ("-V", "--version", "version"):
        print(f"tensorwright {__version__}")
        return 0
    if given[0] not in VERBS:
        print(f"error: unknown command {given[0]}{_suggestion(given[0])}\n  try: tensorwright --help", file=sys.stderr)
        return 2
    return run_verb(given[0], given[1:])


def run_verb(verb: str, words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """One verb with its options (default: those of this process); `prog` is the command's name in messages."""
    from tensorwright.cli.options import Parser

    module = import_module(f"tensorwright.cli.{verb}")
    parser = Parser(prog or f"tensorwright {verb}", description=VERBS[verb].capitalize() + ".")
    try:
        module.configure(parser)
        status: int = module.main(parser.parse_args(sys.argv[1:] if words is None else list(words)))
        sys.stdout.flush()
        return status
    except TensorwrightError as error:
        return _fail(error.message, error.mend, 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return 141
    except OSError as error:
        return _fail(str(error), None, 1)
    except MemoryError:
        return _fail("the machine has not enough memory for this", "tensorwright doctor", 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def trtllm_build() -> int:
    """The command `trtllm-build`: the verb build under its old name."""
    return run_verb("build", prog="trtllm-build")


def convert_checkpoint() -> int:
    """`examples/llama/convert_checkpoint.py`: the verb convert under its old name."""
    return run_verb("convert", prog="convert_checkpoint.py")


def run() -> int:
    """`examples/run.py`: the verb run under its old name."""
    return run_verb("run", prog="run.py")


def _fail(message: str, mend: str | None, status: int) -> int:
    print(f"error: {message}" + (f"\n  try: {mend}" if mend else ""), file=sys.stderr)
    return status


def _suggestion(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, VERBS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _help() -> str:
    verbs = "\n".join(f"  {verb:<9} {meaning}" for verb, meaning in VERBS.items())
    return (f"usage: tensorwright COMMAND [options]      (tensorwright COMMAND --help shows its options)\n\n{verbs}\n\n"
            "  --version prints the version. Options may be written with dashes or underscores.")
