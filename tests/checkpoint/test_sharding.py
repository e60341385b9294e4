"""Ranks together hold every number of the model once, repeated kv heads and replicated weights apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorwright.checkpoint.config import CheckpointConfig, Quantization
from tensorwright.checkpoint.sharding import check_sizes, pieces, shard_shape
from tensorwright.errors import UsageError
from tensorwright.models import from_huggingface
from tensorwright.models.weight_names import WeightSpec, weights
from tensorwright.testing import tiny


def config(tp_size: int, quantization: Quantization = Quantization(), **fields: int) -> CheckpointConfig:  # noqa: B008
    return CheckpointConfig(from_huggingface(tiny.config(tiny.TinyModel(family="qwen2", **fields))),
                            quantization, tp_size)


def spec(of: CheckpointConfig, name: str) -> WeightSpec:
    return next(spec for spec in weights(of.model, write_lm_head=True) if spec.name == name)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["attention.qkv.weight", "attention.qkv.bias", "attention.dense.weight",
                                  "mlp.fc.weight", "mlp.gate.weight", "mlp.proj.weight"])
def test_each_rank_has_the_rows_and_columns_of_its_heads(tp_size: int, name: str) -> None:
    facts = config(tp_size, num_heads=8, num_kv_heads=2)
    weight = spec(facts, f"transformer.layers.1.{name}")
    seen: dict[str, Any] = {s.name: np.zeros(s.shape, int) for s in weight.sources}
    for rank in range(tp_size):
        rows = 0
        for piece in pieces(weight, facts, rank):
            assert piece.target_row == rows
            rows += len(piece.rows)
            columns = slice(None) if piece.columns is None else slice(piece.columns.start, piece.columns.stop)
            seen[piece.source.name][(slice(piece.rows.start, piece.rows.stop), columns)[:len(piece.source.shape)]] += 1
        assert rows == shard_shape(weight, facts)[0]
    for source in weight.sources:
        assert (seen[source.name] == (max(1, tp_size // 2) if source.is_kv else 1)).all()


def test_a_rank_reads_the_kv_head_of_its_queries() -> None:
    facts = config(4, num_heads=8, num_kv_heads=2)
    weight = spec(facts, "transformer.layers.0.attention.qkv.weight")
    heads = [[piece.rows.start // 32 for piece in pieces(weight, facts, rank)] for rank in range(4)]
    assert heads == [[0, 0, 0], [2, 0, 0], [4, 1, 1], [6, 1, 1]]  # query heads 4 … 7 read kv head 1


def test_the_vocabulary_is_padded() -> None:
    facts = config(2, vocab_size=321)
    weight = spec(facts, "lm_head.weight")
    assert shard_shape(weight, facts) == (161, 128)
    assert [pieces(weight, facts, rank)[0].rows for rank in (0, 1)] == [range(161), range(161, 321)]


@pytest.mark.parametrize(("tp_size", "fields", "quantization", "words", "mend"), [
    (3, {}, Quantization(), ("4 attention heads", "256", "3"), "--tp_size 2"),
    (0, {}, Quantization(), ("--tp_size 0",), "--tp_size 1"),
    (2, {"num_heads": 12, "num_kv_heads": 3}, Quantization(), ("3 key and value heads", "2"), "--tp_size 1"),
    (2, {}, Quantization("W4A16", 128), ("dense has 64", "128"), "--group_size 64"),
    (1, {"intermediate_size": 96}, Quantization("W4A16", 64), ("proj has 96",), "--group_size 32"),
    (1, {"intermediate_size": 72}, Quantization("W4A16", 64), ("proj has 72",), "--group_size -1"),
    (1, {"intermediate_size": 75}, Quantization("W4A16", -1), ("odd", "75"), "int8"),
])
def test_what_does_not_divide_is_refused_with_the_numbers(tp_size: int, fields: dict[str, int], words: tuple[str, ...],
                                                          quantization: Quantization, mend: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_sizes(config(tp_size, quantization, **fields))
    assert all(word in caught.value.message for word in words), caught.value.message
    assert mend in (caught.value.mend or "")
