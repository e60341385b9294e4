"""llama.cpp for `protocol.py`: a GGUF file through the C API, as llama-cpp-python binds it.

Prompts are decoded one after the other in steps of 512 tokens, then all sequences together, one token each a step.
llama.cpp's defaults hold: mapped file, repacked weights, flash attention where it thinks fit, 16-bit KV cache.
"""

from __future__ import annotations

import ctypes
import time

import llama_cpp as native
import numpy as np
import protocol

CONTEXT_STEP = 256  # llama.cpp rounds the context of a sequence up to this

Row = tuple[int, int, int, bool]  # token, position, sequence, whether logits are wanted


class LlamaCpp:
    """A context with a separate KV stream for each sequence."""

    def __init__(self, settings: protocol.Settings) -> None:
        self._silence = native.llama_log_callback(lambda level, text, data: None)
        native.llama_log_set(self._silence, None)
        native.llama_backend_init()
        model = native.llama_model_load_from_file(str(settings.model).encode(), native.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp does not open {settings.model}")
        parameters = native.llama_context_default_params()
        parameters.n_ctx = settings.batch * (-(-settings.length // CONTEXT_STEP) * CONTEXT_STEP)
        parameters.n_batch = parameters.n_ubatch = protocol.STEP_TOKENS
        parameters.n_seq_max = settings.batch
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.kv_unified = False
        self._context = native.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._batch = native.llama_batch_init(protocol.STEP_TOKENS, 0, 1)
        self._vocab_size = settings.vocab_size

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[protocol.Event]:
        native.llama_memory_clear(native.llama_get_memory(self._context), True)
        events, tokens = [], []
        for sequence, prompt in enumerate(prompts):
            tokens.append(self._prefill(sequence, prompt))
            events.append((sequence, time.perf_counter(), 1))
        positions = [len(prompt) for prompt in prompts]
        for step in range(new_tokens - 1):
            rows = [(token, positions[sequence] + step, sequence, True) for sequence, token in enumerate(tokens)]
            tokens = self._decode(rows)
            moment = time.perf_counter()
            events += [(sequence, moment, 1) for sequence in range(len(prompts))]
        return events

    def _prefill(self, sequence: int, prompt: list[int]) -> int:
        last = len(prompt) - 1
        rows = [(token, position, sequence, position == last) for position, token in enumerate(prompt)]
        chosen: list[int] = []
        for begin in range(0, len(rows), protocol.STEP_TOKENS):
            chosen = self._decode(rows[begin:begin + protocol.STEP_TOKENS])
        return chosen[0]

    def _decode(self, rows: list[Row]) -> list[int]:
        """One step; the likeliest next token of every row that wants logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        if (status := native.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._likeliest(index) for index, row in enumerate(rows) if row[3]]

    def _likeliest(self, index: int) -> int:
        logits = native.llama_get_logits_ith(self._context, index)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, (self._vocab_size,)).argmax())


if __name__ == "__main__":
    protocol.main(LlamaCpp)
