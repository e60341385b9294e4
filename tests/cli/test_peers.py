"""The table of bars of `benchmarks/cpu_peers.py`: verdicts, and what stays when a section is measured anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import cpu_peers

    return cpu_peers


@pytest.mark.parametrize(("value", "must", "aim", "high_is_good", "result"), [
    (9.0, 10.0, 12.0, True, "missed: 0.90 × must"),
    (11.0, 10.0, 12.0, True, "must reached: 1.10 ×; aim missed: 0.92 ×"),
    (12.0, 10.0, 12.0, True, "aim reached: 1.00 × aim"),
    (10.0, 10.0, None, True, "reached: 1.00 × must"),
    (2.0, 1.0, 0.5, False, "missed: 0.50 × must"),
    (0.5, 1.0, 0.5, False, "aim reached: 1.00 × aim"),
    (5.0, None, None, True, "not judged"),
])
def test_a_bar_says_what_was_reached(peers: ModuleType, value: float, must: float | None, aim: float | None,
                                     high_is_good: bool, result: str) -> None:
    bar = peers.Bar("speed", "tok/s", {"tensorwright": value, "openvino": 8.0}, must, aim, high_is_good)
    assert bar.result == result
    assert bar.ratio == (value / 8 if high_is_good else 8 / value)
    assert peers.Bar.from_json(json.loads(json.dumps(bar.to_json()))) == bar


def test_goals_follow_from_the_peers_of_the_same_run(peers: ModuleType) -> None:
    found = {name: {batch: {"prefill_tok_s": speed, "decode_tok_s": speed, "limit_share": 0.5} for batch in (1, 8, 16)}
             for name, speed in (("tensorwright", 100.0), ("openvino", 50.0), ("llama.cpp", 20.0))}
    bars = list(peers.comparison.figures.speed_bars(found))
    assert [(bar.must, bar.aim) for bar in bars] == [(52.0, 60.0), (62.5, 190.0), (80.0, 100.0), (75.0, 90.0)]


def test_a_section_that_is_measured_anew_leaves_the_others(peers: ModuleType, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"int8": 1.0, "build": 2.0}

    def measure(name: str, *_: Any) -> tuple[dict[str, Any], list[Any]]:
        return {}, [peers.Bar(f"of {name}", "s", {"tensorwright": speeds[name]}, 4.0)]

    monkeypatch.setattr(peers, "measure_section", measure)
    command = ["cpu_peers.py", "--json", str(file := tmp_path / "r.json"), "--work", str(tmp_path)]
    for sections in ("int8,build", "build"):
        monkeypatch.setattr(sys, "argv", [*command, "--sections", sections])
        assert peers.main() == 0
        speeds["int8"], speeds["build"] = 10.0, 20.0
    sections = json.loads(file.read_text())["sections"]
    assert {name: part["bars"][0]["values"]["tensorwright"] for name, part in sections.items()} == {
        "int8": 1.0, "build": 20.0}
    assert sections["int8"]["command"].endswith("--sections int8,build")
    assert "| of build, s | 20 | ≥ 4 | – | reached: 5.00 × must |" in capsys.readouterr().out


def test_an_unknown_section_is_refused(peers: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py", "--sections", "peers_U"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "peers_S" in capsys.readouterr().err
