"""A file of sections, each measured when it was asked for: what is measured anew leaves the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_results(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The sections of the file, none where there is no such file or one of an earlier form."""
    if not path.exists():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text()).get("sections", {})
    return {name: sections[name] for name in names if name in sections}


def write_results(path: Path, names: Sequence[str], results: Mapping[str, Any]) -> None:
    """All sections, in the order of the names."""
    write(path, json.dumps({"sections": {name: results[name] for name in names if name in results}}, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """The file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
