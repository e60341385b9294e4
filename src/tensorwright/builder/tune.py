"""Gets the times that tactics are chosen by: from the timing cache, and by measuring what is missing there.

It knows when measuring makes sense. How is `measure.py`'s matter, what follows from the times `tactics.py`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tensorwright.builder.clock import Case, Clock, Limits
from tensorwright.builder.tactics import Timing, TimingKey, Timings
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
from tensorwright.errors import BuildError
from tensorwright.kernels.interface import Target
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


def tune(programs: Iterable[Program], target: Target, clock: Clock, *, measure: bool, files: CacheFiles,
         report: Report, shipped: Sequence[Path] = ()) -> Tuning:
    """Times for all that has a choice. `measure` False: only those that a timing cache has, the user's or a `shipped`.

    Raises BuildError where an asked for timing cache cannot be written.
    """
    cases = clock.cases(programs, target)
    if not cases:
        return Tuning()
    names = _names(cases, target, clock)
    tables, notes = load(files.read or default_path())
    if files.read is not None and not files.read.exists():
        notes.append(f"there is no timing cache {files.read}; it is ignored")
    machine, known = table_for(tables, names.values(), clock.machine() if measure else None)
    if not measure and not any(name in known for name in names.values()):
        machine, known = _shipped(shipped, names)
    measured: Table = {}
    if measure and _missing(cases, names, known):
        with measuring_alone():
            known |= table_for(load(files.read or default_path())[0], (), machine)[1]  # another build's, meanwhile
            measured = _measured(_missing(cases, names, known), names, target, clock, report)
    limit_names = _limit_names(target, clock)
    table = {name: entry for name, entry in {**known, **measured}.items()
             if name in {*names.values(), *limit_names.values()}}
    _keep(files.write, machine, table)
    timings = {of: Timing(table[name].value, "measured" if name in measured else "cached")
               for of, name in names.items() if name in table}
    return Tuning(timings, machine if timings else "", _limits(table, limit_names), tuple(notes))


def _shipped(files: Sequence[Path], names: Mapping[TimingKey, str]) -> tuple[str, Table]:
    """The machine that knows most, of those whose times come with the package."""
    tables = {machine: table for file in files for machine, table in load(file)[0].items()}
    return table_for(tables, names.values(), None)


def _names(cases: Sequence[Case], target: Target, clock: Clock) -> dict[TimingKey, str]:
    """What each time is called in a timing cache."""
    texts = {source: clock.code(source) for case in cases for source in case.ways.values()}
    return {of: entry_name(*target.flags, texts[source], of.signature, of.tactic, str(of.rows))
            for case in cases for of, source in case.ways.items()}


def _limit_names(target: Target, clock: Clock) -> dict[str, str]:
    return {what: entry_name(*target.flags, what) for what in ("read", *map(str, clock.arithmetic_bits))}


def _missing(cases: Sequence[Case], names: Mapping[TimingKey, str], known: Table) -> list[Case]:
    """Those of which any time is unknown: their ways are measured together, in turns, or not at all."""
    return [case for case in cases if any(names[of] not in known for of in case.ways)]


def _measured(cases: Sequence[Case], names: Mapping[TimingKey, str], target: Target, clock: Clock,
              report: Report) -> Table:
    """Entries for all ways, and for the machine's limits, which move from hour to hour."""
    if not cases:
        return {}
    report(0, "compiling tactics")
    watch, table = clock.start(cases, target), {}
    before = watch.limits()
    for number, case in enumerate(cases):
        report(0, f"measuring {case.title} ({number + 1} of {len(cases)})")
        for of, seconds in watch.times(case):
            table[names[of]] = Entry(seconds, f"seconds of {case.what}, {of.tactic}, {of.rows} rows")
    return {**table, **_limit_entries(before.best(watch.limits()), _limit_names(target, clock))}


def _limit_entries(limits: Limits, names: Mapping[str, str]) -> Table:
    return {names["read"]: Entry(limits.bytes_per_s, "bytes read a second"),
            **{names[str(bits)]: Entry(rate, f"operations a second on weights of {bits} bits")
               for bits, rate in limits.operations_per_s.items()}}


def _limits(table: Table, names: Mapping[str, str]) -> Limits | None:
    if any(name not in table for name in names.values()):
        return None
    rates = {int(what): table[name].value for what, name in names.items() if what != "read"}
    return Limits(table[names["read"]].value, rates)


def _keep(path: Path | None, machine: str, table: Table) -> None:
    """Only a file that was asked for must be written."""
    if path is not None:
        save(path, machine, table)
    elif table:
        with contextlib.suppress(BuildError):
            save(default_path(), machine, table)
