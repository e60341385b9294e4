"""Conversions of tiny models in tests, and ways to change a model before. It knows no expectations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tensorwright.checkpoint.convert import ConvertOptions, ConvertReport, convert
from tensorwright.testing import tiny

Weights = dict[str, NDArray[Any]]


def quiet(num_bytes: int, what: str) -> None:
    """Nobody watches."""


def run(model: Path, output: Path, **options: Any) -> ConvertReport:
    """A conversion to float32, if the options do not say otherwise."""
    return convert(model, output, ConvertOptions(**{"dtype": "float32", **options}), quiet)


def rewrite(model: Path, change: Callable[[Weights], None], description: tiny.TinyModel | None = None) -> None:
    """The model's weights after a change."""
    weights = tiny.tensors(description or tiny.TinyModel())
    change(weights)
    tiny.write_weights(model, weights)


def change_config(model: Path, **fields: Any) -> None:
    """The model's config.json with other fields."""
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")
