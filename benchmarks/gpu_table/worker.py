"""Measures one engine in a process of its own, through `LLM.generate` with prompts of random token ids.

It reads one line of JSON from stdin: {"engine": folder, "figures": [...], "new_tokens": n, "repeats": r}, and prints a
line of JSON for each figure. Imports come before the line is read, so that a process may be ready before its turn.

    limits                      bytes read and 16-bit operations per second that torch reaches on this GPU
    memory                      weights and their embedding, bytes of one cached token, tokens that the cache holds
    tpot:BATCH:IN               (time of n + 1 tokens − time of 1) / n
    prefill:BATCH:IN            time of one token each
    serving:REQUESTS:IN:OUT     all requests at once; the engine's max_batch_size are served together
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tensorwright.cli.bench import random_prompts
from tensorwright.cli.gpu_limits import multiply_rate, read_rate
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters

WARM_UP_TOKENS = 24  # steps are recorded when they come for the second time


def main() -> int:
    """Measure what the line asks for; a figure that fails says so and the next one follows."""
    import torch

    torch.set_num_threads(1)
    job = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    meter = Meter(LLM(Path(job["engine"]), block_reuse=False), job["new_tokens"], job["repeats"])
    say("open", {"seconds": time.perf_counter() - started})
    for figure in job["figures"]:
        name, *numbers = figure.split(":")
        begun = time.perf_counter()
        try:
            found = getattr(meter, name)(*map(int, numbers))
        except Exception as error:  # whatever it was, the other figures are still wanted
            found = {"failure": repr(error)}
        say(figure, {**found, "took_s": time.perf_counter() - begun})
    return 0


def say(figure: str, found: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps({"figure": figure, **found}), flush=True)


class Meter:
    """An open engine; each method is a figure."""

    def __init__(self, llm: LLM, new_tokens: int, repeats: int) -> None:
        self._llm, self._new_tokens, self._repeats = llm, new_tokens, repeats
        self._seed = 0

    def limits(self) -> dict[str, Any]:
        """What torch reaches: a streaming read, and a product of float16 matrices."""
        return {"read_bytes_s": read_rate(), "float16_operations_s": multiply_rate()}

    def memory(self) -> dict[str, Any]:
        """Sizes that a step's bytes follow from."""
        engine = self._llm.engine
        sizes = {entry["name"]: entry["bytes"] for entry in engine.manifest["weights"]}
        table = sum(size for name, size in sizes.items() if name.endswith("vocab_embedding"))
        return {"weight_bytes": sum(sizes.values()), "embedding_bytes": table,
                "kv_bytes_per_token": engine.kv_bytes_per_token, "table": self._llm.memory_table()}

    def tpot(self, batch: int, input_len: int) -> dict[str, Any]:
        """Seconds of a decode step, and of the first tokens."""
        self._time(batch, input_len, WARM_UP_TOKENS)
        first = [self._time(batch, input_len, 1) for _ in range(self._repeats)]
        all_tokens = [self._time(batch, input_len, self._new_tokens + 1) for _ in range(self._repeats)]
        tpot_s = (statistics.median(all_tokens) - statistics.median(first)) / self._new_tokens
        return {"tpot_s": tpot_s, "tokens_s": batch / tpot_s, "first_s": first, "all_s": all_tokens,
                "mean_context": input_len + 1 + self._new_tokens / 2}

    def prefill(self, batch: int, input_len: int) -> dict[str, Any]:
        """Prompt tokens per second until every sequence has its first token."""
        self._time(batch, input_len, 1)
        seconds = [self._time(batch, input_len, 1) for _ in range(self._repeats)]
        return {"tokens_s": batch * input_len / statistics.median(seconds), "seconds": seconds}

    def serving(self, requests: int, input_len: int, output_len: int) -> dict[str, Any]:
        """New tokens per second of all requests together, from the first one's start to the last one's end."""
        self._time(requests, input_len, 2)
        seconds = [self._time(requests, input_len, output_len) for _ in range(self._repeats)]
        return {"tokens_s": requests * output_len / statistics.median(seconds), "seconds": seconds}

    def _time(self, batch: int, input_len: int, new_tokens: int) -> float:
        """Seconds of one call with prompts that were never seen before."""
        self._seed += 1
        prompts = random_prompts(batch, input_len, self._llm.engine.vocab_size, self._seed)
        parameters = SamplingParameters(max_tokens=new_tokens, end_ids=())
        started = time.perf_counter()
        results = self._llm.generate(prompts, parameters)
        seconds = time.perf_counter() - started
        for result in results:
            if result.error is not None or len(result.sequences[0].token_ids) != new_tokens:
                raise RuntimeError(f"{result.error or 'a request ended early'}")
        return seconds


if __name__ == "__main__":
    sys.exit(main())
