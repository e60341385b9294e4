"""All layers of a step in one launch, for every way to hold weights, against the same ops one by one: simulated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorwright.checkpoint.convert import DType
from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda import decode, decode_chain
from tensorwright.testing.engines import build_dummy
from tensorwright.testing.gpu_cases import BOUNDS
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
PROCESSORS = 16
MODEL = TinyModel("mistral", hidden_size=1024, num_heads=8, num_kv_heads=8, head_size=128, intermediate_size=3072,
                  vocab_size=256)


@pytest.mark.parametrize(("dtype", "flags"), [
    ("float16", ("--use_weight_only",)), ("bfloat16", ("--use_fp8_rowwise", "--quantize_lm_head")), ("bfloat16", ())],
    ids=["int8", "float8", "bfloat16"])
def test_all_layers_at_once_leave_what_their_ops_leave(dtype: DType, flags: tuple[str, ...], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    monkeypatch.setattr(decode, "PROCESSORS", {"sm_90": PROCESSORS})
    for name in ("SMALL", "BATCHED"):  # other stretches
        monkeypatch.setattr(decode_chain, name, ())
    engine = Engine.open(build_dummy(MODEL, tmp_path, dtype, flags, target="sm_90", tokens_per_block=16,
                                     max_seq_len=64, max_num_tokens=64))
    fused, plain = (SimulatedExecutor(engine, num_blocks=16, processors=PROCESSORS, max_tokens=32, stretches=stretches)
                    for stretches in (True, False))
    for lengths in ((20,), (3, 17)):
        prompt = make_batch([(length, length) for length in lengths], 16)[0]
        for executor in (fused, plain):
            executor.execute(prompt)
        step = make_batch([(1, length) for length in lengths], 16, num_outputs=len(lengths))[0]
        step = type(step)(**{**vars(step), "output_rows": np.arange(len(lengths), dtype=np.int32)})
        assert fused.stretch(step) == f"decode_{len(lengths)}_on_{PROCESSORS}"
        given, wanted = (executor.execute(step) for executor in (fused, plain))
        assert np.abs(given - wanted).max() < BOUNDS[dtype] * np.abs(wanted).max()
        for name in ("layers.0.kv", "layers.1.kv"):
            held = plain.buffer(name).astype(np.float32)
            assert np.abs(fused.buffer(name).astype(np.float32) - held).max() < BOUNDS[dtype] * np.abs(held).max()


def test_a_float8_cache_is_written_and_read_by_fused_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels of a step of few sequences, and by those of Hopper's products for more."""
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    model = TinyModel("mistral", hidden_size=1024, num_heads=8, num_kv_heads=4, head_size=128, intermediate_size=1024,
                      vocab_size=256, num_layers=1)
    for name, counts in (("SMALL", (1,)), ("BATCHED", (8,))):
        monkeypatch.setattr(decode_chain, name, counts)
    monkeypatch.setattr(decode_chain, "MOST_PROCESSORS", PROCESSORS)
    engine = Engine.open(build_dummy(model, tmp_path, "bfloat16", ("--use_fp8_rowwise", "--fp8_kv_cache"),
                                     target="sm_90", tokens_per_block=16, max_seq_len=64, max_num_tokens=64))
    fused, plain = (SimulatedExecutor(engine, num_blocks=32, processors=PROCESSORS, max_tokens=64, stretches=stretches)
                    for stretches in (True, False))
    for lengths in ((37,), (3, 17, 1, 30, 5, 2, 9, 4)):
        prompt = make_batch([(min(length, 5), length) for length in lengths], 16)[0]
        for executor in (fused, plain):
            executor.execute(prompt)
        step = make_batch([(1, length) for length in lengths], 16, num_outputs=len(lengths))[0]
        step = type(step)(**{**vars(step), "output_rows": np.arange(len(lengths), dtype=np.int32)})
        assert fused.stretch(step) == f"decode_{len(lengths)}"
        given, wanted = (executor.execute(step) for executor in (fused, plain))
        assert np.abs(given - wanted).max() < BOUNDS["bfloat16"] * np.abs(wanted).max()
        held = plain.buffer("layers.0.kv").astype(np.float32)
        off = np.abs(fused.buffer("layers.0.kv").astype(np.float32) - held)
        assert (off <= np.abs(held) / 8 + BOUNDS["bfloat16"]).all()  # a rounding to the other side
        assert off.mean() < 0.01 * np.abs(held).mean()
