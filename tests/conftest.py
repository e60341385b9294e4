"""Keeps tests out of the user's home: compiled kernels and engine records go to a cache of the project's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parent.parent / ".test-cache"


@pytest.fixture(scope="session", autouse=True)
def project_cache() -> Iterator[None]:
    """XDG_CACHE_HOME of this process and its children. Kept between runs: compiling is most of the tests' time."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
