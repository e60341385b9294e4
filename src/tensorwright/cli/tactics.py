"""The tables of an engine's tactics, for `build` and `inspect --tactics`. It reads a manifest and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorwright.cli.tables import print_table

HEADER = ("", "rows", "tactic", "ms", "of limit", "next best", "from")
MEANING = {"model": "rule"}


def print_tactics(tuning: Mapping[str, Any], *, every_bucket: bool) -> None:
    """What was chosen and why; nothing where no op has a choice. Without `every_bucket`, one line for equal tactics."""
    groups = tuning.get("groups", ())
    if groups:
        rows = [row for group in groups for row in _rows(group, every_bucket)]
        print_table(f"Tactics{_machine(tuning)}", rows, header=HEADER)


def _machine(tuning: Mapping[str, Any]) -> str:
    if not tuning.get("machine"):
        return ", by rule: nothing was measured"
    rate = tuning.get("bytes_per_s")
    return f" on {tuning['machine']}" + (f"; memory {rate / 1e9:.1f} GB/s" if rate else "")


def _rows(group: Mapping[str, Any], every_bucket: bool) -> list[tuple[str, ...]]:
    name = f"{group['name']} x{len(group['ops'])}"
    rows, picks = [], group["picks"]
    first = 1
    for pick, following in zip(picks, [*picks[1:], None], strict=True):
        if every_bucket or following is None or following["tactic"] != pick["tactic"]:
            span = f"{first} and more" if following is None else f"{first} to {pick['max_rows']}"
            rows.append((name, span, *_cells(pick)))
            first, name = pick["max_rows"] + 1, ""
    return rows


def _cells(pick: Mapping[str, Any]) -> Sequence[str]:
    """Times are of the pick's largest number of rows."""
    seconds, limit_s, other = pick["seconds"], pick["limit_s"], pick["next_best"]
    return (pick["tactic"], "" if seconds is None else f"{seconds * 1e3:.3f}",
            "" if seconds is None or limit_s is None else f"{limit_s / seconds:.0%}",
            "" if other is None else f"{other[1] / seconds - 1:+.0%} {other[0]}",
            MEANING.get(pick["why"], pick["why"]))
