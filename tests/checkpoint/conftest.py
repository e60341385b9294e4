"""The model folder that most conversions start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorwright.testing import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model")
