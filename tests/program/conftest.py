"""A small program with everything in it, and its weights, for tests that need no checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.models.config import ModelConfig, Rope
from tensorwright.models.decoder import build_program
from tensorwright.program.program import Program

CONFIG = ModelConfig("LlamaForCausalLM", "float32", vocab_size=50, hidden_size=24, num_layers=2, num_heads=4,
                     num_kv_heads=2, head_size=10, intermediate_size=36, max_position_embeddings=64,
                     rope=Rope(10000.0), qkv_bias=True, qk_norm=True, sliding_window=7, windowed_layers=(1,))


@pytest.fixture
def program() -> Program:
    return build_program(CONFIG, kv_dtype="float32", tokens_per_block=4)


def tensors(seed: int = 0) -> dict[str, NDArray[Any]]:
    """The checkpoint's tensors that the program's parts name."""
    rng = np.random.default_rng(seed)
    made: dict[str, NDArray[Any]] = {}
    for weight in build_program(CONFIG, kv_dtype="float32", tokens_per_block=4).weights.values():
        for part in weight.parts:
            rows = made.get(part.name, np.zeros((0, *weight.shape[1:]))).shape[0]
            more = max(0, part.start + part.count - rows)
            grown = rng.standard_normal((more, *weight.shape[1:])) * 0.3
            made[part.name] = np.concatenate((made[part.name], grown)) if rows else grown
    return {name: value.astype(np.float32) for name, value in made.items()}


def weights_of(program: Program, held: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The program's weights joined from their parts."""
    result = {}
    for name, weight in program.weights.items():
        if weight.values:
            result[name] = np.asarray(weight.values, np.float32)
        else:
            result[name] = np.concatenate([held[p.name][p.start:p.start + p.count] for p in weight.parts])
    return result


def batch_buffers(program: Program, lengths: tuple[tuple[int, int], ...] = ((5, 5), (1, 3))) -> dict[str, NDArray[Any]]:
    """Buffers of a step over sequences of (query length, kv length), with caches filled at random."""
    rng = np.random.default_rng(1)
    width, block = 4, 4
    tables = np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)
    positions = np.concatenate([np.arange(kv - q, kv) for q, kv in lengths]).astype(np.int32)
    owner = np.concatenate([np.full(q, s) for s, (q, _) in enumerate(lengths)])
    starts = np.cumsum([0, *(q for q, _ in lengths[:-1])]).astype(np.int32)
    buffers: dict[str, NDArray[Any]] = {
        "token_ids": rng.integers(0, 50, positions.shape[0], dtype=np.int32), "positions": positions,
        "slots": (tables[owner, positions // block] * block + positions % block).astype(np.int32),
        "query_starts": starts, "query_lengths": np.array([q for q, _ in lengths], np.int32),
        "kv_lengths": np.array([kv for _, kv in lengths], np.int32), "block_tables": tables,
        "output_rows": (starts + [q for q, _ in lengths] - 1).astype(np.int32)}
    for buffer in program.buffers.values():
        if buffer.kind == "cache":
            shape = tuple(tables.size if dim == "blocks" else int(dim) for dim in buffer.shape)
            buffers[buffer.name] = rng.standard_normal(shape).astype(np.float32)
    return buffers
