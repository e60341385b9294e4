"""Tensorwright: convert a Hugging Face checkpoint, build an engine for one machine, run and serve it.

Public names are loaded on first use, so that `tensorwright --help` imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParameters", "__version__"]

if TYPE_CHECKING:
    from tensorwright.runtime.async_llm import AsyncLLM
    from tensorwright.runtime.llm import LLM
    from tensorwright.runtime.parameters import SamplingParameters

_HOMES = {"LLM": "llm", "AsyncLLM": "async_llm", "SamplingParameters": "parameters"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tensorwright' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"tensorwright.runtime.{_HOMES[name]}"), name)
