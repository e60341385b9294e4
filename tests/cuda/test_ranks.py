"""Engines of several ranks for GPUs, as far as no GPU is needed: kernels, launches, and memory that ranks share."""

from __future__ import annotations

import re

import pytest

from tensorwright.builder.build import program_of
from tensorwright.builder.plan import choose
from tensorwright.checkpoint.config import CheckpointConfig, Quantization
from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.compile import NATIVE_FOLDER, compile_modules
from tensorwright.kernels.cuda.decode_steps import decode_stretches
from tensorwright.kernels.cuda.launch import (
    RANKS,
    Argument,
    GpuSource,
    Launch,
    flat,
    from_json,
    is_library_call,
    needs_peers,
)
from tensorwright.kernels.cuda.prefill_ranks import rank_prefill_stretches
from tensorwright.kernels.cuda.ranks import ONE_SHOT_BYTES, AllGather, AllReduce
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.cuda.targets import SHARED_BYTES, TARGET_NAMES, resolve_target
from tensorwright.kernels.headers import inlined
from tensorwright.models.families import from_huggingface
from tensorwright.program.program import Buffer, Op, Program
from tensorwright.testing.cubin import argument_sizes, parameter_sizes
from tensorwright.testing.engines import build_dummy
from tensorwright.testing.tiny import TinyModel, config

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
MODEL = TinyModel("mistral", hidden_size=512, num_heads=8, num_kv_heads=4, head_size=128, intermediate_size=1024,
                  vocab_size=1024)
SIZE, FEW_BYTES = 2, 64  # that a kernel may put aside before its loop


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[Engine]:
    """Of both ranks, with 16-bit weights of random numbers."""
    folder = build_dummy(MODEL, tmp_path_factory.mktemp("ranks"), "float16", ("--tp_size", str(SIZE)), target="sm_90",
                         workers=1)
    return [Engine.open(folder, rank) for rank in range(SIZE)]


def sources(engine: Engine) -> dict[str, GpuSource]:
    return {name: from_json(entry) for name, entry in engine.manifest["kernels"]["entries"].items()}


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_kernels_of_ranks_fit_every_target(target: str) -> None:
    """Those that wait for other ranks, in Mistral-Nemo's width."""
    pairs = "tw::half, tw::InputOrder<8>, 8, 5120"
    linear = "tw::small_linear<tw::Plain<tw::half>, 5120, 2048, 1, 8, 6, 1, 0, tw::SummedResidual<tw::half, 1, 5120>>"
    threads = {"tw::all_reduce<5120>": 256, "tw::all_gather<65536>": 256, "tw::count_collectives": 1,
               f"tw::sum_residual<{pairs}>": 512, linear: 256,
               "tw::sum_norm<tw::bfloat16, 5120, 640, true, tw::Rows16<tw::bfloat16>>": 640}
    modules = compile_modules([GpuSource(("decode_ranks.cuh", "prefill_ranks.cuh"), "", tuple(map(Launch, threads)))],
                              resolve_target(target))
    found = {name: function for module in modules for name, function in module.functions.items()}
    assert found.keys() == threads.keys()
    for name, function in found.items():
        assert function.spilled_bytes <= FEW_BYTES and function.registers * threads[name] <= 65536, name
        assert function.shared_bytes <= SHARED_BYTES[target]


def test_launches_hand_over_what_kernels_take(engines: list[Engine]) -> None:
    for engine in engines:
        facts, code = engine.manifest["kernels"], engine.kernels()
        wanted = {symbol: each for start, size in facts["modules"]
                  for symbol, each in parameter_sizes(code[start:start + size]).items()}
        for source in sources(engine).values():
            for launch in source.launches:
                if not is_library_call(launch.function):
                    symbol = facts["functions"][launch.function]["symbol"]
                    assert argument_sizes(launch.arguments) == wanted[symbol], launch.function


def test_ranks_run_the_same_launches_in_the_same_order(engines: list[Engine]) -> None:
    """Or one would wait for what another never sends."""
    first, second = map(sources, engines)
    assert first == second
    stretches = engines[0].manifest["kernels"]["stretches"]
    assert stretches == engines[1].manifest["kernels"]["stretches"]
    assert {stretch["entry"] for stretch in stretches} >= {"decode_1", "decode_2", "decode_4", "steps_from_9"}
    for stretch in stretches:
        assert engines[0].program.ops[stretch["end"]].kind == ("all_gather" if stretch["tokens"] else "gather_rows")
        *launches, count = first[stretch["entry"]].launches
        sums = [launch for launch in launches if RANKS in flat(launch.arguments)]
        assert [number_of(launch) for launch in sums] == list(range(1, 2 * MODEL.num_layers + 1))
        assert (count.function, count.arguments) == ("tw::count_collectives", (RANKS, len(sums)))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_step_of_a_large_model_sums_in_few_launches(target: str) -> None:
    """Two ranks of Mistral-Nemo's shape, 16-bit weights: all sums of its layers are parts of stretches."""
    shape = TinyModel("mistral", hidden_size=5120, num_heads=32, num_kv_heads=8, head_size=128, num_layers=2,
                      intermediate_size=14336, vocab_size=131072, dtype="float16")
    model = from_huggingface(config(shape))
    program = program_of(CheckpointConfig(model, Quantization(), tp_size=SIZE), 64, target=resolve_target(target))
    plan = choose(program, resolve_target(target), KERNELS)
    layouts = {name: choice.tactic.layout for choice in plan.choices for name in choice.op.weights.values()}
    found = [*decode_stretches(program, plan.target, layouts),
             *rank_prefill_stretches(program, plan.target, layouts)]
    assert {stretch.tokens for stretch in found} >= {0, 1, 2, 4, 8, 16, 32, 64}
    for stretch in found:
        sums = [launch for launch in stretch.source.launches if RANKS in flat(launch.arguments)]
        assert [number_of(launch) for launch in sums[:-1]] == list(range(1, 2 * shape.num_layers + 1)), stretch.entry
        assert sums[-1].function == "tw::count_collectives"


def number_of(launch: Launch) -> Argument:
    """Of a collective: what follows the ranks' state."""
    arguments = flat(launch.arguments)
    return arguments[arguments.index(RANKS) + 1]


@pytest.mark.parametrize(("columns", "rows"), [(64, 64), (5120, 25), (65536, 2), (200_000, 0)])
def test_small_messages_are_one_shot_and_no_other(columns: int, rows: int) -> None:
    buffers = {name: Buffer(name, ("tokens", columns), "float32") for name in "xy"}
    op = Op("sum", "all_reduce", ("x",), ("y",))
    program, kernel = Program(buffers, {}, (op,)), AllReduce()
    one_shot, library = kernel.tactics(op, program, resolve_target("sm_90"))
    for count in (1, 2, 3, 25, 26, 64, 65, 512):
        is_one_shot = (kernel.estimate(op, program, one_shot, count) < kernel.estimate(op, program, library, count))
        assert is_one_shot == (count <= rows)
        assert not is_one_shot or 4 * columns * count <= ONE_SHOT_BYTES
    assert [needs_peers(kernel.source(op, program, tactic)) for tactic in (one_shot, library)] == [True, False]


def test_a_library_gathers_rank_after_rank_and_columns_are_joined() -> None:
    buffers = {"x": Buffer("x", ("outputs", 10), "float32"), "y": Buffer("y", ("outputs", 30), "float32")}
    op = Op("gather", "all_gather", ("x",), ("y",))
    program, kernel = Program(buffers, {}, (op,)), AllGather()
    source = kernel.source(op, program, kernel.tactics(op, program, resolve_target("sm_90"))[-1])
    assert isinstance(source, GpuSource)
    gather, join = source.launches
    assert (gather.function, join.function) == ("all_gather", "tw::join_columns<10>")
    assert [size.at({"one": 1, "rows": 7}) for size in join.grid] == [7, 3, 1]
    assert dict(source.scratch)["gathered"].at({"rows": 7}) == 7 * 30 * 4


def test_the_device_sees_the_state_as_the_host_writes_it() -> None:
    """The same names in the same order, and types of the same size."""
    from tensorwright.runtime.cuda.ranks import MAX_RANKS, State

    struct = inlined(NATIVE_FOLDER, "ranks.cuh", set()).split("struct Ranks {")[1].split("};")[0]
    sizes = {"u64": 8, "int": 4, "u32": 4}
    found = []
    for line in re.sub(r"//.*", "", struct).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:volatile )?(\w+\*?) (.*)", line, re.DOTALL).groups()
        found += [(name, 8 * MAX_RANKS if "[" in name else 8 if "*" in kind else sizes[kind])
                  for name in names.split(", ")]
    assert found[0][0] == "memory[MAX_RANKS]"
    assert [(name.split("[")[0], size) for name, size in found] == [
        (name, getattr(State, name).size) for name, _ in State._fields_]


def test_pieces_of_shared_memory_do_not_overlap(engines: list[Engine]) -> None:
    from tensorwright.runtime.cuda.ranks import shape_of

    shape = shape_of(engines[0], 1000)
    assert shape.capacity * 4 >= ONE_SHOT_BYTES and shape.capacity >= 64 * MODEL.hidden_size
    assert shape.flags_at >= 2 * SIZE * shape.capacity * 8
    assert shape.parcels_at >= shape.flags_at + SIZE * 1000 * 4
    assert shape.bytes >= shape.parcels_at + 2 * SIZE * 1000 * MODEL.hidden_size * 2
