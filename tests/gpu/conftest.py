"""Tests that need an NVIDIA GPU: `make test-gpu` runs them; without one they are skipped, saying what they need."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tensorwright.kernels.cuda.targets import has_gpu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("torch", "cuda.bindings") if not _is_installed(name)]
    reason = "needs an NVIDIA GPU" if not has_gpu() else f"needs {' and '.join(missing)}" if missing else ""
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
