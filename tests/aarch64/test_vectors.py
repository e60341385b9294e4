"""Kernels cross-compiled for aarch64 and run under qemu-user, against the NumPy references: `make test-all`.

Inputs go to one static program as a stream of bytes (driver.cpp), and what it computed comes back as one. The emulated
CPUs have no more than the targets ask for, so an instruction beyond them stops the program.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.engine.format import KERNELS, Reader
from tensorwright.kernels.cpu.abi import Run, Sampling
from tensorwright.kernels.cpu.compile import FLAGS, engine_source
from tensorwright.kernels.cpu.registry import find_kernel
from tensorwright.kernels.cpu.targets import PORTABLE, TARGETS
from tensorwright.kernels.interface import Target, Tensor, symbols
from tensorwright.program.ops import BATCH_INPUTS, OPS
from tensorwright.program.program import Buffer, Program, Weight
from tensorwright.runtime import sampling
from tensorwright.runtime.batch import Batch, SamplingRow
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.native_ops import make_batch, one_op

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [pytest.mark.aarch64, pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}: apt-get install g++-aarch64-linux-gnu qemu-user")]

MACHINES = {"aarch64": (TARGETS["aarch64"], "neoverse-n1"), "portable": (PORTABLE["aarch64"], "cortex-a53")}
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
                          "int8": np.int8}
BLOCK = 16
BATCHES = {"decode": [(1, 9), (1, 140), (1, 33)], "mixed": [(5, 5), (1, 30), (35, 40)]}
Arrays = dict[str, NDArray[Any]]


def rows(name: str, columns: int, symbol: str = "tokens") -> Buffer:
    return Buffer(name, (symbol, columns), "float32")


def linear(outputs: int, inputs: int, dtype: str, group: int = 0, *, scales: str = "float16", activations: int = 0,
           norm: bool = False, gate: str = "", bias: bool = False, residual: bool = False) -> Program:
    weights = {"weight": Weight("weight", (outputs, inputs), dtype, group, scales if group else "")}
    weights |= {"bias": Weight("bias", (outputs,), "bfloat16")} if bias else {}
    weights |= {"norm": Weight("norm", (inputs,), "bfloat16")} if norm else {}
    buffers = {"x": rows("x", inputs * (2 if gate else 1)), "y": rows("y", outputs)}
    buffers |= {"residual": rows("residual", outputs)} if residual else {}
    return one_op("linear", buffers, weights, activation_group=activations, norm_epsilon=1e-5, gate=gate)


def caches(kv_heads: int, size: int, dtype: str) -> dict[str, Buffer]:
    found = {"kv": Buffer("kv", ("blocks", 2, kv_heads, BLOCK, size), dtype, "cache")}
    if dtype == "int8":
        found["kv_scales"] = Buffer("kv_scales", ("blocks", 2, kv_heads, BLOCK), "float32", "cache")
    return found


def attention(heads: int, kv_heads: int, size: int, dtype: str, window: int = 0) -> Program:
    buffers = {name: rows(name, heads * size) for name in "qy"} | caches(kv_heads, size, dtype)
    return one_op("attention", buffers, num_heads=heads, num_kv_heads=kv_heads, head_size=size, scale=size**-0.5,
                  window=window)


def rope_cache(heads: int, kv_heads: int, size: int, dtype: str, norm: bool = False) -> Program:
    buffers = {"qkv": rows("qkv", (heads + 2 * kv_heads) * size), "q": rows("q", heads * size),
               **caches(kv_heads, size, dtype)}
    weights = {"inverse_frequencies": Weight("f", (size // 2,), "float32")}
    if norm:
        weights |= {name: Weight(name, (size,), "float32") for name in ("q_norm", "k_norm")}
    return one_op("rope_cache", buffers, weights, num_heads=heads, num_kv_heads=kv_heads, head_size=size,
                  attention_factor=1.25, norm_epsilon=1e-6)


PROGRAMS = {
    "linear-int4": linear(192, 256, "int4", 128, activations=128, norm=True),
    "linear-int4-groups": linear(100, 160, "int4", 32, scales="bfloat16", activations=32, gate="silu", residual=True),
    "linear-int4-channel": linear(130, 300, "int4", -1, scales="float32", activations=128, bias=True),
    "linear-int4-exact": linear(90, 256, "int4", 128, norm=True, residual=True),
    "linear-int8": linear(192, 256, "int8", -1, activations=128, gate="gelu"),
    "linear-int8-exact": linear(70, 301, "int8", -1, gate="gelu_tanh", bias=True),
    "linear-float16": linear(128, 256, "float16", norm=True, residual=True),
    "linear-bfloat16": linear(50, 50, "bfloat16", bias=True),
    "linear-float32": linear(65, 47, "float32", gate="silu"),
    "rms_norm": one_op("rms_norm", {name: rows(name, 100) for name in "xy"}, {"weight": Weight("w", (100,), "float16")},
                       epsilon=1e-5, head_size=0),
    "embedding": one_op("embedding", {"y": rows("y", 37)}, {"table": Weight("table", (7, 37), "float16")}),
    "gather_rows": one_op("gather_rows", {"x": rows("x", 37), "y": rows("y", 37, "outputs")}),
    "rope_cache-float16": rope_cache(4, 2, 36, "float16"),
    "rope_cache-bfloat16": rope_cache(4, 2, 32, "bfloat16"),
    "rope_cache-int8": rope_cache(3, 3, 20, "int8", norm=True),
    "attention-float16": attention(4, 1, 36, "float16"),
    "attention-float16-window": attention(8, 8, 64, "float16", window=50),
    "attention-bfloat16": attention(6, 2, 80, "bfloat16"),
    "attention-int8": attention(8, 2, 128, "int8"),
}
SAMPLERS = (
    SamplingRow(), SamplingRow(temperature=0.7, uniform=0.3), SamplingRow(temperature=1.0, top_k=40, uniform=0.6),
    SamplingRow(temperature=1.3, top_p=0.9, uniform=0.8), SamplingRow(temperature=1.0, min_p=0.05, uniform=0.2),
    SamplingRow(temperature=0.8, top_k=300, top_p=0.8, min_p=0.01, uniform=0.5),
    SamplingRow(repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3, seen=tuple(range(20, 60)),
                counts=tuple(i % 3 for i in range(40)), biased=(0, 30, 0), biases=(-np.inf, 1.0, 0.0)),
)
VOCABULARY = 1000
SAMPLING, END = -1, -2  # in driver.cpp


@dataclass(frozen=True)
class Vector:
    """One op with everything that it reads."""

    program: Program
    batch: Batch
    arrays: Arrays
    weights: Mapping[str, Tensor]


def tensor(weight: Weight, random: np.random.Generator) -> Tensor:
    """A weight in the checkpoint's neutral layout."""
    if not weight.is_quantized:
        return Tensor(random.uniform(-1.5, 1.5, weight.shape).astype(DTYPES[weight.dtype]))
    out, inputs = weight.shape
    shape = (out, inputs // weight.group_size) if weight.group_size > 0 else (out,)
    scales = random.uniform(0.5, 1.5, shape).astype(DTYPES[weight.scale_dtype])
    if weight.dtype == "int8":
        return Tensor(random.integers(-128, 128, weight.shape, np.int8), scales)
    return Tensor(random.integers(0, 256, (out, inputs // 2), np.uint8), scales)


def make_vector(program: Program, lengths: Sequence[tuple[int, int]], seed: int) -> Vector:
    random = np.random.default_rng(seed)
    batch, blocks = make_batch(lengths, BLOCK, num_outputs=4, seed=seed)
    batch.slots[1] = -1
    sizes = {"tokens": batch.token_ids.shape[0], "outputs": 4, "blocks": blocks}
    arrays: Arrays = {}
    for name, buffer in program.buffers.items():
        if buffer.kind != "input":
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in buffer.shape)
            spread = 30 if buffer.dtype == "int8" else 0.05 if name == "kv_scales" else 1
            arrays[name] = (random.standard_normal(shape) * spread).astype(DTYPES[buffer.dtype])
    weights = {role: tensor(program.weights[held], random) for role, held in program.ops[0].weights.items()}
    return Vector(program, batch, arrays, weights)


def vectors() -> dict[str, Vector]:
    """Every op with every batch."""
    return {f"{name}-{batch}": make_vector(program, lengths, seed) for seed, (name, program) in
            enumerate(PROGRAMS.items()) for batch, lengths in BATCHES.items()}


def logits() -> NDArray[np.float32]:
    return (np.random.default_rng(0).standard_normal((len(SAMPLERS), VOCABULARY)) * 3).astype(np.float32)


def blob(array: NDArray[Any] | None) -> bytes:
    if array is None:
        return struct.pack("<q", -1)
    content = np.ascontiguousarray(array).tobytes()
    return struct.pack("<q", len(content)) + content


def blobs(arrays: Sequence[NDArray[Any] | None]) -> bytes:
    return struct.pack("<i", len(arrays)) + b"".join(map(blob, arrays))


def buffer_names(program: Program) -> list[str]:
    op = program.ops[0]
    return [name for name in dict.fromkeys((*op.inputs, *op.outputs)) if name not in BATCH_INPUTS]


def kernel_case(vector: Vector, kernel_index: int, target: Target) -> bytes:
    """What driver.cpp's run_kernel reads."""
    program, batch, op = vector.program, vector.batch, vector.program.ops[0]
    kernel = find_kernel(op, program, target)
    tactic = kernel.tactics(op, program, target)[0]
    packed = {role: kernel.pack(op, program, role, held, tactic) for role, held in vector.weights.items()}
    run = Run(batch.token_ids.shape[0], batch.query_starts.shape[0], batch.output_rows.shape[0],
              batch.block_tables.shape[1])
    scratch = kernel.scratch_bytes(op, program, tactic, batch.token_ids.shape[0])
    rows_of = int(program.buffers[op.outputs[0]].shape[0] == "outputs")
    return b"".join((
        struct.pack("<i", kernel_index), bytes(run), struct.pack("<qi", scratch, rows_of),
        blobs([getattr(batch, name) for name in BATCH_INPUTS]),
        blobs([vector.arrays[name] for name in buffer_names(program)]),
        blobs([packed.get(role.rstrip("?")) for role in OPS[op.kind].weights])))


def sampling_case() -> bytes:
    """What driver.cpp's run_sampling reads."""
    requests, lists = b"", b""
    for row in SAMPLERS:
        request = Sampling(row.temperature, row.top_p, row.min_p, row.top_k, row.repetition_penalty,
                           row.presence_penalty, row.frequency_penalty, row.uniform, len(row.seen), len(row.biased))
        requests += bytes(request)
        lists += b"".join(blob(np.array(getattr(row, name), np.int32)) for name in ("seen", "counts", "biased"))
        lists += blob(np.array(row.biases, np.float32))
    return (struct.pack("<iii", SAMPLING, len(SAMPLERS), VOCABULARY) + blob(logits())
            + blob(np.frombuffer(requests, np.uint8)) + lists)


def compile_driver(target: Target, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The driver with all kernels, statically linked, and the symbol of each program."""
    sources = []
    for program in PROGRAMS.values():
        kernel = find_kernel(program.ops[0], program, target)
        sources.append(kernel.source(program.ops[0], program, kernel.tactics(program.ops[0], program, target)[0]))
    (folder / "engine.cpp").write_text(engine_source(sources), encoding="utf-8")
    names = symbols(sources)
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    command = [COMPILER, *flags, *target.flags, "-static", f"-DTW_KERNELS={','.join(dict.fromkeys(names))}",
               f"-I{folder}", str(Path(__file__).with_name("driver.cpp")), "-o", str(folder / "driver"), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]
    return folder / "driver", names


class Results:
    """Buffers by vector, then tokens and log probabilities, cut out of what the driver wrote."""

    def __init__(self, content: bytes) -> None:
        self._content, self._read = content, 0
        self.buffers = {name: {buffer: self._next(vector.arrays[buffer]) for buffer in buffer_names(vector.program)}
                        for name, vector in vectors().items()}
        self.tokens = self._next(np.zeros(len(SAMPLERS), np.int32))
        self.log_probs = self._next(np.zeros(len(SAMPLERS), np.float32))
        assert self._read == len(content)

    def _next(self, like: NDArray[Any]) -> NDArray[Any]:
        array = np.frombuffer(self._content, like.dtype, like.size, self._read).reshape(like.shape)
        self._read += like.nbytes
        return array


@pytest.fixture(scope="module", params=MACHINES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """Of one and of three workers."""
    target, cpu = MACHINES[request.param]
    driver, symbols = compile_driver(target, tmp_path_factory.mktemp(request.param))
    index = {name: list(dict.fromkeys(symbols)).index(symbol)
             for name, symbol in zip(PROGRAMS, symbols, strict=True)}
    stream = b"".join(kernel_case(vector, index[name.rpartition("-")[0]], target)
                      for name, vector in vectors().items()) + sampling_case() + struct.pack("<i", END)
    found = {}
    for workers in (1, 3):
        run = subprocess.run([EMULATOR, "-cpu", cpu, str(driver), str(workers)], input=stream, capture_output=True,
                             check=False, timeout=120)
        assert run.returncode == 0, run.stderr.decode(errors="replace")
        found[workers] = Results(run.stdout)
    return found


def row_errors(given: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.float64]:
    """Largest difference of each row, relative to the row's largest number."""
    difference = np.abs(given.astype(np.float64) - wanted.astype(np.float64)).max(axis=-1)
    return np.asarray(difference / np.maximum(np.abs(wanted.astype(np.float64)).max(axis=-1), 1e-6))


@pytest.mark.parametrize("name", [f"{name}-{batch}" for name in PROGRAMS for batch in BATCHES])
def test_op_matches_the_reference(results: dict[int, Results], name: str) -> None:
    vector = vectors()[name]
    op, program = vector.program.ops[0], vector.program
    given = results[1].buffers[name]
    inputs = {**{field: getattr(vector.batch, field) for field in BATCH_INPUTS},
              **{field: array.copy() for field, array in vector.arrays.items()}}
    wanted = find_kernel(op, program, TARGETS["aarch64"]).reference(op, program, inputs, vector.weights)
    for output in op.outputs:
        dtype, errors = program.buffers[output].dtype, row_errors(given[output], wanted[output])
        if dtype == "int8":  # another last bit before rounding may give the neighbouring code
            different = given[output] != wanted[output]
            assert np.abs(given[output].astype(int) - wanted[output]).max() <= 1
            assert different.mean() < 0.01
        elif op.attributes.get("activation_group"):  # so may one code of a row; the rest agrees as float32 does
            assert errors.max() < 0.01
            assert np.mean(errors > 1e-5) < 0.1
        else:
            assert errors.max() < {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-5)


def test_bits_do_not_depend_on_the_number_of_workers(results: dict[int, Results]) -> None:
    for name, buffers in results[1].buffers.items():
        for buffer, array in buffers.items():
            assert array.tobytes() == results[3].buffers[name][buffer].tobytes(), (name, buffer)
    np.testing.assert_array_equal(results[1].tokens, results[3].tokens)


def test_sampling_matches_the_reference(results: dict[int, Results]) -> None:
    tokens, log_probs = sampling.choose(logits(), SAMPLERS)
    np.testing.assert_array_equal(results[1].tokens, tokens)
    np.testing.assert_allclose(results[1].log_probs, log_probs, rtol=1e-5, atol=1e-5)


def test_a_whole_engine_is_built_for_the_other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", COMPILER)
    folder = build_engine(Recipe(algorithm="W4A16", build={"target": "aarch64"}), tmp_path)
    reader = Reader(folder / "rank0.engine")
    assert reader.metadata["architecture"] == "aarch64"
    machine = struct.unpack_from("<H", reader.checked(KERNELS), 18)[0]
    assert machine == 183  # EM_AARCH64 in the ELF header
