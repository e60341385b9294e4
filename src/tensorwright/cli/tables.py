"""Plain tables and numbers with units for people. It knows no subject."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO


def print_table(title: str, rows: Sequence[tuple[str, ...]], *, header: tuple[str, ...] | None = None,
                file: TextIO | None = None) -> None:
    """A title and aligned columns: the first to the left, numbers to the right."""
    print(format_table(title, rows, header=header), file=file or sys.stdout)


def format_table(title: str, rows: Sequence[tuple[str, ...]], *, header: tuple[str, ...] | None = None) -> str:
    """What `print_table` prints. Rows may have fewer cells than the widest one."""
    table = [header, *rows] if header else list(rows)
    columns = max((len(row) for row in table), default=0)
    cells = [[*row, *[""] * (columns - len(row))] for row in table]
    widths = [max(len(row[c]) for row in cells) for c in range(columns)]
    right = [c > 0 and all(_is_number(row[c]) for row in cells[1 if header else 0:]) for c in range(columns)]
    lines = ["  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
             for row in cells]
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)] if title else
                     [line.rstrip() for line in lines])


def format_bytes(count: float) -> str:
    """A size such as "512 B" or "6.9 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration such as "4.2 s", "3 min 05 s" or "1 h 02 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_clock(seconds: float) -> str:
    """A duration as HH:MM:SS, the form of the log lines that people search for."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _is_number(cell: str) -> bool:
    return cell == "" or cell[0].isdigit() or (cell[0] in "-+<" and cell[1:2].isdigit())
