"""Times the linear kernels on the shapes of a 1.1 B Llama: GB/s of weights for few rows, GOP/s for many.

    python benchmarks/linear.py --threads 2 --rows 1,8,16,512 --json linear.json

Weights are random and go round through more than 256 MB of copies, so that few rows are timed from memory, not cache.
Each figure is the best of several repeats: other programs on the machine can only make it worse.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tensorwright.kernels.cpu.abi import Run, Step, addresses, aligned
from tensorwright.kernels.cpu.compile import compile_shared, engine_source
from tensorwright.kernels.cpu.layouts import DTYPES
from tensorwright.kernels.cpu.linear import Linear
from tensorwright.kernels.cpu.load import load_library, thread_pool
from tensorwright.kernels.cpu.targets import TARGET_NAMES, resolve_target
from tensorwright.kernels.interface import Tactic, Target, Tensor, symbols
from tensorwright.program.program import Buffer, Op, Program, Weight

ROTATED_BYTES = 256 << 20
LINEARS = {  # name: outputs, inputs, weight, group, has norm, gate, has residual
    "qkv": (3072, 2048, "int4", 128, True, "", False),
    "attention.dense": (2048, 2048, "int4", 128, False, "", True),
    "gate and up": (16384, 2048, "int4", 128, True, "", False),
    "down": (2048, 8192, "int4", 128, False, "silu", True),
    "plain int4": (8192, 2048, "int4", 128, False, "", False),
    "plain int8": (8192, 2048, "int8", 128, False, "", False),
    "lm_head int8": (32000, 2048, "int8", -1, True, "", False),
    "plain float16": (8192, 2048, "float16", 0, False, "", False),
    "plain bfloat16": (8192, 2048, "bfloat16", 0, False, "", False),
}


@dataclass(frozen=True)
class Measurement:
    """One linear at one number of rows."""

    name: str
    threads: int
    rows: int
    seconds: float
    gigabytes_per_s: float  # of the packed weight
    gigaoperations_per_s: float


class Bench:
    """All linears compiled for a target, with one pool of threads."""

    def __init__(self, target: Target, threads: int) -> None:
        self.kernel, self.threads = Linear(), threads
        self.programs = {name: _program(*shape) for name, shape in LINEARS.items()}
        self.tactics = {name: self.kernel.tactics(program.ops[0], program, target)[0]
                        for name, program in self.programs.items()}
        sources = [self.kernel.source(program.ops[0], program, self.tactics[name])
                   for name, program in self.programs.items()]
        start = time.perf_counter()
        code = compile_shared(engine_source(sources), target)
        self.compile_s = time.perf_counter() - start
        self.library = load_library(code)
        self.symbols = dict(zip(self.programs, symbols(sources), strict=True))
        self.pool = thread_pool(self.library, threads).pointer

    def measure(self, name: str, rows: int, *, budget_s: float = 0.5) -> Measurement:
        """The best time of one execution over repeats within about `budget_s` seconds."""
        program, tactic = self.programs[name], self.tactics[name]
        op, weight = program.ops[0], program.weights["weight"]
        packed = self._packed(program, tactic)
        copies = min(max(1, ROTATED_BYTES // packed[0].nbytes), 1 if rows > 64 else 1 << 30)
        memory = aligned(packed[0].nbytes * copies).reshape(copies, -1)
        memory[:] = packed[0]
        random = np.random.default_rng(0)
        sizes = {b.name: int(b.shape[1]) for b in program.buffers.values()}
        arrays = [random.standard_normal((rows, sizes[n]), np.float32) for n in (*op.inputs, *op.outputs)]
        scratch = aligned(self.kernel.scratch_bytes(op, program, tactic, rows) + 64)
        buffers = addresses([array.ctypes.data for array in arrays])
        norm = packed[1].ctypes.data if len(packed) > 1 else 0
        tables = [addresses([copy.ctypes.data, 0, norm]) for copy in memory]
        kernel = ctypes.cast(self.library[self.symbols[name]], ctypes.c_void_p)
        steps = (Step * copies)(*(Step(kernel, ctypes.addressof(buffers), ctypes.addressof(table), 0, 0)
                                  for table in tables))
        run = Run(num_tokens=rows, scratch=scratch.ctypes.data)
        best, deadline, repeats = float("inf"), time.perf_counter() + budget_s, 0
        while repeats < 3 or time.perf_counter() < deadline:
            start = time.perf_counter()
            self.library.tw_execute(self.pool, steps, copies, ctypes.byref(run), None)
            best, repeats = min(best, (time.perf_counter() - start) / copies), repeats + 1
        return Measurement(name, self.threads, rows, best, packed[0].nbytes / best / 1e9,
                           2.0 * rows * weight.shape[0] * weight.shape[1] / best / 1e9)

    def _packed(self, program: Program, tactic: Tactic) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        op = program.ops[0]
        return [self.kernel.pack(op, program, role, _random_tensor(program.weights[role]), tactic)
                for role in ("weight", "norm") if role in op.weights]


def _program(outputs: int, inputs: int, dtype: str, group: int, norm: bool, gate: str, residual: bool) -> Program:
    weights = {"weight": Weight("weight", (outputs, inputs), dtype, group, "float16" if group else "")}
    if norm:
        weights["norm"] = Weight("norm", (inputs,), "float32")
    columns = {"x": inputs * (2 if gate else 1)} | ({"residual": outputs} if residual else {}) | {"y": outputs}
    op = Op("linear", "linear", tuple(columns)[:-1], ("y",), {role: role for role in weights},
            {"activation_group": 128 if group else 0, "norm_epsilon": 1e-5, "gate": gate})
    return Program({name: Buffer(name, ("tokens", size), "float32") for name, size in columns.items()}, weights, (op,))


def _random_tensor(weight: Weight) -> Tensor:
    random = np.random.default_rng(1)
    if not weight.is_quantized:
        return Tensor(random.standard_normal(weight.shape, np.float32).astype(DTYPES[weight.dtype]))
    width = weight.shape[1] // (2 if weight.dtype == "int4" else 1)
    codes = random.integers(0, 256, (weight.shape[0], width), np.uint8)
    scales = np.full((weight.shape[0], weight.shape[1] // weight.group_size if weight.group_size > 0 else 1), 0.01)
    return Tensor(codes if weight.dtype == "int4" else codes.view(np.int8), scales.astype(DTYPES[weight.scale_dtype]))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str]) -> int:
    """Print one line per linear and number of rows, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_numbers, default=[1, 2])
    parser.add_argument("--rows", type=_numbers, default=[1, 8, 16, 512])
    parser.add_argument("--target", choices=TARGET_NAMES, default="native")
    parser.add_argument("--linears", nargs="+", choices=tuple(LINEARS), default=tuple(LINEARS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results = []
    for threads in options.threads:
        bench = Bench(resolve_target(options.target), threads)
        for name in options.linears:
            for rows in options.rows:
                result = bench.measure(name, rows)
                results.append(result)
                print(f"{name:16} {threads} threads {rows:4} rows {result.seconds * 1e6:9.1f} us "
                      f"{result.gigabytes_per_s:6.1f} GB/s {result.gigaoperations_per_s:7.0f} GOP/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
