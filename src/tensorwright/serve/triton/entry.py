"""The file that Triton's Python backend imports as model.py. It only hands Triton's calls to the package beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found, unused-ignore]  # Triton has it

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this version's runtime comes before an installed one

from tensorwright.serve.triton.model import Model  # noqa: E402


class TritonPythonModel:
    """The name and methods that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine."""
        self.model = Model(pb_utils, args)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests and return at once; answers are sent when they are ready."""
        self.model.execute(requests)

    def finalize(self) -> None:
        """End what is running and unload the engine."""
        self.model.close()
