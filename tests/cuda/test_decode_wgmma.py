"""Decode steps of 8 to 64 sequences on sm_90's tensor cores, in the simulator: one linear, and whole steps."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.checkpoint.convert import DType
from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda import targets, units
from tensorwright.kernels.cuda.decode_wgmma import WgmmaTile, wgmma_linear
from tensorwright.kernels.interface import Tensor
from tensorwright.program.program import Weight
from tensorwright.program.reference import dequantize
from tensorwright.testing.engines import INT4, build_dummy
from tensorwright.testing.gpu_cases import BOUNDS
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
TARGET = targets.resolve_target("sm_90")
ROWS, INPUTS, PARTIALS, EPSILON = 512, 768, 4, 1e-5
HEADERS = ("decode_chain.cuh", "linear_wgmma.cuh")


def core_order(x: NDArray[Any]) -> NDArray[Any]:
    """[tokens, K] as native/outputs.cuh draws it."""
    tokens, inputs = x.shape
    split = x.reshape(tokens // 8, 8, inputs // 128, 4, 4, 2, 2, 2)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 6, 5, 1, 4, 7)).reshape(-1)


def weight_of(dtype: str, group: int, random: np.random.Generator) -> tuple[Weight, Tensor, NDArray[np.float64]]:
    """A random one in float16 or with such scales, and its numbers."""
    if dtype == "float16":
        values = (random.standard_normal((ROWS, INPUTS)) / 30).astype(np.float16)
        return Weight("", (ROWS, INPUTS), dtype), Tensor(values), values.astype(np.float64)
    weight = Weight("", (ROWS, INPUTS), dtype, group, "float16")
    codes = (random.integers(0, 256, (ROWS, INPUTS // 2), np.uint8) if dtype == "int4"
             else random.integers(-127, 128, (ROWS, INPUTS), np.int8))
    scales = (random.random((ROWS, INPUTS // group if group > 0 else 1)) / 1000 + 1e-4).astype(np.float16)
    return weight, Tensor(codes, scales), dequantize(codes, scales, dtype).astype(np.float64)


@pytest.mark.parametrize(("dtype", "group", "tokens", "cut", "blocks"), [
    ("int4", 128, 8, (2, 2, 2), 5), ("int4", 32, 32, (4, 1, 2), 3), ("int8", -1, 16, (2, 1, 1), 7),
    ("float16", 0, 64, (2, 1, 1), 11)])
def test_a_linear_adds_its_product_to_the_stream(dtype: str, group: int, tokens: int, cut: tuple[int, int, int],
                                                 blocks: int) -> None:
    """Normed by sums of squares; row blocks are whole in one thread block, cut between two, and between many."""
    from tensorwright.testing.simulator.compile import Kernels

    random = np.random.default_rng(tokens)
    weight, tensor, numbers = weight_of(dtype, group, random)
    tile = WgmmaTile(weight, tokens, *cut)
    launch = wgmma_linear(tile, PARTIALS, f"tw::ResidualBlock<tw::half, {tokens}, {ROWS}>", ())
    x = random.standard_normal((tokens, INPUTS)).astype(np.float16)
    stream = random.standard_normal((tokens, ROWS)).astype(np.float32)
    norm = random.random(ROWS).astype(np.float32)
    squares = random.random((PARTIALS, tokens)).astype(np.float32) * 300
    inverse_rms = (squares.astype(np.float64).sum(axis=0) / INPUTS + EPSILON) ** -0.5
    wanted = stream + x.astype(np.float64) @ numbers.T * inverse_rms[:, None]

    packed, given = units.pack(weight, tensor, units.IN_ORDER), core_order(x)
    next_x = np.full(tokens * ROWS, np.nan, np.float16)
    next_squares = np.full((ROWS // tile.rows, tokens), np.nan, np.float32)
    parts, arrivals = np.full(blocks * tile.part_bytes, 255, np.uint8), np.zeros(ROWS // tile.rows, np.int32)
    row_scales = packed.ctypes.data + units.Shape(weight).bytes if units.Shape(weight).has_row_scales else 0
    parameters = struct.pack(
        "4Qf4x4Q2Q", packed.ctypes.data, given.ctypes.data, squares.ctypes.data, row_scales, EPSILON,
        stream.ctypes.data, next_x.ctypes.data, norm.ctypes.data, next_squares.ctypes.data, parts.ctypes.data,
        arrivals.ctypes.data)
    arrays = (packed, given, squares, stream, norm, next_x, next_squares, parts, arrivals)
    kernel = Kernels([(HEADERS, (launch.function,))], TARGET)[launch.function]
    kernel.launch([blocks], [launch.threads], launch.shared_bytes, parameters,
                  ranges=[(array.ctypes.data, array.nbytes) for array in arrays], seed=blocks)
    np.testing.assert_allclose(stream, wanted, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(next_x, core_order((wanted * norm).astype(np.float16)), rtol=4e-3, atol=4e-3)
    np.testing.assert_allclose(next_squares.sum(axis=0), (wanted ** 2).sum(axis=1), rtol=1e-3)
    assert not arrivals.any()


@pytest.mark.parametrize(("dtype", "flags", "processors", "counts"), [
    ("float16", INT4, 8, (8, 64)), ("bfloat16", ("--use_weight_only",), 13, (32,))], ids=["int4", "int8"])
def test_all_layers_in_one_kernel_leave_what_their_ops_leave(
        dtype: DType, flags: tuple[str, ...], processors: int, counts: tuple[int, ...], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps each: what blocks wait for in the second begins as the first left it."""
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    monkeypatch.setitem(targets.PROCESSORS, "sm_90", processors)  # type: ignore[arg-type]  # a dict
    model = TinyModel("mistral", hidden_size=512, num_heads=4, num_kv_heads=2, head_size=128, intermediate_size=640,
                      vocab_size=2048)
    engine = Engine.open(build_dummy(model, tmp_path, dtype, flags, target="sm_90", tokens_per_block=16,
                                     max_seq_len=512, max_num_tokens=256))
    fused, plain = (SimulatedExecutor(engine, num_blocks=256, processors=processors, stretches=stretches)
                    for stretches in (True, False))
    for count in counts:
        lengths = [300, *((37 * i) % 40 + 1 for i in range(1, count))]  # the first is cut into chunks of keys
        for more in range(2):
            step = make_batch([(1, length + more) for length in lengths], 16)[0]
            step = type(step)(**{**vars(step), "output_rows": np.arange(count, dtype=np.int32)})
            assert fused.stretch(step) == f"decode_{count}_on_{processors}"
            given, wanted = (executor.execute(step) for executor in (fused, plain))
            assert np.abs(given - wanted).max() < BOUNDS[dtype] * np.abs(wanted).max()
            for name in ("layers.0.kv", "layers.1.kv"):
                kept = plain.buffer(name).astype(np.float32)
                assert np.abs(fused.buffer(name).astype(np.float32) - kept).max() < BOUNDS[dtype] * np.abs(kept).max()
