"""Every pass keeps the meaning: the reference executor gives the same logits and caches before and after it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.builder.passes import stages
from tensorwright.builder.passes.context import Context
from tensorwright.program import reference
from tensorwright.program.printer import to_text
from tensorwright.program.program import Program, from_json, to_json

_spec = importlib.util.spec_from_file_location("program_fixtures", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)


def test_each_pass_keeps_logits_and_caches(program: Program) -> None:
    held = fixtures.tensors()
    results = {}
    for name, stage in stages(program, Context()):
        buffers = fixtures.batch_buffers(stage)
        out = reference.run(stage, buffers, fixtures.weights_of(stage, held))
        results[name] = (out[stage.ops[-1].outputs[0]], out["layers.1.kv"])
    logits, cache = results["model"]
    assert np.abs(logits).max() > 0.1
    for name, (other, other_cache) in results.items():
        np.testing.assert_allclose(other, logits, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(other_cache, cache, rtol=1e-4, atol=1e-5, err_msg=name)


def test_fusions_leave_six_ops_a_layer(program: Program) -> None:
    *_, (_, final) = stages(program, Context())
    kinds = [op.kind for op in final.ops if op.name.startswith("layers.0")]
    assert kinds == ["linear", "rope_cache", "attention", "linear", "linear", "linear"]


def test_a_joined_weight_reads_the_whole_tensor_once(program: Program) -> None:
    *_, (_, final) = stages(program, Context())
    assert [(p.start, p.count) for p in final.weights["layers.0.attention.qkv.weight"].parts] == [(0, 80)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_add_up_to_one(program: Program, ranks: int) -> None:
    """Row-parallel partial sums of all ranks, and gathered logits, equal the plain program's."""
    held = fixtures.tensors()
    lengths = ((5, 5), (3, 3))  # nothing cached: a rank's random cache would not be a slice of the plain one
    plain = reference.run(program, fixtures.batch_buffers(program, lengths), fixtures.weights_of(program, held))
    logits = plain[program.ops[-1].outputs[0]]
    shards = []
    for rank in range(ranks):
        context = Context(tp_size=ranks, rank=rank, num_kv_heads=fixtures.CONFIG.num_kv_heads)
        *_, (_, sharded) = stages(program, context)
        shards.append((sharded, fixtures.batch_buffers(sharded, lengths), weights_of_rank(sharded, held, rank, ranks)))
    for ops in zip(*(sharded.ops for sharded, _, _ in shards), strict=True):
        outputs = []
        for (_, buffers, weights), op in zip(shards, ops, strict=True):
            outputs.append(reference.run_op(op, buffers, {r: weights[n] for r, n in op.weights.items()}))
        if ops[0].kind in ("all_reduce", "all_gather"):
            parts = [next(iter(out.values())) for out in outputs]
            joined = sum(parts) if ops[0].kind == "all_reduce" else np.concatenate(parts, axis=1)
            outputs = [dict.fromkeys(out, joined) for out in outputs]
        for (_, buffers, _), out in zip(shards, outputs, strict=True):
            buffers.update(out)
    for sharded, buffers, _ in shards:
        np.testing.assert_allclose(buffers[sharded.ops[-1].outputs[0]], logits, rtol=1e-4, atol=1e-4)


def weights_of_rank(program: Program, held: dict[str, NDArray[Any]], rank: int,
                    ranks: int) -> dict[str, NDArray[Any]]:
    """Cut as the checkpoint's rank files are: q, k, v each by heads; dense and proj by inputs; vocabulary padded."""
    config, cut = fixtures.CONFIG, dict(held)
    q = config.num_heads * config.head_size // ranks
    heads = max(1, config.num_kv_heads // ranks)
    first = rank * heads if config.num_kv_heads >= ranks else rank * config.num_kv_heads // ranks
    for name, value in held.items():
        if ".qkv" in name:
            whole_q, size = config.num_heads * config.head_size, config.head_size
            k = whole_q + first * size
            v = k + config.num_kv_heads * size
            cut[name] = np.concatenate((value[rank * q:(rank + 1) * q], value[k:k + heads * size],
                                        value[v:v + heads * size]))
        elif name.endswith((".fc", ".gate")):
            cut[name] = np.split(value, ranks)[rank]
        elif name.endswith((".dense", ".proj")):
            cut[name] = np.split(value, ranks, axis=1)[rank]
        elif name == "lm_head":
            rows = -(-value.shape[0] // ranks)
            padded = np.zeros((rows * ranks, value.shape[1]), np.float32)
            padded[:value.shape[0]] = value
            cut[name] = padded[rank * rows:(rank + 1) * rows]
    return dict(fixtures.weights_of(program, cut))


def test_programs_go_to_json_and_back(program: Program) -> None:
    for _, stage in stages(program, Context("W4A16", 32, True)):
        assert from_json(to_json(stage)) == stage


def test_the_printer_names_schemes_and_what_is_not_default(program: Program) -> None:
    *_, (_, final) = stages(program, Context("W8A16", -1, False))
    text = to_text(final)
    assert "weight=int8[80, 24]" in text
    assert "norm_epsilon=1e-05" in text
    assert "gate= " not in text
