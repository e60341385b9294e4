"""What the linear of GPUs says of itself without a GPU: its reference, tactics that fit, launches of both ways."""

from __future__ import annotations

import numpy as np
import pytest

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.launch import GpuSource
from tensorwright.kernels.cuda.linear import PANEL_BYTES, Linear
from tensorwright.kernels.cuda.targets import SHARED_BYTES, TARGET_NAMES, resolve_target
from tensorwright.kernels.interface import Tensor
from tensorwright.program.program import Buffer, Program, Weight
from tensorwright.testing.native_ops import one_op


def program_of(rows: int, inputs: int, dtype: str = "int4", group: int = 128) -> Program:
    weight = Weight("weight", (rows, inputs), dtype, group, "float16" if group else "")
    buffers = {name: Buffer(name, ("tokens", columns), "float32")
               for name, columns in (("x", inputs), ("residual", rows), ("y", rows))}
    norm = Weight("norm", (inputs,), "float32")
    return one_op("linear", buffers, {"weight": weight, "norm": norm}, norm_epsilon=1e-5)


def test_the_reference_rounds_the_normed_input_to_16_bits() -> None:
    random = np.random.default_rng(0)
    program = program_of(32, 256)
    x, residual = (random.standard_normal((5, columns)).astype(np.float32) for columns in (256, 32))
    norm = random.uniform(0.5, 2, 256).astype(np.float32)
    codes = random.integers(0, 256, (32, 128)).astype(np.uint8)
    scales = random.uniform(0.01, 0.1, (32, 2)).astype(np.float16)
    given = Linear().reference(program.ops[0], program, {"x": x, "residual": residual},
                               {"weight": Tensor(codes, scales), "norm": Tensor(norm)})["y"]
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * norm
    numbers = np.stack((codes & 15, codes >> 4), axis=-1).reshape(32, 256).astype(np.float32) - 8
    weights = numbers * np.repeat(scales.astype(np.float32), 128, axis=1)
    wanted = normed.astype(np.float16).astype(np.float32) @ weights.T + residual
    np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-4)
    assert np.abs(given - (normed @ weights.T + residual)).max() > 1e-6


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize(("rows", "inputs"), [(6144, 5120), (5120, 14336), (96, 128)])
def test_tactics_fit_into_shared_memory(target: str, rows: int, inputs: int) -> None:
    program = program_of(rows, inputs)
    tactics = Linear().tactics(program.ops[0], program, resolve_target(target))
    assert tactics[-1].parameters == {}  # any number of tokens
    assert tactics[0].parameters["tokens"] == 1
    for tactic in tactics[:-1]:
        source = Linear().source(program.ops[0], program, tactic)
        assert isinstance(source, GpuSource)
        assert max(launch.shared_bytes for launch in source.launches) <= SHARED_BYTES[target]


def test_a_large_weight_is_unpacked_piece_by_piece() -> None:
    program = program_of(131072, 5120, "float16", 0)
    tactic = Linear().tactics(program.ops[0], program, resolve_target("sm_90"))[-1]
    source = Linear().source(program.ops[0], program, tactic)
    assert isinstance(source, GpuSource)
    assert dict(source.scratch)["panel"].at({"one": 1}) <= PANEL_BYTES
    columns = [launch.arguments[3] for launch in source.launches if launch.function == "matmul"]
    assert sum(map(int, columns)) == 131072 and len(columns) > 1


def test_rows_are_ordered_for_what_reads_them() -> None:
    """The layouts that fused epilogues want come from the readers: rope_cache of heads of 128, and a gate."""
    assert [units.row_order(layout, 256)[:9].tolist()[-1] for layout in (units.IN_ORDER, units.ROPE, units.GATED)] \
        == [8, 64, 128]
