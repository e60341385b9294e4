"""Tensorwright for `protocol.py`: an engine folder, through `LLM`, without reuse of blocks between requests."""

from __future__ import annotations

import time

import protocol

from tensorwright.engine.config import read_config
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters


class Tensorwright:
    """Room for the batch in whole KV blocks, one more for each sequence."""

    def __init__(self, settings: protocol.Settings) -> None:
        block = int(read_config(settings.model)["build_config"]["tokens_per_block"])
        room = settings.batch * (-(-settings.length // block) + 1) * block
        self._llm = LLM(settings.model, threads=settings.threads, block_reuse=False, max_kv_tokens=room)

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[protocol.Event]:
        parameters = SamplingParameters(max_tokens=new_tokens, end_ids=())
        events = []
        for update in self._llm.stream(prompts, parameters):
            if update.result is not None and update.result.error is not None:
                raise RuntimeError(update.result.error)
            if update.token_ids:
                events.append((update.request_id, time.perf_counter(), len(update.token_ids)))
        first = min(sequence for sequence, _, _ in events)
        return [(sequence - first, moment, count) for sequence, moment, count in events]


if __name__ == "__main__":
    protocol.main(Tensorwright)
