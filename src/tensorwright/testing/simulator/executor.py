"""An engine for GPUs whose kernels the simulator runs: its plan and launches are the runtime's, its memory the host's.

For the differential test (`testing.differential`) and for comparing stretches with the ops that they replace, on small
engines. Products of a library are torch's on the CPU. Every launch may touch the engine's own memory and nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from tensorwright.builder.plan import choose
from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.decode_steps import decode_stretches
from tensorwright.kernels.cuda.driver import KINDS
from tensorwright.kernels.cuda.launch import GpuSource, Launch, scratch_offsets
from tensorwright.kernels.cuda.prefill import prefill_stretches
from tensorwright.kernels.cuda.prefill_ranks import rank_prefill_stretches
from tensorwright.kernels.cuda.products import Matrix, Product
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.cuda.sample import step_sources
from tensorwright.kernels.cuda.targets import resolve_target
from tensorwright.runtime.batch import Batch
from tensorwright.runtime.cuda.inputs import Sizes, decode_bucket, sizes_of
from tensorwright.runtime.cuda.memory import DTYPES, entries_of
from tensorwright.runtime.cuda.plan import Plan
from tensorwright.testing.simulator.compile import Kernels
from tensorwright.testing.simulator.machine import SimulatedKernel
from tensorwright.testing.simulator.ranks import SimulatedRanks

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
PROCESSORS = 8
POISON = 0xFF


class SimulatedExecutor:
    """`testing.differential.StepExecutor` over the simulator."""

    def __init__(self, engine: Engine, *, num_blocks: int, processors: int = PROCESSORS, max_tokens: int = 256,
                 stretches: bool = True, seed: int = 0, races: bool = True,
                 ranks: SimulatedRanks | None = None) -> None:
        """`processors`: of the GPU that is simulated; `seed`: of the order in which warps run; `races`: look for them
        in shared memory; `ranks`: if several.
        """
        self.engine, self.program, self.vocab_size = engine, engine.program, engine.vocab_size
        self._width = -(-engine.limits.max_seq_len // engine.tokens_per_block)
        self._memory = _Memory(engine, num_blocks, processors, max_tokens)
        self._inputs = torch.zeros(1 << 16, dtype=torch.int32)
        self._plan = _SimulatedPlan(engine, self._memory, processors, self._inputs, races=races, stretches=stretches,
                                    seed=seed, ranks=ranks)

    def execute(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [R, V]."""
        self._run(batch, 0, len(self.program.ops))
        logits = self._memory.buffer(self.program.ops[-1].outputs[0], self.vocab_size)
        return np.asarray(logits[:batch.output_rows.shape[0]].numpy().copy())

    def execute_range(self, batch: Batch, begin: int, end: int) -> None:
        """Run the ops begin .. end − 1."""
        self._run(batch, begin, end)

    def stretch(self, batch: Batch) -> str | None:
        """The entry that runs all ops of such a batch at once."""
        sizes = decode_bucket(batch, BUCKETS, self._width) or sizes_of(batch)
        return self._plan.stretch(0, len(self.program.ops), sizes)

    def buffer(self, name: str) -> NDArray[Any]:
        """A copy of a buffer: caches whole, activations [rows, columns]."""
        cache = self._memory.tensors.get(name)
        if cache is None:
            return self._memory.buffer(name, int(self.program.buffers[name].shape[1])).numpy().copy()
        if cache.dtype == torch.bfloat16:
            return np.asarray(cache.view(torch.int16).numpy().copy()).view(ml_dtypes.bfloat16)
        if cache.dtype == torch.float8_e4m3fn:
            return np.asarray(cache.view(torch.uint8).numpy().copy()).view(ml_dtypes.float8_e4m3fn)
        return np.asarray(cache.numpy().copy())

    def fill_caches(self, seed: int) -> None:
        """Normal numbers in the place of what earlier steps would have written."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in self._memory.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def _run(self, batch: Batch, begin: int, end: int) -> None:
        is_whole = (begin, end) == (0, len(self.program.ops))
        sizes = (decode_bucket(batch, BUCKETS, self._width) if is_whole else None) or sizes_of(batch)
        self._plan.run(begin, end, sizes, self._send(batch, sizes), 0)

    def _send(self, batch: Batch, sizes: Sizes) -> dict[str, int]:
        starts, _ = sizes.offsets()
        numbers = self._inputs.numpy()
        for name, start in starts.items():
            array, into = getattr(batch, name), numbers[start:start + sizes.of(name)]
            into.fill(-1 if name == "slots" else 0)
            if name == "block_tables":
                into.reshape(sizes.sequences, -1)[:array.shape[0], :array.shape[1]] = array
            else:
                into[:array.shape[0]] = array
        return {name: int(self._inputs.data_ptr()) + 4 * start for name, start in starts.items()}


class _Memory:
    """Weights, caches, activations and scratch as `runtime.cuda.memory` lays them out, poisoned but for the caches."""

    def __init__(self, engine: Engine, num_blocks: int, processors: int, max_tokens: int) -> None:
        self._weights = {entry["name"]: torch.from_numpy(np.array(engine.reader.section(f"weights/{entry['name']}")))
                         for entry in engine.manifest["weights"]}
        self.tensors = {
            buffer.name: torch.zeros([num_blocks if dim == "blocks" else int(dim) for dim in buffer.shape],
                                     dtype=DTYPES[buffer.dtype])
            for buffer in engine.program.buffers.values() if buffer.kind == "cache"}
        memory = engine.manifest["memory"]
        self._slots = [_poisoned(4 * max_tokens * columns).view(torch.float32) for _, columns in memory["slots"]]
        self._slot_of: Mapping[str, int] = memory["slot_of"]
        symbols = {"one": 1, "processors": processors, "rows": max_tokens, "tokens": max_tokens,
                   "sequences": max_tokens, "outputs": max_tokens, "max_query_length": max_tokens, "table_width": 64}
        self.scratch = _poisoned(max(scratch_offsets(dict(source.scratch), symbols)[1]
                                     for source in entries_of(engine).values()) or 256)

    def address(self, name: str) -> int:
        """Where a weight or an activation begins."""
        tensor = self._weights[name] if name in self._weights else self._slots[self._slot_of[name]]
        return int(tensor.data_ptr())

    def buffer(self, name: str, columns: int) -> torch.Tensor:
        """A buffer [rows, columns] float32."""
        flat = self._slots[self._slot_of[name]]
        return flat[:flat.shape[0] // columns * columns].view(-1, columns)

    def all(self) -> Iterator[torch.Tensor]:
        """Every piece of it."""
        yield from (*self._weights.values(), *self.tensors.values(), *self._slots, self.scratch)


class _SimulatedPlan(Plan):
    """The runtime's plan with other launches."""

    def __init__(self, engine: Engine, memory: _Memory, processors: int, inputs: torch.Tensor, *, stretches: bool,
                 seed: int, races: bool, ranks: SimulatedRanks | None) -> None:
        given: Any = memory  # weights, caches and activations in one
        others: Any = ranks
        super().__init__(engine, given, given, given, processors, stretches=stretches, ranks=others)
        self._kernels = Kernels(_functions(engine), resolve_target(engine.target))
        self._memory, self._batch, self._seed, self.races, self._others = memory, inputs, seed, races, ranks
        self.submit: Callable[[Callable[[], object]], object] = lambda work: work()

    def _call(self, launch: Launch) -> Any:
        kinds = [KINDS[_kind(a)] if not isinstance(a, tuple) else [KINDS[_kind(each)] for each in a]
                 for a in launch.arguments]
        return _Call(self._kernels[launch.function], launch, kinds, self)

    def ranges(self) -> list[tuple[int, int]]:
        """(address, bytes) of all memory of the engine."""
        own = [(int(tensor.data_ptr()), tensor.numel() * tensor.element_size())
               for tensor in (*self._memory.all(), self._batch, *self._kept)]
        return own + (self._others.ranges() if self._others is not None else [])

    def next_seed(self) -> int:
        """Another order for each launch."""
        self._seed += 1
        return self._seed

    def _multiply(self, product: Product, rows: int, matrix: Matrix) -> None:
        def multiply() -> None:
            a, b = (matrix(name, count, product.inner, product.dtype).float()
                    for name, count in ((product.a, rows), (product.b, product.columns)))
            y = a @ b.t()
            if product.scales:
                y *= matrix(product.scales[0], rows, 1, torch.float32)
                y *= matrix(product.scales[1], product.columns, 1, torch.float32).t()
            matrix(product.c, rows, product.columns, product.result).copy_(y)

        self.submit(multiply)


class _Call:
    """`kernels.cuda.driver.Call` of a simulated kernel."""

    def __init__(self, kernel: SimulatedKernel, launch: Launch, kinds: Sequence[Any], plan: _SimulatedPlan) -> None:
        self._kernel, self._launch, self._plan = kernel, launch, plan
        parts = [[kind] if not isinstance(kind, list) else kind for kind in kinds]
        inner = [type("Argument", (ctypes.Structure,), {"_fields_": [(f"a{i}", kind) for i, kind in enumerate(part)]})
                 for part in parts]
        whole: Any = type("Parameters", (ctypes.Structure,), {"_fields_": [(f"p{i}", t) for i, t in enumerate(inner)]})
        self._values = whole()
        self._places = [(f"p{i}", f"a{j}") for i, part in enumerate(parts) for j in range(len(part))]

    def set(self, index: int, value: int | float) -> None:
        """Argument `index`, counted through all structures."""
        outer, inner = self._places[index]
        setattr(getattr(self._values, outer), inner, value)

    def launch(self, grid: Sequence[int], stream: int) -> None:
        """Run it to its end, when its turn comes."""
        parameters = bytes(self._values)
        self._plan.submit(lambda: self._kernel.launch(
            grid, [self._launch.threads], self._launch.shared_bytes, parameters, ranges=self._plan.ranges(),
            seed=self._plan.next_seed(), races=self._plan.races))


def late_parts(engine: Engine, launch: Callable[[Callable[[], object]], None], *, num_blocks: int) -> dict[str, Any]:
    """What `CudaExecutor` makes of an engine, over simulated memory; launches are handed over, to be run later."""
    memory = _Memory(engine, num_blocks, PROCESSORS, engine.limits.max_num_tokens)

    def plan(*_: Any, stretches: bool, ranks: None) -> _LatePlan:
        return _LatePlan(engine, memory, launch, stretches=stretches)

    return {**dict.fromkeys(("Weights", "Caches", "Activations"), lambda *_: memory), "Plan": plan}


class _LatePlan(_SimulatedPlan):
    """Launches with the arguments that they have now, at some later time. They may touch any memory."""

    def __init__(self, engine: Engine, memory: _Memory, launch: Callable[[Callable[[], object]], None], *,
                 stretches: bool) -> None:
        super().__init__(engine, memory, PROCESSORS, torch.zeros(1), stretches=stretches, seed=0, races=True,
                         ranks=None)
        self.submit = launch

    def ranges(self) -> list[tuple[int, int]]:
        """Anywhere."""
        return []


def _functions(engine: Engine) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Headers and functions of what the engine's program was compiled from."""
    plan = choose(engine.program, resolve_target(engine.target), KERNELS)
    layouts = {entry["name"]: entry["layout"] for entry in engine.manifest["weights"]}
    stretches = (stretch for stretches_of in (decode_stretches, prefill_stretches, rank_prefill_stretches)
                 for stretch in stretches_of(engine.program, plan.target, layouts))
    for source in (*plan.sources, *step_sources(engine.program).values(), *(stretch.source for stretch in stretches)):
        if isinstance(source, GpuSource):
            yield source.headers, source.functions


def _kind(argument: str | float) -> str:
    if isinstance(argument, str):
        return "int" if argument.startswith("sizes.") else "pointer"
    return "float" if isinstance(argument, float) else "int"


def _poisoned(size: int) -> torch.Tensor:
    return torch.full((-(-size // 16) * 16,), POISON, dtype=torch.uint8)
