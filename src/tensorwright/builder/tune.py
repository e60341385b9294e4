"""Gets the times that tactics are chosen by: from the timing cache, and by measuring what is missing there.

It knows when measuring makes sense. How is `measure.py`'s matter, what follows from the times `tactics.py`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tensorwright.builder.measure import ARITHMETIC_BITS, Case, Limits, Stopwatch
from tensorwright.builder.tactics import BUCKETS, Timing, TimingKey, Timings, can_be_timed, candidates, key
from tensorwright.builder.timing_cache import (
    Entry,
    Table,
    default_path,
    entry_name,
    load,
    measuring_alone,
    save,
    table_for,
)
from tensorwright.errors import BuildError, IncompatibleEngineError
from tensorwright.kernels.cpu.compile import compiler_version, find_compiler, kernel_text
from tensorwright.kernels.cpu.processors import processor_name, usable_cores
from tensorwright.kernels.cpu.targets import check_target
from tensorwright.kernels.interface import Kernel, Target
from tensorwright.program.program import Program

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class CacheFiles:
    """Where known times are read, and where all that were used are written; None: the file beside compiled kernels."""

    read: Path | None = None
    write: Path | None = None


@dataclass(frozen=True)
class Tuning:
    """Known times, the machine that they are of and its limits; notes for the user. Empty: nothing is to choose."""

    timings: Timings = field(default_factory=dict)
    machine: str = ""
    limits: Limits | None = None
    notes: tuple[str, ...] = ()


def can_measure(target: Target) -> bool:
    """Whether this machine runs the target's code."""
    try:
        check_target(target)
    except IncompatibleEngineError:
        return False
    return True


def tune(programs: Iterable[Program], target: Target, kernels: Sequence[Kernel], *, measure: bool, files: CacheFiles,
         report: Report) -> Tuning:
    """Times for every op that has a choice. `measure` False: only those that a timing cache has.

    Raises BuildError where an asked for timing cache cannot be written.
    """
    cases = _cases(programs, target, kernels)
    if not cases:
        return Tuning()
    names = _names(cases, target)
    tables, notes = load(files.read or default_path())
    if files.read is not None and not files.read.exists():
        notes.append(f"there is no timing cache {files.read}; it is ignored")
    machine, known = table_for(tables, names.values(), this_machine() if measure else None)
    measured: Table = {}
    if measure and _missing(cases, names, known):
        with measuring_alone():
            known |= table_for(load(files.read or default_path())[0], (), machine)[1]  # another build's, meanwhile
            measured = _measured(_missing(cases, names, known), names, target, report)
    table = {name: entry for name, entry in {**known, **measured}.items()
             if name in {*names.values(), *_limit_names(target).values()}}
    _keep(files.write, machine, table)
    timings = {of: Timing(table[name].value, "measured" if name in measured else "cached")
               for of, name in names.items() if name in table}
    return Tuning(timings, machine if timings else "", _limits(table, target), tuple(notes))


def this_machine() -> str:
    """Processor, threads and compiler: what all times of one table have in common."""
    version = compiler_version(find_compiler()).splitlines()
    return f"{processor_name()}, {usable_cores()} threads, {version[0] if version else 'unknown compiler'}"


def _cases(programs: Iterable[Program], target: Target, kernels: Sequence[Kernel]) -> list[Case]:
    """Ops that can be timed and have a choice, one of each signature."""
    cases: dict[str, Case] = {}
    for program in programs:
        for found in candidates(program, target, kernels):
            if len(found.tactics) > 1 and can_be_timed(found.op, program):
                cases.setdefault(found.signature, Case(found, program))
    return list(cases.values())


def _names(cases: Sequence[Case], target: Target) -> dict[TimingKey, str]:
    """What each time is called in a timing cache."""
    names = {}
    for case in cases:
        found = case.candidates
        for tactic in found.tactics:
            text = kernel_text(found.kernel.source(found.op, case.program, tactic))
            for bucket in BUCKETS:
                of = key(found, tactic, bucket.max_rows)
                names[of] = entry_name(*target.flags, text, of.signature, of.tactic, str(of.rows))
    return names


def _limit_names(target: Target) -> dict[str, str]:
    return {what: entry_name(*target.flags, what) for what in ("read", *map(str, ARITHMETIC_BITS))}


def _missing(cases: Sequence[Case], names: Mapping[TimingKey, str], known: Table) -> list[Case]:
    """Ops of which any time is unknown: their tactics are measured together, in turns, or not at all."""
    return [case for case in cases if any(
        names[key(case.candidates, tactic, bucket.max_rows)] not in known
        for tactic in case.candidates.tactics for bucket in BUCKETS)]


def _measured(cases: Sequence[Case], names: Mapping[TimingKey, str], target: Target, report: Report) -> Table:
    """Entries for all tactics of the ops, and for the machine's limits, which move from hour to hour."""
    if not cases:
        return {}
    report(0, "compiling tactics")
    watch, table = Stopwatch(cases, target, usable_cores()), {}
    before = watch.limits()
    for number, case in enumerate(cases):
        report(0, f"measuring {case.candidates.op.name} ({number + 1} of {len(cases)})")
        for tactic, rows, seconds in watch.times(case):
            of = key(case.candidates, tactic, rows)
            table[names[of]] = Entry(seconds, f"seconds of {_what(case)}, {of.tactic}, {rows} rows")
    return {**table, **_limit_entries(before.best(watch.limits()), target)}


def _limit_entries(limits: Limits, target: Target) -> Table:
    names = _limit_names(target)
    return {names["read"]: Entry(limits.bytes_per_s, "bytes read a second"),
            **{names[str(bits)]: Entry(rate, f"operations a second on weights of {bits} bits")
               for bits, rate in limits.operations_per_s.items()}}


def _limits(table: Table, target: Target) -> Limits | None:
    names = _limit_names(target)
    if any(name not in table for name in names.values()):
        return None
    return Limits(table[names["read"]].value, {bits: table[names[str(bits)]].value for bits in ARITHMETIC_BITS})


def _keep(path: Path | None, machine: str, table: Table) -> None:
    """Only a file that was asked for must be written."""
    if path is not None:
        save(path, machine, table)
    elif table:
        with contextlib.suppress(BuildError):
            save(default_path(), machine, table)


def _what(case: Case) -> str:
    op = case.candidates.op
    shapes = (case.program.weights[name] for name in op.weights.values())
    return " ".join([op.kind, *(f"{weight.dtype} {list(weight.shape)}" for weight in shapes)])
