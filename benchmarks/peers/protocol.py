"""What is measured of an engine, the same for all; it knows none of them.

It runs inside the engine's own environment, in a fresh process for each batch size, and needs nothing but the standard
library. The engine's file opens it and answers prompts; here it is timed. Every token is reported with the moment at
which the program had it: what is made of these moments is `cpu_peers.py`'s business.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

STEP_TOKENS = 512  # prompts go through every engine in steps of at most so many tokens
SHORT_PROMPT = 16
WARM_UP_TOKENS = 4

Event = tuple[int, float, int]  # sequence, moment in seconds, new tokens


@dataclass(frozen=True)
class Settings:
    """One measurement: an engine opened for so many sequences of so many tokens."""

    model: Path
    threads: int
    batch: int
    input_len: int
    output_len: int
    vocab_size: int
    seed: int

    @property
    def length(self) -> int:
        """Tokens of one sequence, prompt and answer."""
        return max(self.input_len, SHORT_PROMPT) + max(self.output_len, WARM_UP_TOKENS)


class Engine(Protocol):
    """An opened engine."""

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[Event]:
        """Answer the prompts together, greedily, never stopping early; nothing is kept from earlier prompts."""


def measure(open_engine: Callable[[Settings], Engine], settings: Settings) -> dict[str, Any]:
    """Open, answer a short prompt, warm up, answer the batch. Seconds count from the opening or from the request."""
    source = random.Random(settings.seed)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[source.randrange(3, settings.vocab_size) for _ in range(length)] for _ in range(count)]

    memory_before = memory_bytes("VmRSS")
    started = time.perf_counter()
    engine = open_engine(settings)
    open_s = time.perf_counter() - started
    first_token_s = engine.run(prompts(1, SHORT_PROMPT), 1)[0][1] - started
    engine.run(prompts(settings.batch, SHORT_PROMPT), WARM_UP_TOKENS)
    engine.run(prompts(1, settings.input_len), 1)
    batch = prompts(settings.batch, settings.input_len)
    started = time.perf_counter()
    events = engine.run(batch, settings.output_len)
    _check(events, settings)
    return {"open_s": open_s, "open_to_first_token_s": first_token_s, "memory_before_bytes": memory_before,
            "peak_memory_bytes": memory_bytes("VmHWM"),
            "events": [(sequence, moment - started, count) for sequence, moment, count in events]}


def memory_bytes(field: str) -> int:
    """Resident memory of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main(open_engine: Callable[[Settings], Engine]) -> None:
    """Measure what the command line says; the figures are the last line of the output, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    for name in ("threads", "batch", "input_len", "output_len", "vocab_size", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    figures = measure(open_engine, Settings(**vars(parser.parse_args())))
    print(json.dumps(figures), flush=True)


def _check(events: list[Event], settings: Settings) -> None:
    """Equal work: every sequence must have answered in full."""
    for sequence in range(settings.batch):
        count = sum(tokens for owner, _, tokens in events if owner == sequence)
        if count != settings.output_len:
            raise RuntimeError(f"sequence {sequence} answered {count} tokens; {settings.output_len} were asked for")
