"""What `bench --profile` makes of a GPU's trace: names, bytes and sums that explain a step. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorwright.cli.gpu_profile import Kernel, busy_s, known_kernels, print_gpu_profile, profile_steps, spans_of
from tensorwright.engine.engine import Engine
from tensorwright.testing.engines import Recipe, build_dummy, build_engine
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")

# Of two steps, in microseconds: linears of 10 that overlap by 2 with attention of 6; the device waits for 4 each time.
EVENTS = [event for start in (100.0, 120.0) for event in (
    {"cat": "kernel", "name": "void tw::attend()", "ts": start + 8, "dur": 6},
    {"cat": "kernel", "name": "_ZN2tw6linearE", "ts": start, "dur": 10},
    {"cat": "cpu_op", "name": "aten::mm", "ts": start, "dur": 100},
    {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": start + 18, "dur": 2})]
KNOWN = {"_ZN2tw6linearE": Kernel("linear qkv", 20e6), "void tw::attend()": Kernel("attend", 0.0)}


def test_kernels_less_overlap_plus_waiting_are_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    spans = spans_of(EVENTS)
    assert [span.name for span in spans[:2]] == ["_ZN2tw6linearE", "void tw::attend()"]
    assert busy_s(spans) == pytest.approx(32e-6)
    found = profile_steps(spans, KNOWN, steps=2, measured_s=21e-6, bytes_s=4e12)
    assert found["kernels_ms"] == pytest.approx(18e-3)
    assert found["overlap_ms"] == pytest.approx(2e-3)
    assert found["idle_ms"] == pytest.approx(4e-3)
    assert found["traced_ms"] == pytest.approx(found["kernels_ms"] - found["overlap_ms"] + found["idle_ms"])
    line = found["kinds"][0]
    assert (line["name"], line["count"], line["bytes"]) == ("linear qkv", 1, 20e6)
    assert line["share_of_limit"] == pytest.approx(0.5)  # 20 MB at 4 TB/s are 5 of its 10 microseconds
    print_gpu_profile({"phase": "decode", "batch": 3, "length": 7, **found})
    printed = capsys.readouterr().out
    assert "linear qkv" in printed and "2.00" in printed and "Memcpy HtoD" in printed


def test_an_op_s_kernels_are_known_by_name_with_what_they_read(tmp_path: Path) -> None:
    recipe = Recipe(TinyModel("qwen3", head_size=32), "float16", "W4A16", int8_kv_cache=True, build={"target": "sm_90"})
    engine = Engine.open(build_engine(recipe, tmp_path))
    known = known_kernels(engine, kv_tokens=100)
    titles = {kernel.title: kernel.bytes for kernel in known.values()}
    sizes = {entry["name"]: entry["bytes"] for entry in engine.manifest["weights"]}
    assert titles["small_linear lm_head"] == sizes["lm_head.weight"]
    assert any(name.startswith("void tw::small_linear<") for name in known)
    attention = next(each for title, each in titles.items() if "attention" in title)
    assert attention == 100 * engine.kv_bytes_per_token / 2  # of one of the two layers, scales included


def test_a_stretch_s_kernels_read_the_weights_of_their_tables(tmp_path: Path) -> None:
    model = TinyModel("mistral", hidden_size=2560, num_heads=16, num_kv_heads=8, head_size=128, intermediate_size=7168,
                      vocab_size=2048)
    engine = Engine.open(build_dummy(model, tmp_path, "float16", target="sm_90", tokens_per_block=16, max_seq_len=64))
    titles = {kernel.title: kernel.bytes for kernel in known_kernels(engine, kv_tokens=10).values()}
    sizes = {entry["name"]: entry["bytes"] for entry in engine.manifest["weights"]}
    layers = sum(size for name, size in sizes.items() if "layers" in name) + sizes["transformer.ln_f"]
    assert titles["decode_layers"] >= layers + 10 * engine.kv_bytes_per_token
