"""The kernels of whole engines, run in the simulator: every buffer of every op against NumPy.

What tests/gpu asks of a GPU, on small shapes and without one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorwright.engine.engine import Engine
from tensorwright.testing.differential import compare_steps
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.gpu_cases import BOUNDS, LENGTHS, RECIPES, STEPS
from tensorwright.testing.native_ops import make_batch

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")


@pytest.mark.parametrize(("name", "target"), [*((name, "sm_90") for name in RECIPES),
                                              ("int4 float16, heads of 128", "sm_80")])
def test_every_buffer_agrees_with_the_reference(name: str, target: str, tmp_path: Path) -> None:
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    recipe = RECIPES[name]
    build = {"target": target, "max_batch_size": 16, "max_num_tokens": 256}
    folder = build_engine(Recipe(**{**vars(recipe), "build": build}), tmp_path)
    executor = SimulatedExecutor(Engine.open(folder), num_blocks=32)
    for step in ("mixed", "one token", "eight"):
        pairs = list(zip(STEPS[step], LENGTHS, strict=False))
        batch = make_batch(pairs, 16, num_outputs=len(pairs))[0]
        worst = max(compare_steps(executor, batch), key=lambda difference: difference.error)
        assert worst.error < BOUNDS[recipe.dtype], (step, worst)
        assert np.isfinite(worst.error)
