"""Where the time of one decode step goes: per kind of op, and the single steps that lose most to the memory's limit.

How much can be named is the engine's `--profiling_verbosity`: none gives totals per kernel, layer_names_only the names
of ops too, detailed their tactics as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorwright.cli.bench import step_bytes
from tensorwright.cli.tables import format_bytes, print_table
from tensorwright.runtime.batch import Batch

if TYPE_CHECKING:
    from tensorwright.engine.engine import Engine
    from tensorwright.runtime.communicator import Communicator

WARMUPS, RUNS, NUM_WORST = 2, 15, 10


@dataclass(frozen=True)
class Line:
    """One step, or all steps of a name: how many, their time and bytes, the share of the whole and of the limit."""

    name: str
    count: int
    ms: float
    share: float
    bytes: float
    share_of_limit: float


def profile_decode(engine: Engine, batch: int, kv_length: int, threads: int, bandwidth: float,
                   communicator: Communicator | None = None) -> dict[str, Any]:
    """Medians over some runs of one decode step of `batch` sequences with `kv_length` cached tokens each."""
    from tensorwright.runtime.executor import CpuExecutor

    step = decode_batch(batch, kv_length, engine.tokens_per_block, engine.vocab_size)
    executor = CpuExecutor(engine, threads=threads, num_blocks=int(step.block_tables.max()) + 1,
                           communicator=communicator)
    for buffer in engine.program.buffers.values():
        if buffer.kind == "cache":
            executor.buffer(buffer.name).fill(1)  # pages never written would all read from one page in the cache
    seconds = np.zeros((WARMUPS + RUNS, len(engine.program.ops)))
    for run in seconds:
        executor.execute(step, step_seconds=run)
    times = np.median(seconds[WARMUPS:], axis=0)
    sizes = np.array(step_bytes(engine, batch, batch * kv_length))
    verbosity = engine.config["build_config"].get("profiling_verbosity", "layer_names_only")
    lost = times - sizes / bandwidth
    worst = [] if verbosity == "none" else np.argsort(-lost)[:NUM_WORST].tolist()
    name = _namer(engine, verbosity)
    return {"batch": batch, "kv_length": kv_length, "step_ms": float(times.sum() * 1e3), "verbosity": verbosity,
            "kinds": [asdict(line) for line in _totals(_group_names(engine, verbosity), times, sizes, bandwidth)],
            "worst": [asdict(_line(name(i), times[[i]], sizes[[i]], times.sum(), bandwidth)) for i in worst]}


def decode_batch(batch: int, kv_length: int, block_size: int, vocab_size: int) -> Batch:
    """One new token for each sequence, which is the last of its `kv_length`; blocks are dealt out in order."""
    width = -(-kv_length // block_size)
    tables = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
    last = kv_length - 1
    rows = np.arange(batch, dtype=np.int32)
    return Batch(token_ids=(rows * 7919 % vocab_size).astype(np.int32), positions=np.full(batch, last, np.int32),
                 slots=np.ascontiguousarray(tables[:, last // block_size] * block_size + last % block_size),
                 query_starts=rows, query_lengths=np.ones(batch, np.int32),
                 kv_lengths=np.full(batch, kv_length, np.int32), block_tables=tables, output_rows=rows)


def print_profile(profile: dict[str, Any]) -> None:
    """The tables of one batch size."""
    header = ("", "steps", "ms", "share", "bytes", "share of limit")
    print_table(f"\nOne decode step, batch {profile['batch']}, {profile['kv_length']} tokens each: "
                f"{profile['step_ms']:.2f} ms in kernels", _rows(profile["kinds"]), header=header)
    if profile["worst"]:
        print_table("\nSteps that lose most against the memory's limit", _rows(profile["worst"]), header=header)
    else:
        print("Built with --profiling_verbosity none: steps have no names.")


def _rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(line["name"], str(line["count"]), f"{line['ms']:.3f}", f"{line['share']:.1%}",
             format_bytes(line["bytes"]), f"{line['share_of_limit']:.0%}") for line in lines]


def _group_names(engine: Engine, verbosity: str) -> list[str]:
    if verbosity == "none":
        return [step.kernel for step in engine.steps]
    return [f"{op.kind} {op.name.rpartition('.')[2]}" if op.kind == "linear" else op.kind for op in engine.program.ops]


def _namer(engine: Engine, verbosity: str) -> Callable[[int], str]:
    def name(index: int) -> str:
        step = engine.steps[index]
        if verbosity != "detailed":
            return step.op
        tactic = " ".join([step.layout, *(f"{key}={value}" for key, value in step.parameters.items())])
        return f"{step.op} ({step.kernel} {tactic})"
    return name


def _totals(names: Sequence[str], times: Any, sizes: Any, bandwidth: float) -> list[Line]:
    """One line for each name, the longest time first."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    lines = [_line(name, times[members], sizes[members], times.sum(), bandwidth) for name, members in groups.items()]
    return sorted(lines, key=lambda line: -line.ms)


def _line(name: str, times: Any, sizes: Any, whole_s: float, bandwidth: float) -> Line:
    taken, moved = float(times.sum()), float(sizes.sum())
    return Line(name, len(times), taken * 1e3, taken / whole_s, moved, moved / bandwidth / max(taken, 1e-9))
