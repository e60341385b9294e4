"""On which GPU, with which driver and packages figures were taken."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from tensorwright.cli.machine import first_line

PACKAGES = ("torch", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy")


def gpu_conditions() -> dict[str, Any]:
    """As nvidia-smi and the packages tell; "none" and "missing" where there is nothing."""
    fields = "name,driver_version,compute_cap,memory.total"
    answer = first_line("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    name, driver, capability, memory = ([word.strip() for word in (answer or "none,,,").split(",")] + [""] * 3)[:4]
    return {"gpu": {"name": name, "driver": driver, "compute_capability": capability, "memory": memory},
            "packages": {package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
