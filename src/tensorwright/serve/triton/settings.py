"""How one deployed model behaves, and how that travels in config.pbtxt. It knows neither engines nor Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorwright.errors import UsageError


@dataclass(frozen=True)
class ServeSettings:
    """Chosen at deployment, read again by the model when Triton loads it. Durations in seconds, 0 switches off."""

    decoupled: bool = True
    request_timeout_s: float = field(default=600.0, metadata={
        "help": "deadline of a request that does not stream, 0 for none: Triton does not report when its client "
                "leaves"})
    opening_event_s: float = field(default=1.0, metadata={
        "help": "a stream without a token for so long gets one event with empty text, 0 for never: before its first "
                "event Triton does not report that a client left"})
    exclude_input_in_output: bool = field(default=False, metadata={
        "help": "answers of /generate without the prompt, unless a request says otherwise"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of the engine (default: every core)"})
    max_kv_tokens: int | None = field(default=None, metadata={
        "help": "tokens that the KV cache holds (default: a share of the free memory)",
        "flags": ("--max_tokens_in_paged_kv_cache",)})
    kv_cache_fraction: float = field(default=0.9, metadata={
        "help": "share of the free memory for the KV cache", "flags": ("--kv_cache_free_gpu_memory_fraction",)})
    block_reuse: bool = field(default=True, metadata={
        "help": "keep KV blocks of common prefixes", "flags": ("--enable_kv_cache_reuse",)})

    def __post_init__(self) -> None:
        if self.request_timeout_s < 0 or self.opening_event_s < 0:
            raise UsageError("request_timeout_s and opening_event_s must be 0 (off) or more seconds")
        if not 0 < self.kv_cache_fraction <= 1:
            raise UsageError(f"kv_cache_fraction must be above 0 and at most 1; got {self.kv_cache_fraction}")
        for name in ("threads", "max_kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more; got {value}")

    def to_parameters(self) -> dict[str, str]:
        """Each field as the text that config.pbtxt holds; None is the empty text."""
        return {name: "" if value is None else str(value).lower() for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServeSettings:
        """The settings in a config.pbtxt, where a person may have edited them. Missing ones keep their default.

        Raises:
            UsageError: a text that is no number or truth value.
        """
        readers: dict[str, Callable[[str], Any]] = {
            "bool": _truth, "float": float, "int | None": lambda text: int(text) if text else None}
        given: dict[str, Any] = {}
        for entry in dataclasses.fields(cls):
            if entry.name not in parameters:
                continue
            text = parameters[entry.name]
            try:
                given[entry.name] = readers[str(entry.type)](text)
            except ValueError:
                raise UsageError(f"{entry.name} in config.pbtxt must be {entry.type}; got {text!r}") from None
        return cls(**given)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
