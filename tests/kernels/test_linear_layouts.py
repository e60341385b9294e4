"""Packing is exact and reversible, says its own size, and refuses what no kernel can run."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorwright.kernels.cpu import layouts
from tensorwright.kernels.cpu.linear import Linear
from tensorwright.kernels.cpu.targets import resolve_target
from tensorwright.kernels.interface import Tensor
from tensorwright.program.program import Buffer, Op, Program, Weight

TARGET = resolve_target("x86-64-v3")


@st.composite
def weights(draw: st.DrawFn) -> tuple[Weight, Tensor]:
    """Any linear weight that a checkpoint can hold, with random bits."""
    dtype = draw(st.sampled_from(("float32", "float16", "bfloat16", "int8", "int4")))
    outputs = draw(st.integers(1, 150))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if dtype in layouts.DTYPES:
        inputs, number = draw(st.integers(1, 200)), layouts.DTYPES[dtype]
        bits = random.integers(0, 256, (outputs, inputs * number.itemsize), np.uint8)
        return Weight("w", (outputs, inputs), dtype), Tensor(bits.view(number))
    group = draw(st.sampled_from((-1, 32, 64, 128)))
    inputs = draw(st.integers(1, 4)) * group if group > 0 else draw(st.integers(1, 150)) * 2
    scale_dtype = draw(st.sampled_from(tuple(layouts.DTYPES)))
    scales = random.standard_normal((outputs, inputs // group) if group > 0 else (outputs,))
    codes = random.integers(-128, 128, (outputs, inputs if dtype == "int8" else inputs // 2), np.int8)
    tensor = Tensor(codes if dtype == "int8" else codes.view(np.uint8), scales.astype(layouts.DTYPES[scale_dtype]))
    return Weight("w", (outputs, inputs), dtype, group, scale_dtype), tensor


@settings(max_examples=80, deadline=None)
@given(weights())
def test_unpack_gives_back_every_bit(case: tuple[Weight, Tensor]) -> None:
    weight, tensor = case
    for layout in (layouts.DOT, layouts.INPUT) if weight.is_quantized else (layouts.INPUT,):
        packed = layouts.pack(weight, tensor, layout)
        shape = layouts.packed_shape(weight)
        assert packed.dtype == np.uint8
        assert packed.shape == (shape.num_panels * shape.panel_bytes,)
        again = layouts.unpack(weight, packed, layout)
        assert again.values.dtype == tensor.values.dtype
        assert again.values.tobytes() == tensor.values.tobytes()
        assert (again.scales is None) == (tensor.scales is None)
        if again.scales is not None and tensor.scales is not None:
            assert again.scales.shape == tensor.scales.shape
            assert again.scales.tobytes() == tensor.scales.tobytes()


def test_int4_words_hold_low_and_high_inputs() -> None:
    """Output 5, step 1 of block 1 of a weight whose codes count up: inputs 136 .. 143."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (8, 16))
    tensor = Tensor(codes[:, 0::2] | codes[:, 1::2] << 4, np.ones((8, 2), np.float16))
    packed = layouts.pack(Weight("w", (8, 256), "int4", 128, "float16"), tensor, layouts.DOT)
    start = (128 * 64 // 2 + 64 * 2) + 1 * 256 + 5 * 4
    assert packed[start:start + 4].tolist() == [8 | 12 << 4, 9 | 13 << 4, 10 | 14 << 4, 11 | 15 << 4]


def test_bias_becomes_float32_and_comes_back() -> None:
    weight = Weight("b", (70,), "bfloat16")
    bias = np.linspace(-3, 3, 70, dtype=np.float32).astype(ml_dtypes.bfloat16)
    program, op = linear_program(Weight("w", (70, 64), "float16"), bias=weight)
    packed = Linear().pack(op, program, "bias", Tensor(bias), Linear().tactics(op, program, TARGET)[0])
    np.testing.assert_array_equal(packed.view(np.float32), bias.astype(np.float32))
    again = Linear().unpack(weight, packed, layouts.INPUT)
    assert again.values.dtype == bias.dtype
    np.testing.assert_array_equal(again.values.view(np.uint16), bias.view(np.uint16))


def linear_program(weight: Weight, attributes: dict[str, object] | None = None, *,
                   bias: Weight | None = None) -> tuple[Program, Op]:
    weights = {"weight": weight} | ({} if bias is None else {"bias": bias})
    op = Op("l", "linear", ("x",), ("y",), {role: w.name for role, w in weights.items()}, attributes or {})
    buffers = {name: Buffer(name, ("tokens", size), "float32")
               for name, size in (("x", weight.shape[1]), ("y", weight.shape[0]))}
    return Program(buffers, {w.name: w for w in weights.values()}, (op,)), op


@pytest.mark.parametrize(("weight", "attributes", "supported"), [
    (Weight("w", (64, 256), "int4", 128, "float16"), {"activation_group": 128}, True),
    (Weight("w", (64, 256), "int4", 128, "float16"), {"activation_group": 64}, False),
    (Weight("w", (64, 256), "int4", 128, "float16"), {}, True),
    (Weight("w", (64, 256), "int8", -1, "float32"), {"activation_group": 128}, True),
    (Weight("w", (64, 256), "int8", -1, "float32"), {"activation_group": 32}, False),
    (Weight("w", (64, 200), "int4", 128, "float16"), {"activation_group": 128}, False),
    (Weight("w", (64, 96), "int4", 48, "float16"), {"activation_group": 48}, False),
    (Weight("w", (64, 256), "float16"), {}, True),
    (Weight("w", (64, 256), "float16"), {"activation_group": 128}, False),
    (Weight("w", (64, 256), "float16"), {"gate": "relu"}, False),
])
def test_says_what_it_supports(weight: Weight, attributes: dict[str, object], supported: bool) -> None:
    program, op = linear_program(weight, attributes)
    assert Linear().supports(op, program, TARGET) is supported


def test_cost_is_the_bytes_that_are_stored() -> None:
    weight = Weight("w", (8192, 2048), "int4", 128, "float16")
    program, op = linear_program(weight, {"activation_group": 128})
    cost = Linear().cost(op, program, 1, 0)
    assert cost.bytes == 8192 * 2048 * 4.125 / 8 + 4 * (8192 + 2048)
    assert cost.operations == 2 * 8192 * 2048


@pytest.mark.parametrize(("name", "number"), [("native", None), ("x86-64-v3", 2), ("x86-64-v4", 2)])
def test_tactics_share_a_layout_and_differ_in_code(name: str, number: int | None) -> None:
    program, op = linear_program(Weight("w", (64, 256), "int4", 128, "float16"), {"activation_group": 128})
    tactics = Linear().tactics(op, program, resolve_target(name))
    assert number in (None, len(tactics))
    assert tactics[0].parameters == {}
    assert {tactic.layout for tactic in tactics} == {layouts.DOT}
    assert len({Linear().source(op, program, tactic).function for tactic in tactics}) == len(tactics) <= 4
