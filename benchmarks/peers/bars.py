"""Bars: a figure of every engine beside what was asked of ours, as JSON and as a table. It measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

OURS = "tensorwright"
NAMES = {"llama.cpp": "llama.cpp", "openvino": "OpenVINO", "vllm_int4": "vLLM int4", "vllm_fp8": "vLLM fp8",
         OURS: "Tensorwright"}  # in the order of a table's columns


@dataclass(frozen=True)
class Bar:
    """A figure of every engine, and what was asked of ours: at least, or at most where low is good. None: nothing."""

    title: str
    unit: str
    values: Mapping[str, float]
    must: float | None = None
    aim: float | None = None
    high_is_good: bool = True

    @property
    def result(self) -> str:
        """Which goal was reached and by how much; a ratio above 1 is better than the goal. The aim needs the must."""
        value = self.values.get(OURS)
        if value is None:
            return "not measured"
        aim = None if self.aim is None else self._against(value, self.aim)
        if self.must is None:
            return "not judged" if aim is None else f"aim {'reached' if aim >= 1 else 'missed'}: {aim:.2f} × aim"
        must = self._against(value, self.must)
        if must < 1:
            return f"missed: {must:.2f} × must"
        if aim is None:
            return f"reached: {must:.2f} × must"
        return f"aim reached: {aim:.2f} × aim" if aim >= 1 else f"must reached: {must:.2f} ×; aim missed: {aim:.2f} ×"

    @property
    def ratio(self) -> float | None:
        """How many times better than the better peer."""
        peers = [value for name, value in self.values.items() if name != OURS]
        if OURS not in self.values or not peers:
            return None
        return self._against(self.values[OURS], max(peers) if self.high_is_good else min(peers))

    def _against(self, value: float, other: float) -> float:
        return value / other if self.high_is_good else other / value

    def to_json(self) -> dict[str, Any]:
        """The fields, and what follows from them for those who read the file."""
        return {**asdict(self), "ratio": self.ratio, "result": self.result}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Bar:
        """The inverse of `to_json`."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def markdown(table: Sequence[Bar]) -> str:
    """The bars as a table; columns of engines that have no figure are left out."""
    shown = [name for name in NAMES if any(name in bar.values for bar in table)]
    has_peers = any(bar.ratio is not None for bar in table)
    header = ["", *(NAMES[name] for name in shown), *(["against the better"] * has_peers), "must", "aim", "result"]
    lines = [_row(header), "|" + "---|" * len(header)]
    for bar in table:
        values = [_number(bar.values.get(name)) for name in shown]
        ratio = ["–" if bar.ratio is None else f"{bar.ratio:.2f} ×"] * has_peers
        sign = "≥ " if bar.high_is_good else "≤ "
        goals = ["–" if goal is None else sign + _number(goal) for goal in (bar.must, bar.aim)]
        lines.append(_row([f"{bar.title}, {bar.unit}", *values, *ratio, *goals, bar.result]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
