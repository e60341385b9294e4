"""An engine's plan bound to memory: every op's launches with their addresses. It knows launches, not their meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.driver import Call, Function, load_module
from tensorwright.kernels.cuda.launch import (
    RANKS,
    GpuSource,
    Launch,
    flat,
    is_library_call,
    needs_peers,
    operand_name,
    parameter_kinds,
    scratch_offsets,
)
from tensorwright.kernels.cuda.products import Matrix, Product
from tensorwright.kernels.cuda.sample import DRAW, GREEDY, TAKE
from tensorwright.program.ops import BATCH_INPUTS
from tensorwright.program.program import Op
from tensorwright.runtime.cuda.inputs import Sizes
from tensorwright.runtime.cuda.memory import Activations, Caches, Weights, entries_of
from tensorwright.runtime.cuda.ranks import Ranks

Symbols = Mapping[str, int]


@dataclass(frozen=True)
class _Bound:
    """A launch, and which of its arguments a step changes: (index, "inputs.positions" or "sizes.rows")."""

    call: Call
    changing: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class _Resolved:
    """What a step means to an entry: arguments that change, by name; scratch memory; the grids of its launches."""

    arguments: Mapping[str, int]
    offsets: Mapping[str, int]
    grids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Collective:
    """NCCL's sum or gather of `columns` numbers a row at address x, into address y or that piece of scratch memory."""

    run: Callable[[int, int, int, int], None]
    x: int
    y: int | str
    columns: int


class Plan:
    """All ops, bound when they first run at a tactic."""

    def __init__(self, engine: Engine, weights: Weights, caches: Caches, activations: Activations,
                 processors: int, *, stretches: bool = True, ranks: Ranks | None = None) -> None:
        """`stretches`: whether ops may run several at once where the engine has kernels for it. `ranks`: if several."""
        # Parts of a sum that were rounded to 16 bits before they are added could overflow, whatever the sum is.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._engine, self._weights, self._caches, self._activations = engine, weights, caches, activations
        self._processors, self._facts = processors, engine.manifest["kernels"]
        self._entries, self._code, self._ranks = entries_of(engine), engine.kernels(), ranks
        self._barred = set() if ranks is not None and ranks.has_peers else {
            name for name, source in self._entries.items() if needs_peers(source)}
        self._stretches = [each for each in self._facts["stretches"] if stretches and each["entry"] not in self._barred]
        self._modules: dict[int, Any] = {}
        self._functions: dict[tuple[str, int], Function] = {}
        self._calls: dict[str, Call] = {}  # of what belongs to no op
        self._bound: dict[tuple[int, str], list[_Bound | Product | _Collective]] = {}
        self._kept: list[torch.Tensor] = []  # memory of stretches

    def run(self, begin: int, end: int, sizes: Sizes, inputs: Symbols, stream: int) -> None:
        """Launch ops begin .. end − 1 on the stream, over batch inputs at these addresses."""
        symbols = {"one": 1, "processors": self._processors, **vars(sizes)}
        resolved: dict[tuple[str, int], _Resolved] = {}
        index = begin
        while index < end:
            if (stretch := self._stretch(index, end, sizes)) is not None:
                self._run_entry(None, (index, stretch["entry"]), symbols, inputs, stream, resolved)
                index = stretch["end"]
                continue
            op = self._engine.program.ops[index]
            symbols["rows"] = symbols[str(self._engine.program.buffers[op.outputs[0]].shape[0])]
            symbol = self._entry_of(index, symbols["rows"])
            if symbols["rows"] > 0:
                self._run_entry(op, (index, symbol), symbols, inputs, stream, resolved)
            index += 1

    def stretch(self, begin: int, end: int, sizes: Sizes) -> str | None:
        """The entry that runs ops from `begin` on at once, at these sizes on this GPU."""
        stretch = self._stretch(begin, end, sizes)
        return None if stretch is None else str(stretch["entry"])

    def _stretch(self, begin: int, end: int, sizes: Sizes) -> Mapping[str, Any] | None:
        return stretch_for(self._stretches, begin, end, sizes, self._processors)

    def _entry_of(self, index: int, rows: int) -> str:
        """Of an op for so many rows; its last one where another needs memory of peers that is out of reach."""
        step = self._engine.steps[index]
        symbol = step.at(rows).symbol
        return step.symbol if symbol in self._barred else symbol

    def _run_entry(self, op: Op | None, key: tuple[int, str], symbols: Symbols, inputs: Symbols, stream: int,
                   resolved: dict[tuple[str, int], _Resolved]) -> None:
        """`resolved`: of the step so far; the layers of a model share their entries."""
        if key not in self._bound:
            self._bound[key] = self._bind(op, self._entries[key[1]])
        entry = key[1], symbols.get("rows", 0)
        if entry not in resolved:
            resolved[entry] = self._resolve(self._entries[key[1]], symbols, inputs)
        now = resolved[entry]
        for launch, grid in zip(self._bound[key], now.grids, strict=True):
            if isinstance(launch, Product):
                self._multiply(launch, grid[0], partial(self._matrix, op, now.offsets))
                continue
            if isinstance(launch, _Collective):
                into = launch.y if isinstance(launch.y, int) else now.arguments[launch.y]
                launch.run(launch.x, into, grid[0] * launch.columns, stream)
                continue
            for index, name in launch.changing:
                launch.call.set(index, now.arguments[name])
            launch.call.launch(grid, stream)

    def _resolve(self, source: GpuSource, symbols: Symbols, inputs: Symbols) -> _Resolved:
        offsets, scratch = scratch_offsets(dict(source.scratch), symbols)[0], int(self._activations.scratch.data_ptr())
        arguments = {f"{kind}.{name}": value for kind, named in (("sizes", symbols), ("inputs", inputs))
                     for name, value in named.items()}
        arguments |= {f"scratch.{name}": scratch + offset for name, offset in offsets.items()}
        return _Resolved(arguments, offsets, tuple(tuple(size.at(symbols) for size in launch.grid)
                                                   for launch in source.launches))

    def choose(self, rows: int, logits: torch.Tensor, chosen: int, drawn: int, stream: int) -> None:
        """The greedy choice of each row, as tw::Chosen into both addresses."""
        self._run_call(GREEDY, (logits.data_ptr(), chosen, drawn), {"rows": rows, "one": 1}, stream)

    def draw(self, rows: int, logits: torch.Tensor, samplings: int, adjustments: int, chosen: int, drawn: int,
             stream: int) -> None:
        """Other draws: settings and the greedy choice of each row of logits from their addresses, tw::Chosen into the
        last one.
        """
        arguments = (logits.data_ptr(), self._activations.scratch.data_ptr(), samplings, adjustments, chosen, drawn)
        self._run_call(DRAW, arguments, {"rows": rows, "one": 1}, stream)

    def take(self, tokens: int, token_ids: int, drawn: int, stream: int) -> None:
        """Token ids that stand for what was drawn, filled in; both are addresses."""
        self._run_call(TAKE, (token_ids, drawn, tokens), {"tokens": tokens, "one": 1}, stream)

    def _run_call(self, entry: str, arguments: Sequence[int], symbols: Symbols, stream: int) -> None:
        launch = self._entries[entry].launches[0]
        if entry not in self._calls:
            self._calls[entry] = self._call(launch)
        for index, argument in enumerate(arguments):
            self._calls[entry].set(index, argument)
        self._calls[entry].launch([size.at(symbols) for size in launch.grid], stream)

    def _multiply(self, product: Product, rows: int, matrix: Matrix) -> None:
        product.multiply(rows, matrix)

    def _matrix(self, op: Op | None, offsets: Symbols, name: str, rows: int, columns: int,
                dtype: torch.dtype) -> torch.Tensor:
        """What a launch of an op names: a piece of scratch memory, or a buffer of float32."""
        kind, _, piece = name.partition(".")
        if kind != "scratch":
            return self._activations.buffer(str(operand_name(op, name)), columns)[:rows]
        start, size = offsets[piece], rows * columns * dtype.itemsize
        return self._activations.scratch[start:start + size].view(dtype).view(rows, columns)

    def _bind(self, op: Op | None, source: GpuSource) -> list[_Bound | Product | _Collective]:
        memory = {f"zeros.{name}": torch.zeros(size, dtype=torch.uint8, device=self._activations.scratch.device)
                  for name, size in source.zeros}
        for name, pointers in source.tables:
            table = [self._address(op, pointer, memory) for pointer in pointers]
            memory[f"tables.{name}"] = torch.tensor(table, dtype=torch.int64, device=self._activations.scratch.device)
        self._kept += memory.values()
        return [self._bind_call(op, launch) if is_library_call(launch.function) else
                self._bind_kernel(op, launch, memory) for launch in source.launches]

    def _bind_call(self, op: Op | None, launch: Launch) -> Product | _Collective:
        if self._ranks is None or launch.function == "matmul":
            return Product.of(launch)
        x, y, columns = map(str, launch.arguments)
        run = self._ranks.nccl.all_reduce if launch.function == "all_reduce" else self._ranks.nccl.all_gather
        into = y if self._changing(op, y) else self._address(op, y, {})
        return _Collective(run, self._address(op, x, {}), into, int(columns))

    def _bind_kernel(self, op: Op | None, launch: Launch, memory: Mapping[str, torch.Tensor]) -> _Bound:
        call = self._call(launch)
        changing = []
        for index, argument in enumerate(flat(launch.arguments)):
            if isinstance(argument, str) and (changed := self._changing(op, argument)):
                changing.append((index, changed))
            else:
                call.set(index, self._address(op, argument, memory) if isinstance(argument, str) else argument)
        return _Bound(call, tuple(changing))

    def _call(self, launch: Launch) -> Call:
        return Call(self._function(launch), launch.threads, launch.shared_bytes, self._facts["overlap"],
                    parameter_kinds(launch), cooperative=launch.cooperative)

    def _function(self, launch: Launch) -> Function:
        key = (launch.function, launch.shared_bytes)
        if key not in self._functions:
            facts = self._facts["functions"][launch.function]
            index = facts["module"]
            if index not in self._modules:
                start, size = self._facts["modules"][index]
                self._modules[index] = load_module(self._code[start:start + size])
            self._functions[key] = Function(self._modules[index], facts["symbol"], launch.shared_bytes)
        return self._functions[key]

    def _changing(self, op: Op | None, argument: str) -> str:
        """What a step must write here: sizes, scratch memory and batch inputs; "" for what stays where it is."""
        kind, _, name = argument.partition(".")
        if kind in ("sizes", "scratch"):
            return argument
        operand = name if kind == "batch" else operand_name(op, argument)
        return f"inputs.{operand}" if operand in BATCH_INPUTS else ""

    def _address(self, op: Op | None, argument: str, memory: Mapping[str, torch.Tensor]) -> int:
        """A pointer that stays: to a weight, a cache or an activation; "" and what the op does not have are null."""
        whole, _, offset = argument.partition("+")
        if whole in memory:
            return int(memory[whole].data_ptr())
        if whole == RANKS:
            return self._ranks.state if self._ranks is not None else 0
        kind, _, name = whole.partition(".")
        operand = name if kind == "named" else operand_name(op, whole)
        if operand is None:
            return 0
        if operand in self._engine.program.weights:
            return self._weights.address(operand) + int(offset or 0)
        if operand in self._caches.tensors:
            return int(self._caches.tensors[operand].data_ptr())
        return self._activations.address(operand)


def stretch_for(stretches: Sequence[Mapping[str, Any]], begin: int, end: int, sizes: Sizes,
                processors: int) -> Mapping[str, Any] | None:
    """The first of a manifest's stretches that begins here and may run at these sizes on such a GPU."""
    for stretch in stretches:
        tokens, least = stretch["tokens"], stretch["least"]
        is_wanted = sizes.is_decode and tokens == sizes.tokens if tokens else sizes.tokens >= least
        is_seen_whole = not stretch["window"] or sizes.longest <= stretch["window"]
        if (is_wanted and is_seen_whole and stretch["begin"] == begin and stretch["end"] <= end
                and stretch["processors"] in (0, processors)):
            return stretch
    return None
