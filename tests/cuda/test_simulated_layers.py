"""All layers of a step in one launch, run in the simulator: blocks wait for each other's words, step after step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda import decode, decode_chain
from tensorwright.testing.engines import build_dummy
from tensorwright.testing.gpu_cases import BOUNDS
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
MODEL = TinyModel("mistral", hidden_size=512, num_heads=4, num_kv_heads=2, head_size=128, intermediate_size=4096,
                  vocab_size=512, max_position_embeddings=2048)
PROCESSORS, BLOCK = 4, 16


def test_steps_leave_no_words_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step after step over the same memory: one sequence whose keys are cut in two, and two sequences."""
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    monkeypatch.setattr(decode, "PROCESSORS", {"sm_90": PROCESSORS})
    for name in ("SMALL", "BATCHED"):  # other stretches
        monkeypatch.setattr(decode_chain, name, ())
    engine = Engine.open(build_dummy(MODEL, tmp_path, "float16", target="sm_90", tokens_per_block=BLOCK,
                                     max_seq_len=512))
    for lengths in ((300,), (40, 1)):
        fused, plain = (SimulatedExecutor(engine, num_blocks=24, processors=PROCESSORS, max_tokens=16, seed=7,
                                          stretches=stretches) for stretches in (True, False))
        step = make_batch([(1, length) for length in lengths], BLOCK)[0]
        step = type(step)(**{**vars(step), "output_rows": np.arange(len(lengths), dtype=np.int32)})
        assert fused.stretch(step) == f"decode_{len(lengths)}_on_{PROCESSORS}"
        for executor in (fused, plain):
            executor.fill_caches(seed=3)
        wanted = plain.execute(step)
        first = fused.execute(step)
        assert np.abs(first - wanted).max() < BOUNDS["float16"] * np.abs(wanted).max()
        for _ in range(2):
            np.testing.assert_array_equal(fused.execute(step), first)
