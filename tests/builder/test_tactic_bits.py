"""The linear kernel's own tactics: those of one layout give the same bits for every number of rows and workers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.builder.measure import random_tensor
from tensorwright.builder.tactics import BUCKETS
from tensorwright.kernels.cpu.linear import Linear
from tensorwright.kernels.cpu.targets import resolve_target
from tensorwright.kernels.interface import Tactic, Target
from tensorwright.program.program import Buffer, Op, Program, Weight
from tensorwright.testing.single_ops import Case, SingleOps

TARGET = resolve_target("native")
WEIGHTS = (Weight("weight", (200, 384), "int4", 128, "float16"), Weight("weight", (200, 384), "int8", -1, "float16"),
           Weight("weight", (130, 256), "int8", 64, "float32"), Weight("weight", (200, 384), "float16"))


class One(Linear):
    """The kernel with one of its tactics."""

    def __init__(self, tactic: Tactic) -> None:
        self._tactic = tactic

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        return (self._tactic,)


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: f"{weight.dtype}_{weight.group_size}")
def test_tactics_of_a_layout_give_equal_bits(weight: Weight) -> None:
    outputs, inputs = weight.shape
    group = (weight.group_size if weight.group_size > 0 else 128) if weight.is_quantized else 0
    op = Op("a", "linear", ("x",), ("y",), {"weight": "weight"}, {"activation_group": group})
    buffers = {name: Buffer(name, ("tokens", columns), "float32") for name, columns in (("x", inputs), ("y", outputs))}
    program = Program(buffers, {"weight": weight}, (op,))
    random = np.random.default_rng(1)
    weights = {"weight": random_tensor(weight, random)}
    tactics = Linear().tactics(op, program, TARGET)
    cases = [Case(One(tactic), op, program, weights) for tactic in tactics]
    x = random.standard_normal((BUCKETS[-1].max_rows + 5, inputs), np.float32)
    expected: dict[str, NDArray[np.float32]] = {}
    for workers in (1, 2):
        ops = SingleOps(cases, TARGET, workers=workers)
        for index, tactic in enumerate(tactics):
            for rows in (len(x), *(bucket.max_rows for bucket in BUCKETS)):
                y = ops.run(index, [x[:rows]], outputs)
                np.testing.assert_array_equal(y, expected.setdefault(tactic.layout, y)[:rows], strict=True)
