"""Which decode steps of Mistral-Nemo's shape run several ops at once, with and without a window. Nothing is built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tensorwright.builder.build import program_of
from tensorwright.builder.plan import choose
from tensorwright.checkpoint.config import CheckpointConfig, Quantization
from tensorwright.kernels.cuda.decode_steps import decode_stretches
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.models.families import from_huggingface
from tensorwright.program.program import Program
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel, config

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.driver", reason="needs the package cuda-bindings")
TARGET = resolve_target("sm_90")
BUCKETS, PROCESSORS, BLOCK = (1, 2, 4, 8, 16, 32, 64), 132, 64
WINDOW = 4096  # what a Mistral's config.json means that says nothing of a window
FUSED = [f"decode_{bucket}" if bucket == 4 else f"decode_{bucket}_on_132" for bucket in BUCKETS]


def plan_of(fields: dict[str, Any], without: tuple[str, ...] = ()) -> tuple[Program, dict[str, str]]:
    """The program, and how its weights lie."""
    shape = config(TinyModel("mistral", hidden_size=5120, num_heads=32, num_kv_heads=8, head_size=128, num_layers=40,
                             intermediate_size=14336, vocab_size=131072, max_position_embeddings=8192, dtype="float16"))
    model = from_huggingface({name: value for name, value in (shape | fields).items() if name not in without})
    program = program_of(CheckpointConfig(model, Quantization("W4A16", 128)), BLOCK, target=TARGET)
    plan = choose(program, TARGET, KERNELS)
    layouts = {name: choice.tactic.layout for choice in plan.choices for name in choice.op.weights.values()}
    return program, layouts


def stretches_of(program: Program, layouts: dict[str, str]) -> list[dict[str, Any]]:
    """As the manifest holds them."""
    return [vars(stretch) | {"entry": stretch.entry} for stretch in decode_stretches(program, TARGET, layouts)]


def entries(stretches: list[dict[str, Any]], ops: int, longest: int, processors: int = PROCESSORS) -> list[str | None]:
    """What the executor runs at each bucket, where one sequence has so many tokens and the others one."""
    from tensorwright.runtime.cuda.inputs import decode_bucket
    from tensorwright.runtime.cuda.plan import stretch_for

    found = []
    for count in BUCKETS:
        batch = make_batch([(1, 1)] * (count - 1) + [(1, longest)], BLOCK)[0]
        batch = type(batch)(**{**vars(batch), "output_rows": np.arange(count, dtype=np.int32)})
        sizes = decode_bucket(batch, BUCKETS, 5120 // BLOCK)
        assert sizes is not None
        stretch = stretch_for(stretches, 0, ops, sizes, processors)
        found.append(stretch and stretch["entry"])
    return found


def test_every_bucket_has_a_stretch_at_any_length() -> None:
    program, layouts = plan_of({})
    stretches, ops = stretches_of(program, layouts), len(program.ops)
    assert entries(stretches, ops, 1) == entries(stretches, ops, 5120) == FUSED
    assert entries(stretches, ops, 1, processors=114) == [f"decode_{bucket}" for bucket in BUCKETS]


@pytest.mark.parametrize("without", [(), ("sliding_window",)], ids=["given", "by default"])
def test_a_window_of_all_layers_hinders_only_the_one_kernel_for_many(without: tuple[str, ...]) -> None:
    program, layouts = plan_of({"sliding_window": WINDOW}, without)
    stretches, ops = stretches_of(program, layouts), len(program.ops)
    assert entries(stretches, ops, WINDOW) == FUSED
    assert entries(stretches, ops, WINDOW + 1) == [*FUSED[:3], *(f"decode_{bucket}" for bucket in BUCKETS[3:])]


def test_windows_that_differ_keep_long_sequences_from_the_one_kernel_for_all_layers() -> None:
    program, layouts = plan_of({"sliding_window": WINDOW})
    first = next(op for op in program.ops if op.kind == "attention")
    whole = replace(first, attributes={**first.attributes, "window": 0})
    mixed = replace(program, ops=tuple(whole if op is first else op for op in program.ops))
    stretches, ops = stretches_of(mixed, layouts), len(mixed.ops)
    assert entries(stretches, ops, WINDOW) == FUSED
    assert entries(stretches, ops, WINDOW + 1) == [f"decode_{bucket}" for bucket in BUCKETS]
