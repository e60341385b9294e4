"""The timing cache's file: kept whole, merged, and never trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorwright.builder.timing_cache import FORMAT, Entry, load, save, table_for
from tensorwright.errors import BuildError

FIRST, SECOND = {"a": Entry(1e-3, "seconds of x")}, {"b": Entry(2.0, "of y")}


def test_entries_are_added_machine_by_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "timings.json"
    save(path, "this", FIRST)
    save(path, "that", SECOND)
    save(path, "this", {"a": Entry(5e-3, "again"), "c": Entry(1.0, "z")})
    tables, notes = load(path)
    assert notes == []
    assert tables == {"this": {"a": Entry(5e-3, "again"), "c": Entry(1.0, "z")}, "that": SECOND}
    assert [file.name for file in path.parent.iterdir()] == ["timings.json"]


def test_no_file_is_no_times(tmp_path: Path) -> None:
    assert load(tmp_path / "none.json") == ({}, [])


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", '{"format": "another", "machines": {}}', f'{{"format": "{FORMAT}"}}',
    f'{{"format": "{FORMAT}", "machines": {{"m": 3}}}}', "[" * 100_000])
def test_a_damaged_file_is_ignored_and_replaced(content: str, tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    path.write_text(content)
    tables, (note,) = load(path)
    assert tables == {}
    assert f"{path} is ignored" in note
    save(path, "m", FIRST)
    assert load(path) == ({"m": FIRST}, [])


def test_entries_without_sense_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    bad = {str(index): value for index, value in enumerate(
        [None, [1.0], [0, "x"], [-1.0, "x"], [float("nan"), "x"], [float("inf"), "x"], [True, "x"], ["1", "x"]])}
    path.write_text(json.dumps({"format": FORMAT, "machines": {"m": {"good": [1, "x"], **bad}}}))
    tables, notes = load(path)
    assert tables == {"m": {"good": Entry(1.0, "x")}}
    assert notes == [f"the timing cache {path} has {len(bad)} entries that make no sense; they are ignored"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be written"):
        save(tmp_path / "file" / "timings.json", "m", FIRST)


def test_a_build_for_another_machine_takes_the_table_that_knows_most() -> None:
    tables = {"this": FIRST, "that": {**FIRST, **SECOND}}
    assert table_for(tables, ["a", "b"], None) == ("that", tables["that"])
    assert table_for(tables, ["a", "b"], "this") == ("this", FIRST)
    assert table_for(tables, ["a"], "unknown") == ("unknown", {})
    assert table_for({}, ["a"], None) == ("", {})
