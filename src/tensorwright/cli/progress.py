"""Progress of long steps: a bar with bytes and remaining time on a terminal, plain lines elsewhere.

It knows no step: library functions take its `advance` as a plain callable.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tensorwright.cli.tables import format_bytes, format_seconds

LINE_INTERVAL_S = 2.0


class Progress:
    """A context manager; hand its `advance` to library functions as their `report`.

    total_bytes 0 or None: unknown. It may be set later, through `total_bytes`, before the first advance.
    """

    def __init__(self, label: str, total_bytes: int | None = None, *, file: TextIO | None = None) -> None:
        self.label = label
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._file = file or sys.stderr
        self._bar: Any = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        if self._file.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total_bytes or None, desc=self.label, unit="B", unit_scale=True,
                             unit_divisor=1024, file=self._file, dynamic_ncols=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            elapsed = format_seconds(time.monotonic() - self._started)
            size = f", {format_bytes(self.done_bytes)}" if self.done_bytes else ""
            self._print(f"{self.label}: done{size} in {elapsed}")

    def advance(self, num_bytes: int, note: str = "") -> None:
        """That many more bytes are done; `note` says what is being worked on."""
        self.done_bytes += num_bytes
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num_bytes)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            self._print(self._line(now - self._started, note))

    def _line(self, elapsed_s: float, note: str) -> str:
        text = f"{self.label}: {format_bytes(self.done_bytes)}"
        if self.total_bytes:
            text += f" of {format_bytes(self.total_bytes)} ({100 * self.done_bytes // self.total_bytes} %)"
            if 0 < self.done_bytes < self.total_bytes:
                left_s = elapsed_s * (self.total_bytes - self.done_bytes) / self.done_bytes
                text += f", {format_seconds(left_s)} left"
        return f"{text}  {note}".rstrip()

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)
