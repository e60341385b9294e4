"""Opens an engine for run and chat: ranks, memory, tokenizer folder. It knows options, and nothing of prompts."""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tensorwright.cli.options import Parser, add_switch
from tensorwright.cli.outputs import QUIET_LEVELS, Console, make_printable
from tensorwright.cli.tables import format_table
from tensorwright.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorwright.runtime.communicator import Communicator
    from tensorwright.runtime.llm import LLM

LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")


def add_session_options(parser: Parser) -> None:
    """Where the engine and the tokenizer are, and what they may use."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine_dir", type=Path, default=Path("engine_outputs"), help="the engine's folder")
    group.add_argument("--tokenizer_dir", type=Path, help="folder with tokenizer.json (default: the engine's folder)")
    group.add_argument("--hf_model_dir", "--model_dir", type=Path, help="used when --tokenizer_dir is not given")
    group.add_argument("--threads", type=int, help="CPU threads of each rank (default: one per physical core)")
    group.add_argument("--kv_cache_free_gpu_memory_fraction", type=float, default=0.9, metavar="FRACTION",
                       help="share of the free memory for the KV cache")
    group.add_argument("--max_tokens_in_paged_kv_cache", type=int, metavar="TOKENS",
                       help="at most this many tokens in the KV cache; the smaller of both wins")
    add_switch(group, "--kv_cache_enable_block_reuse", default=True,
               help="prompts that begin alike share their KV blocks")
    group.add_argument("--max_attention_window_size", type=int, nargs="+", metavar="TOKENS",
                       help="the window is the model's: accepted when it holds the engine's max_seq_len")
    add_switch(group, "--verify", default=False, help="check every weight of the engine file before running")
    group.add_argument("--log_level", choices=LOG_LEVELS, type=str.lower, default="info",
                       help="warning and above leave only the results")


def open_session(arguments: argparse.Namespace) -> AbstractContextManager[tuple[LLM, Console]]:
    """Open the engine, for a `with` statement.

    Raises:
        EngineError: no engine there, a damaged one, or one for another machine.
        RanksError: started with another number of processes than the engine's ranks.
        UsageError: options that contradict the engine.
    """
    return _session(arguments)


@contextmanager
def _session(arguments: argparse.Namespace) -> Iterator[tuple[LLM, Console]]:
    from tensorwright.engine.config import read_config
    from tensorwright.engine.engine import Engine
    from tensorwright.runtime.communicator import Communicator, check_ranks

    make_printable()
    _check_values(arguments)
    read_config(arguments.engine_dir)  # before any MPI: a wrong folder is the commonest mistake
    communicator = Communicator.from_environment()
    try:
        check_ranks(Engine.open(arguments.engine_dir).world_size, communicator)  # by rank 0's file, on every rank
        is_leader = communicator is None or communicator.rank == 0
        console = Console(is_leader, arguments.log_level in QUIET_LEVELS)
        yield _open(arguments, communicator, console), console
    finally:
        if communicator is not None:
            communicator.close()


def _open(arguments: argparse.Namespace, communicator: Communicator | None, console: Console) -> LLM:
    from tensorwright.runtime.llm import LLM

    started = time.monotonic()
    if arguments.verify:
        _verify(arguments.engine_dir, communicator, console)
    llm = LLM(
        arguments.engine_dir,
        tokenizer_dir=arguments.tokenizer_dir or arguments.hf_model_dir,
        threads=arguments.threads,
        max_kv_tokens=arguments.max_tokens_in_paged_kv_cache,
        kv_cache_fraction=arguments.kv_cache_free_gpu_memory_fraction,
        block_reuse=arguments.kv_cache_enable_block_reuse,
        communicator=communicator,
    )
    _check_windows(arguments.max_attention_window_size, llm.engine.limits.max_seq_len)
    console.info(f"Load engine takes: {time.monotonic() - started:.3f} sec")
    if communicator is not None:
        console.info(f"Ranks: {communicator.size}, sums travel by {communicator.transport}")
    console.info(format_table("Memory", llm.memory_table()))
    return llm


def _verify(engine_dir: Path, communicator: Communicator | None, console: Console) -> None:
    from tensorwright.engine.engine import Engine

    Engine.open(engine_dir, 0 if communicator is None else communicator.rank).verify()
    console.info("The engine file is whole: every section has its checksum.")


def _check_values(arguments: argparse.Namespace) -> None:
    fraction = arguments.kv_cache_free_gpu_memory_fraction
    if not 0 < fraction <= 1:
        raise UsageError(f"--kv_cache_free_gpu_memory_fraction is {fraction:g}, expected above 0 and at most 1",
                         mend="--kv_cache_free_gpu_memory_fraction 0.9")
    for name in ("threads", "max_tokens_in_paged_kv_cache"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more", mend=f"leave --{name} out")


def _check_windows(windows: list[int] | None, max_seq_len: int) -> None:
    if windows and min(windows) < max_seq_len:
        raise UsageError(
            f"--max_attention_window_size {min(windows)} would forget text of prompts up to max_seq_len {max_seq_len}; "
            "the attention window is the model's own",
            mend="leave --max_attention_window_size out",
        )
