"""The product of packed float8 weights and float8 activations, simulated, against float64: epilogues, odd sizes."""

from __future__ import annotations

import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.linear_float8 import OPERAND, SHARED_BYTES, THREADS
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.kernels.interface import Tensor
from tensorwright.program.program import Weight
from tensorwright.program.reference import round_to_float8, to_float8

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
TYPES: dict[str, tuple[Any, str, float]] = {"float16": (np.float16, "tw::half", 1e-3),
                                            "bfloat16": (ml_dtypes.bfloat16, "tw::bfloat16", 8e-3)}
HEADERS = ("linear_float8.cuh",)


def aligned(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins on 256 bytes."""
    memory = np.empty(values.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start:start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize(("rows", "inputs", "tokens", "kind", "dtype"), [
    (331, 320, 70, "results", "float16"), (256, 256, 300, "rope", "float16"), (512, 384, 9, "gated", "float16"),
    (512, 128, 257, "gate and up", "bfloat16"), (136, 640, 1, "results", "bfloat16")])
def test_products(rows: int, inputs: int, tokens: int, kind: str, dtype: str) -> None:
    from tensorwright.testing.simulator.compile import Kernels

    (number, name, bound), random = TYPES[dtype], np.random.default_rng(rows + tokens)
    layout = {"results": units.IN_ORDER, "rope": units.ROPE}.get(kind, units.GATED)
    weight = Weight("w", (rows, inputs), "float8_e4m3", -1, dtype)
    codes = to_float8(random.standard_normal((rows, inputs)).astype(np.float32) * 100)
    scales = random.uniform(1e-4, 1e-3, (rows, 1)).astype(number)
    packed = aligned(units.pack(weight, Tensor(codes, scales), layout))
    padded = units.Shape(weight).units * units.UNIT_INPUTS
    x = aligned(np.zeros((tokens, padded), np.float32))
    x[:, :inputs] = random.standard_normal((tokens, inputs))
    order = {"results": "tw::InOrder", "rope": "tw::RopePairs"}.get(kind, f"tw::GatePairs<{rows // 2}>")
    output = {"results": f"tw::Float8Results<{order}, {rows}>",
              "gated": f"tw::Float8Gated<{name}, tw::Function::silu, {rows // 2}>"}.get(
                  kind, f"tw::Float8Products<{name}, {order}, {rows}>")
    rounding = f"tw::operand_rows<float, {padded}, 128, {OPERAND}>"
    product = f"tw::linear_float8<{name}, {rows}, {inputs}, 2, {output}>"
    kernels = Kernels([(HEADERS, (rounding, product))], resolve_target("sm_90"))

    # Memory that nobody wrote is NaN.
    ordered = aligned(np.full(-(-tokens // 256) * 256 * padded, 0xFF, np.uint8))
    x_scales = aligned(np.full(tokens, np.nan, np.float32))
    y = aligned(np.full((tokens, rows // (2 if kind == "gated" else 1)), np.nan,
                        np.float32 if kind == "results" else number))
    bias, residual = (aligned(random.standard_normal(shape).astype(np.float32)) for shape in (rows, (tokens, rows)))
    ranges = [(each.ctypes.data, each.nbytes) for each in (packed, x, ordered, x_scales, y, bias, residual)]
    operand = struct.pack("QQi4x", ordered.ctypes.data, x_scales.ctypes.data, tokens)
    kernels[rounding].launch((tokens, 1, 1), [128], 0, struct.pack("Q", x.ctypes.data) + operand, ranges=ranges,
                             races=True)
    given = struct.pack("QQ", packed.ctypes.data, packed.ctypes.data + units.Shape(weight).bytes) + operand
    to = [y.ctypes.data, bias.ctypes.data, residual.ctypes.data] if kind == "results" else [y.ctypes.data]
    given += struct.pack(f"{len(to)}Q", *to) + (struct.pack("i4x", tokens) if kind == "results" else b"")
    kernels[product].launch((3, 1, 1), [THREADS], SHARED_BYTES, given, ranges=ranges, seed=tokens, races=True)

    wanted = round_to_float8(x[:, :inputs]).astype(np.float64) @ (codes.astype(np.float64) * scales.astype(float)).T
    if kind == "results":
        wanted += bias + residual
    if kind == "gated":
        gate, up = wanted[:, :rows // 2], wanted[:, rows // 2:]
        wanted = gate / (1 + np.exp(-gate)) * up
    assert np.abs(y.astype(np.float64) - wanted).max() < bound * np.abs(wanted).max()
