"""Kernels of several ranks, simulated: each rank a thread, waiting for words and flags that the others write.

Sums must be in rank order, so that they have the same bits everywhere, whatever the order in which warps run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
Floats = NDArray[np.float32]
HEADERS = ("decode_ranks.cuh", "prefill_ranks.cuh")
MODEL = TinyModel("mistral", hidden_size=128, num_layers=1, num_heads=2, num_kv_heads=2, head_size=128,
                  intermediate_size=256, vocab_size=512)
BOUNDS = {"float16": 4e-3, "bfloat16": 3e-2}


class Rank:
    """What one rank's thread launches: kernels by name, over NumPy arrays and its tw::Ranks."""

    def __init__(self, ranks: Any, kernels: Any, seed: int) -> None:
        self.rank, self.size, self.host = ranks.rank, ranks.size, ranks.host
        self._ranks, self._kernels, self._seed = ranks, kernels, seed + 1000 * ranks.rank

    def launch(self, function: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Arrays by address, ints as int32, floats as float32; a tuple is a structure."""
        self._seed += 1
        self._kernels[function].launch(grid, [threads], 0, _packed((self._ranks.state, *arguments)), seed=self._seed)

    def collect(self, function: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """A collective, and its end."""
        self.launch(function, grid, threads, 1, *arguments)
        self.launch("tw::count_collectives", (1,), 1, 1)


def _packed(arguments: tuple[Any, ...]) -> bytes:
    def field(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return ctypes.c_uint64(value.ctypes.data)
        if isinstance(value, tuple):
            return _structure(tuple(map(field, value)))
        return ctypes.c_float(value) if isinstance(value, float) else (ctypes.c_uint64 if value > 1 << 31 or value == 0
                                                                       else ctypes.c_int32)(value)
    return bytes(_structure(tuple(map(field, arguments))))


def _structure(values: tuple[Any, ...]) -> ctypes.Structure:
    fields = [(f"a{index}", type(value)) for index, value in enumerate(values)]
    made: ctypes.Structure = type("Structure", (ctypes.Structure,), {"_fields_": fields})(*values)
    return made


def on_ranks(size: int, functions: tuple[str, ...], run: Callable[[Rank], Any], *, seed: int = 0) -> list[Any]:
    from tensorwright.runtime.cuda.ranks import Shape
    from tensorwright.testing.simulator.compile import Kernels
    from tensorwright.testing.simulator.ranks import together

    names = (*functions, "tw::count_collectives")
    kernels = [Kernels([(HEADERS, names)], resolve_target("sm_90")) for _ in range(size)]
    return together(size, Shape(size, 1 << 14, 16, 1 << 14), lambda ranks: run(Rank(ranks, kernels[ranks.rank], seed)))


def numbers(rank: int, *shape: int) -> Floats:
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32)


def summed(parts: list[Floats]) -> Floats:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


@pytest.mark.parametrize(("size", "columns", "seed"), [(2, 10, 1), (3, 261, 2), (3, 10, 3)])
def test_sums_and_gathers_are_in_rank_order(size: int, columns: int, seed: int) -> None:
    grid = (5, -(-columns // 256))

    def run(rank: Rank) -> list[Floats]:
        found = []
        for turn in range(4):  # more than words have halves
            x, y = numbers(10 * turn + rank.rank, 5, columns), np.full((5, columns), np.nan, np.float32)
            wide = np.full((5, columns * size), np.nan, np.float32)
            rank.collect(f"tw::all_reduce<{columns}>", grid, 256, x, y)
            rank.collect(f"tw::all_gather<{columns}>", grid, 256, x, wide)
            found += [y, wide]
        return found

    found = on_ranks(size, (f"tw::all_reduce<{columns}>", f"tw::all_gather<{columns}>"), run, seed=seed)
    for turn in range(4):
        parts = [numbers(10 * turn + rank, 5, columns) for rank in range(size)]
        for rank in range(size):
            np.testing.assert_array_equal(found[rank][2 * turn], summed(parts))
            np.testing.assert_array_equal(found[rank][2 * turn + 1], np.concatenate(parts, axis=1))


@pytest.mark.parametrize("order", ["InputOrder", "CoreOrder"])
def test_a_step_s_sums_go_onto_the_stream(order: str) -> None:
    tokens, hidden, size = 8, 1280, 2
    function = f"tw::sum_residual<tw::half, tw::{order}<{tokens}>, {tokens}, {hidden}>"
    norm, before = numbers(20, hidden), numbers(21, tokens, hidden)

    def run(rank: Rank) -> tuple[Floats, NDArray[np.float16], Floats]:
        stream, x = before.copy(), np.full(tokens * hidden, np.nan, np.float16)
        squares = np.full((hidden // 16, tokens), np.nan, np.float32)
        rank.collect(function, (tokens,), 512, numbers(rank.rank, tokens, hidden), (stream, x, norm, squares))
        return stream, x, squares

    found = on_ranks(size, (function,), run)
    wanted = before + summed([numbers(rank, tokens, hidden) for rank in range(size)])
    token, k = np.meshgrid(np.arange(tokens), np.arange(hidden), indexing="ij")
    place = ((k // 128 * 4 + k // 32 % 4) * 8 + token) * 32 + k % 32 if order == "InputOrder" else (
        (k // 128 * 16 + (k // 32 % 4 * 2 + k // 2 % 2) * 2 + k // 4 % 2) * 64 + token * 8 + k // 8 % 4 * 2 + k % 2)
    for stream, x, squares in found:
        np.testing.assert_array_equal(stream, wanted)
        np.testing.assert_array_equal(x[place], (wanted * norm).astype(np.float16))
        np.testing.assert_allclose(squares.sum(axis=0), (wanted.astype(np.float64)**2).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize(("number", "dtype"), [("tw::half", np.float16), ("tw::bfloat16", ml_dtypes.bfloat16)])
def test_a_prompt_s_sums_go_onto_the_stream(number: str, dtype: Any) -> None:
    """A bias is one rank's; what travels has 16 bits, the sender's own part too."""
    rows, hidden, threads, size = 7, 520, 64, 3
    functions = tuple(f"tw::sum_norm<{number}, {hidden}, {threads}, {flag}, tw::Rows16<{number}>>"
                      for flag in ("true", "false"))
    norm, bias, before, epsilon = numbers(20, hidden), numbers(21, hidden), numbers(22, rows, hidden), 1e-5
    parts = [numbers(rank, rows, hidden).astype(dtype) for rank in range(size)]

    def run(rank: Rank) -> list[Any]:
        stream, x = before.copy(), np.zeros((rows, hidden), dtype)
        for function in functions:
            rank.collect(function, (rows,), threads, stream, parts[rank.rank], 0 if rank.rank else bias, norm, (x,),
                         epsilon)
        return [stream, x]

    found = on_ranks(size, functions, run)
    sent = [(part.astype(np.float32) + (bias if rank == 0 else 0)).astype(dtype) for rank, part in enumerate(parts)]
    once = before + summed([part.astype(np.float32) for part in sent])
    factor = 1 / np.sqrt((once.astype(np.float64)**2).mean(axis=1, keepdims=True) + epsilon)
    for stream, x in found:
        np.testing.assert_array_equal(stream, once + summed([part.astype(np.float32) for part in sent]))
        np.testing.assert_allclose(x.astype(np.float32), once * norm * factor, rtol=float(ml_dtypes.finfo(dtype).eps),
                                   atol=1e-5)


def test_a_rank_that_waits_for_nobody_gives_up() -> None:
    def run(rank: Rank) -> list[int]:
        if rank.rank == 0:
            rank.host[0] = 1  # as the host does when it hears that the other has ended
            x = numbers(0, 1, 4)
            rank.launch("tw::all_reduce<4>", (1, 1), 256, 1, x, x.copy())
        return rank.host.tolist()

    assert on_ranks(2, ("tw::all_reduce<4>",), run) == [[1, 1], [0, 0]]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    return {size: build_engine(Recipe(MODEL, "float16", tp_size=size, build={"target": "sm_90"}), folder / str(size))
            for size in (1, 2)}


def logits_of(executor: Any) -> list[Floats]:
    """Of prompts, and of steps of one and of two sequences."""
    lengths = (7, 3)
    found = [executor.execute(make_batch([(n, n) for n in lengths], 16, num_outputs=2)[0])]
    for count in (1, 2):
        step = make_batch([(1, n) for n in lengths[:count]], 16)[0]
        found.append(executor.execute(type(step)(**{**vars(step), "output_rows": np.arange(count, dtype=np.int32)})))
    return found


@pytest.fixture(scope="module")
def alone(engines: dict[int, Path]) -> list[Floats]:
    from tensorwright.testing.simulator.executor import SimulatedExecutor

    return logits_of(SimulatedExecutor(Engine.open(engines[1]), num_blocks=8, stretches=False))


@pytest.mark.parametrize(("stretches", "has_peers"), [(True, True), (False, True), (True, False)],
                         ids=["fused", "op by op", "library"])
def test_two_ranks_give_the_logits_of_one(stretches: bool, has_peers: bool, engines: dict[int, Path],
                                          alone: list[Floats]) -> None:
    from tensorwright.runtime.cuda.ranks import shape_of
    from tensorwright.testing.simulator.executor import SimulatedExecutor
    from tensorwright.testing.simulator.ranks import together

    def run(ranks: Any) -> list[Floats]:
        engine = Engine.open(engines[2], ranks.rank)
        return logits_of(SimulatedExecutor(engine, num_blocks=8, stretches=stretches, ranks=ranks,
                                           seed=1000 * ranks.rank))

    first, second = together(2, shape_of(Engine.open(engines[2]), 256), run, has_peers=has_peers)
    for given, same, wanted in zip(first, second, alone, strict=True):
        np.testing.assert_array_equal(given, same)
        assert np.abs(given - wanted).max() < BOUNDS["float16"] * np.abs(wanted).max()
