"""Attention's kernels compile for every target, within its registers and shared memory."""

from __future__ import annotations

import pytest

from tensorwright.kernels.cuda.attention import Attention, attention_launch, decode_attention_launch
from tensorwright.kernels.cuda.compile import compile_modules
from tensorwright.kernels.cuda.launch import gpu_source
from tensorwright.kernels.cuda.targets import SHARED_BYTES, TARGET_NAMES, resolve_target
from tensorwright.program.program import Buffer, Program
from tensorwright.testing.native_ops import one_op

FEW_BYTES = 96  # put aside around the loop over keys
RESERVED = 1 << 10  # by the driver, of each block's shared memory


def attention(dtype: str, size: int, window: int = 0) -> Program:
    buffers = {name: Buffer(name, ("tokens", 8 * size), "float32") for name in "qy"}
    buffers["kv"] = Buffer("kv", ("blocks", 2, 2, 64, size), dtype, "cache")
    if dtype == "int8":
        buffers["kv_scales"] = Buffer("kv_scales", ("blocks", 2, 2, 64), "float32", "cache")
    return one_op("attention", buffers, num_heads=8, num_kv_heads=2, head_size=size, scale=size**-0.5, window=window,
                  activation_bits=0)


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_attention_fits_every_target(name: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: the packages cuda-bindings and nvidia-cuda-nvrtc")
    target = resolve_target(name)
    launches = []
    for dtype, size, numbers in (("int8", 128, "float"), ("bfloat16", 256, "tw::bfloat16")):
        program = attention(dtype, size, window=1000)
        op = program.ops[0]
        tactic = Attention().tactics(op, program, target)[0]
        launches.append(attention_launch(op, program, tactic, numbers=(numbers, numbers)))
    functions = {name: function for module in compile_modules([gpu_source(("attention.cuh",), *launches)], target)
                 for name, function in module.functions.items()}
    for launch in launches:
        function = functions[launch.function]
        assert function.spilled_bytes <= FEW_BYTES, launch.function
        assert function.registers * launch.threads <= 65536
        assert function.shared_bytes + launch.shared_bytes <= SHARED_BYTES[name]


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3"])
def test_two_blocks_share_a_multiprocessor_where_there_is_room(name: str, dtype: str) -> None:
    program, target = attention(dtype, 128), resolve_target(name)
    launch = attention_launch(program.ops[0], program, Attention().tactics(program.ops[0], program, target)[0])
    static = 1 << 10
    assert 2 * (launch.shared_bytes + static + RESERVED) <= SHARED_BYTES[name] + RESERVED


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_decode_attention_keeps_tiles_on_their_way_at_every_bucket(name: str) -> None:
    program, target = attention("float16", 128), resolve_target(name)
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        launch = decode_attention_launch(program.ops[0], program, target, tokens, "tw::InputOrder<1>", 2, ())
        warps, resident = launch.threads // 32, 256 // launch.threads
        slots = launch.shared_bytes // (warps * 16 * 136 * 2)
        assert slots >= 2
        declared = warps * 4 * (136 * 2 + 8) + 64
        assert resident * (launch.shared_bytes + declared + RESERVED) <= SHARED_BYTES[name] + RESERVED
