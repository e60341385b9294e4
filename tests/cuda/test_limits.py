"""Kernels of every kind compile for every target and keep to its limits: registers, shared memory, nothing put aside.

Formats take turns over the targets, so that each is compiled with little shared memory and with much: all of them for
all targets would take minutes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tensorwright.builder.build import program_of
from tensorwright.builder.cuda_backend import CudaBackend
from tensorwright.builder.plan import choose
from tensorwright.checkpoint.config import Algorithm, CheckpointConfig, KvCache, Quantization
from tensorwright.kernels.cuda.launch import Launch, gpu_source, to_json
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.cuda.targets import TARGET_NAMES, resolve_target
from tensorwright.models.families import from_huggingface
from tensorwright.testing.launch_limits import over_limits
from tensorwright.testing.tiny import TinyModel, config

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
PLAIN = TinyModel("mistral", hidden_size=2048, num_heads=16, num_kv_heads=8, head_size=128, intermediate_size=7168,
                  vocab_size=2048, num_layers=1)
FLOAT8: Algorithm = "FP8_PER_CHANNEL_PER_TOKEN"
# Decoders whose steps run in stretches: linears for all numbers of tokens, and what is fused with them. Those of sm_90
# are in test_build.py.
STRETCHES: dict[str, tuple[str, Algorithm | None, int]] = {
    "sm_80": ("float16", "W8A16", -1), "sm_86": ("bfloat16", "W4A16", 32), "sm_89": ("bfloat16", FLOAT8, -1),
    "sm_100": ("bfloat16", None, 0), "sm_120": ("float16", "W4A16", 128)}
# Others: what runs op by op only.
OTHERS: dict[str, tuple[TinyModel, str, Algorithm | None, KvCache | None]] = {
    "sm_80": (TinyModel("llama", attention_bias=True, mlp_bias=True), "bfloat16", "W8A16", "INT8"),
    "sm_86": (TinyModel("mistral", head_size=128), "float16", None, "FP8"),
    "sm_89": (TinyModel("qwen3", head_size=16), "float16", "W8A16", "INT8"),
    "sm_90": (TinyModel("qwen2", sliding_window=9), "float16", FLOAT8, "FP8"),
    "sm_100": (TinyModel("qwen3", head_size=32), "float16", "W4A16", None),
    "sm_120": (TinyModel("mistral", hidden_size=192, intermediate_size=320, vocab_size=331), "bfloat16", FLOAT8, None)}


def compiled(model: TinyModel, dtype: str, quantization: Quantization, target_name: str) -> dict[str, Any]:
    """A manifest's "kernels"."""
    target = resolve_target(target_name)
    shape = from_huggingface(config(replace(model, dtype=dtype)))
    program = program_of(CheckpointConfig(shape, quantization), 16, target=target)
    return dict(CudaBackend().compile(choose(program, target, KERNELS)).facts)


def test_what_breaks_a_limit_is_told() -> None:
    launch = Launch("tw::f", threads=512, shared_bytes=200 << 10)
    facts = {"entries": {"f": to_json(gpu_source((), launch))}, "functions": {
        name: {"registers": 129, "shared_bytes": 28 << 10, "spilled_bytes": 65} for name in ("tw::f", "tw::g")}}
    assert over_limits(facts, "sm_90") == [
        "tw::g is never launched", "tw::f: 69632 registers of 65536", "tw::f: 65 bytes put aside of 64",
        "tw::f: 233472 bytes of shared memory of 232448"]


@pytest.mark.parametrize("target", STRETCHES)
def test_kernels_of_stretches_keep_to_the_limits(target: str) -> None:
    dtype, algorithm, group = STRETCHES[target]
    facts = compiled(PLAIN, dtype, Quantization(algorithm, group), target)
    assert {stretch["tokens"] for stretch in facts["stretches"]} >= {1, 2, 4, 8, 16, 32}
    assert over_limits(facts, target) == []


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_kernels_of_ops_keep_to_the_limits(target: str) -> None:
    model, dtype, algorithm, kv_cache = OTHERS[target]
    facts = compiled(model, dtype, Quantization(algorithm, 32 if algorithm == "W4A16" else -1, kv_cache, True), target)
    assert all(stretch["least"] for stretch in facts["stretches"])  # none for decode steps
    assert over_limits(facts, target) == []
