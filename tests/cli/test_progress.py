"""Progress and tables where there is no terminal, and the numbers people read."""

from __future__ import annotations

import io

import pytest

from tensorwright.cli import progress
from tensorwright.cli.progress import Progress
from tensorwright.cli.tables import format_bytes, format_clock, format_seconds, format_table


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_plain_lines_come_at_most_every_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(monkeypatch), io.StringIO()
    with Progress("convert", 100 << 20, file=file) as bar:
        for layer in range(100):
            clock.now += 0.25
            bar.advance(1 << 20, f"layer {layer}")
    lines = file.getvalue().splitlines()
    assert len(lines) == 13  # 25 seconds, and the last line
    assert lines[0] == "convert: 8.0 MiB of 100.0 MiB (8 %), 23 s left  layer 7"
    assert lines[-1] == "convert: done, 100.0 MiB in 25 s"


def test_an_unknown_total_and_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(monkeypatch), io.StringIO()
    with pytest.raises(KeyError), Progress("load", file=file) as bar:
        clock.now += 3
        bar.advance(512)
        raise KeyError
    assert file.getvalue() == "load: 512 B\n"


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    with Progress("build", 2048, file=file) as bar:
        bar.advance(2048, "kernels")
    assert "build: 100%" in file.getvalue()
    assert "2.00k/2.00k" in file.getvalue()


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (7 << 30, "7.0 GiB"),
                                             (3 << 50, "3072.0 TiB")])
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text", "clock"), [(0.04, "0.0 s", "00:00:00"), (59, "59 s", "00:00:59"),
                                                        (185.2, "3 min 05 s", "00:03:05"),
                                                        (3720, "1 h 02 min", "01:02:00")])
def test_durations(seconds: float, text: str, clock: str) -> None:
    assert format_seconds(seconds) == text
    assert format_clock(seconds) == clock


def test_tables_align_numbers_to_the_right() -> None:
    table = format_table("Title", [("a", "1", "x"), ("long", "100")], header=("name", "count", "what"))
    assert table.splitlines() == ["Title", "  name  count  what", "  a         1  x", "  long    100"]
