"""Where the time of a prompt and of a decode step goes: per kind of op, and the layers that fall behind their like.

The times are those of the very steps that `bench` measures, so that ops, sampling and the rest (scheduling, Python) sum
to the measured step. How much can be named is the engine's `--profiling_verbosity`: none gives totals per kernel,
layer_names_only the names of ops too, detailed their tactics as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.cli.roofline import Work, total
from tensorwright.cli.tables import print_table
from tensorwright.engine.engine import Engine
from tensorwright.runtime.batch import Batch, Drawn, Floats, SamplingRow
from tensorwright.runtime.communicator import Communicator
from tensorwright.runtime.executor import CpuExecutor

STANDS_OUT = 1.3  # times the median of the ops of its name
SMALLEST_SHARE = 0.002  # of the whole: what takes less is not worth a line
MAX_OUTLIERS = 10

Times = NDArray[np.float64]


@dataclass(frozen=True)
class StepRecord:
    """One step: its tokens, those that got logits, and the seconds of each op and of sampling."""

    num_tokens: int
    num_outputs: int
    op_s: Times
    sampling_s: Times  # [1]


class RecordingExecutor(CpuExecutor):
    """An executor that notes where every step's time goes; reading the clock takes some microseconds of a step."""

    def __init__(self, engine: Engine, *, num_blocks: int, threads: int | None = None,
                 communicator: Communicator | None = None) -> None:
        super().__init__(engine, num_blocks=num_blocks, threads=threads, communicator=communicator)
        self.records: list[StepRecord] = []

    def execute(self, batch: Batch, *, step_seconds: Times | None = None) -> Floats:
        """As always, with a record."""
        record = StepRecord(len(batch.token_ids), len(batch.output_rows), np.zeros(len(self.program.ops)), np.zeros(1))
        self.records.append(record)
        return super().execute(batch, step_seconds=record.op_s)

    def sample(self, logits: Floats, rows: Sequence[SamplingRow]) -> Drawn:
        """As always, timed."""
        started = time.perf_counter()
        result = super().sample(logits, rows)
        self.records[-1].sampling_s[0] += time.perf_counter() - started
        return result


@dataclass(frozen=True)
class Line:
    """One op, or all ops of a name: how many, their time, work, and shares of the whole and of the machine's limit."""

    name: str
    count: int
    ms: float
    share: float
    bytes: float
    operations: float
    share_of_limit: float


def profile_prefill(engine: Engine, records: Sequence[StepRecord], works: Sequence[Work], length: int,
                    measured_s: float) -> dict[str, Any]:
    """Requests for one token each: the first warms up, the others took `measured_s`; `works` [ops] of all chunks."""
    ends = [index + 1 for index, record in enumerate(records) if record.num_outputs]
    prompts = [records[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]
    op_s = np.median([np.sum([step.op_s for step in prompt], axis=0) for prompt in prompts], axis=0)
    sampling_s = float(np.median([sum(float(step.sampling_s[0]) for step in prompt) for prompt in prompts]))
    return {"phase": "prefill", "batch": 1, "length": length,
            **_profile(engine, op_s, op_s, sampling_s, works, measured_s, (length, 1))}


def profile_decode(engine: Engine, records: Sequence[StepRecord], works: Sequence[Work], batch: int, length: int,
                   measured_s: float) -> dict[str, Any]:
    """The steps in which all of `batch` sequences decode, on average; `works` [ops] of one of them."""
    steps = [record for record in records if record.num_tokens == record.num_outputs == batch]
    op_s, usual_s = (reduce([step.op_s for step in steps], axis=0) for reduce in (np.mean, np.median))
    sampling_s = float(np.mean([step.sampling_s[0] for step in steps]))
    return {"phase": "decode", "batch": batch, "length": length,
            **_profile(engine, op_s, usual_s, sampling_s, works, measured_s, (batch, batch))}


def _profile(engine: Engine, op_s: Times, usual_s: Times, sampling_s: float, works: Sequence[Work],
             measured_s: float, rows: tuple[int, int]) -> dict[str, Any]:
    """The lines; `rows` of tokens and of outputs. Layers are compared by usual times, not by one disturbed step."""
    verbosity = engine.config["build_config"].get("profiling_verbosity", "layer_names_only")
    groups, whole = _groups(_group_names(engine, verbosity)), float(op_s.sum())
    lines = [_line(name, op_s[members], [works[i] for i in members], measured_s) for name, members in groups.items()]
    outliers = [] if verbosity == "none" else find_outliers(usual_s, groups.values())
    return {"measured_ms": measured_s * 1e3, "kernels_ms": whole * 1e3, "sampling_ms": sampling_s * 1e3,
            "rest_ms": (measured_s - whole - sampling_s) * 1e3, "verbosity": verbosity,
            "kinds": [asdict(line) for line in sorted(lines, key=lambda line: -line.ms)],
            "outliers": [asdict(_line(_name(engine, verbosity, i, rows), usual_s[[i]], [works[i]], measured_s))
                         for i in outliers]}


def find_outliers(times: Times, groups: Iterable[Sequence[int]]) -> list[int]:
    """Ops that take far longer than the median of their group, the longest first; of a group of one there are none."""
    found = []
    for members in groups:
        usual = float(np.median(times[members]))
        found += [i for i in members if times[i] > STANDS_OUT * usual and times[i] > SMALLEST_SHARE * times.sum()]
    return sorted(found, key=lambda i: -float(times[i]))[:MAX_OUTLIERS]


def print_profile(profile: dict[str, Any]) -> None:
    """The tables of one phase and batch size."""
    what = (f"Prefill of {profile['length']} tokens" if profile["phase"] == "prefill" else
            f"One decode step, batch {profile['batch']}, {profile['length']} tokens each")
    whole_ms = profile["measured_ms"]
    header = ("", "ops", "ms", "share", "GB/s", "GOP/s", "of limit")
    ends = [("all kernels", "kernels_ms"), ("sampling", "sampling_ms"), ("scheduling and Python", "rest_ms"),
            ("measured", "measured_ms")]
    rows = [*_rows(profile["kinds"]), *((words, "", f"{profile[name]:.3f}", f"{profile[name] / whole_ms:.1%}")
                                        for words, name in ends)]
    print_table(f"\n{what}", rows, header=header)
    if profile["outliers"]:
        print_table(f"\nOver {STANDS_OUT} times the median of their like", _rows(profile["outliers"]), header=header)
    if profile["verbosity"] == "none":
        print("Built with --profiling_verbosity none: ops have no names.")


def _rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(line["name"], str(line["count"]), f"{line['ms']:.3f}", f"{line['share']:.1%}",
             f"{line['bytes'] / line['ms'] / 1e6:.1f}", f"{line['operations'] / line['ms'] / 1e6:.0f}",
             f"{line['share_of_limit']:.0%}") for line in lines]


def _group_names(engine: Engine, verbosity: str) -> list[str]:
    if verbosity == "none":
        return [step.kernel for step in engine.steps]
    return [f"{op.kind} {op.name.rpartition('.')[2]}" if op.kind == "linear" else op.kind for op in engine.program.ops]


def _name(engine: Engine, verbosity: str, index: int, rows: tuple[int, int]) -> str:
    step, y = engine.steps[index], engine.program.buffers[engine.program.ops[index].outputs[0]]
    if verbosity != "detailed":
        return step.op
    parameters = step.at(rows[y.shape[0] == "outputs"]).parameters
    tactic = " ".join([step.layout, *(f"{key}={value}" for key, value in parameters.items())])
    return f"{step.op} ({step.kernel} {tactic})"


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    return groups


def _line(name: str, times: Times, works: Sequence[Work], whole_s: float) -> Line:
    taken, work = max(float(times.sum()), 1e-9), total(works)
    return Line(name, len(works), taken * 1e3, taken / whole_s, work.bytes, work.operations, work.limit_s / taken)
