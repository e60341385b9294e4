"""An engine's plan bound to memory: every op's launches with their addresses. It knows launches, not their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch, Size, is_library_call, scratch_offsets
from tensorwright.program.ops import BATCH_INPUTS, OPS
from tensorwright.program.program import Op
from tensorwright.runtime.cuda.driver import Call, Function, load_module
from tensorwright.runtime.cuda.inputs import Sizes
from tensorwright.runtime.cuda.memory import DTYPES, Activations, Caches, Weights, entries_of

Symbols = Mapping[str, int]


@dataclass(frozen=True)
class _Bound:
    """A launch, and which of its arguments a step changes: (index, "inputs.positions" or "sizes.rows")."""

    call: Call
    grid: tuple[Size, Size, Size]
    changing: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class _Matmul:
    """A matrix product of scratch memory: bytes where a, b and c begin, columns, inner size, dtype."""

    a: str
    b: str
    c: str
    columns: int
    inner: int
    dtype: torch.dtype


class Plan:
    """All ops, bound when they first run at a tactic."""

    def __init__(self, engine: Engine, weights: Weights, caches: Caches, activations: Activations,
                 processors: int) -> None:
        self._engine, self._weights, self._caches, self._activations = engine, weights, caches, activations
        self._processors, self._facts = processors, engine.manifest["kernels"]
        self._entries, self._code = entries_of(engine), engine.kernels()
        self._modules: dict[int, Any] = {}
        self._functions: dict[tuple[str, int], Function] = {}
        self._bound: dict[tuple[int, str], list[_Bound | _Matmul]] = {}

    def run(self, begin: int, end: int, sizes: Sizes, inputs: Symbols, stream: int) -> None:
        """Launch ops begin .. end − 1 on the stream, over batch inputs at these addresses."""
        symbols = {"one": 1, "processors": self._processors, **vars(sizes)}
        for index in range(begin, end):
            op = self._engine.program.ops[index]
            symbols["rows"] = symbols[str(self._engine.program.buffers[op.outputs[0]].shape[0])]
            symbol = self._engine.steps[index].at(symbols["rows"]).symbol
            if (index, symbol) not in self._bound:
                self._bound[index, symbol] = self._bind(op, self._entries[symbol])
            offsets = scratch_offsets(dict(self._entries[symbol].scratch), symbols)[0]
            if symbols["rows"] == 0:
                continue
            for launch in self._bound[index, symbol]:
                if isinstance(launch, _Matmul):
                    self._multiply(launch, offsets, symbols["rows"])
                else:
                    self._launch(launch, symbols, inputs, offsets, stream)

    def _launch(self, launch: _Bound, symbols: Symbols, inputs: Symbols, offsets: Symbols, stream: int) -> None:
        for index, name in launch.changing:
            kind, _, what = name.partition(".")
            if kind == "scratch":
                launch.call.set(index, int(self._activations.scratch.data_ptr()) + offsets[what])
            else:
                launch.call.set(index, symbols[what] if kind == "sizes" else inputs[what])
        launch.call.launch([size.at(symbols) for size in launch.grid], stream)

    def _multiply(self, m: _Matmul, offsets: Symbols, rows: int) -> None:
        """C = a · bᵀ, 16-bit numbers, float32 sums and results."""
        a = self._matrix(offsets[m.a], rows, m.inner, m.dtype)
        b = self._matrix(offsets[m.b], m.columns, m.inner, m.dtype)
        c = self._matrix(offsets[m.c], rows, m.columns, torch.float32)
        torch.mm(a, b.t(), out_dtype=torch.float32, out=c)

    def _matrix(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        size = rows * columns * (torch.finfo(dtype).bits // 8)
        return self._activations.scratch[offset:offset + size].view(dtype).view(rows, columns)

    def _bind(self, op: Op, source: GpuSource) -> list[_Bound | _Matmul]:
        return [_matmul(launch) if is_library_call(launch.function) else self._bind_kernel(op, launch)
                for launch in source.launches]

    def _bind_kernel(self, op: Op, launch: Launch) -> _Bound:
        call = Call(self._function(launch), launch.threads, launch.shared_bytes, self._facts["overlap"],
                    [_kind(a) if not isinstance(a, tuple) else tuple(map(_kind, a)) for a in launch.arguments])
        changing = []
        for index, argument in enumerate(_flat(launch.arguments)):
            if isinstance(argument, str) and (changed := self._changing(op, argument)):
                changing.append((index, changed))
            else:
                call.set(index, self._address(op, argument) if isinstance(argument, str) else argument)
        return _Bound(call, launch.grid, tuple(changing))

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

    def _changing(self, op: Op, argument: str) -> str:
        """What a step must write here: sizes, scratch memory and batch inputs; "" for what stays where it is."""
        kind, _, name = argument.partition(".")
        if kind in ("sizes", "scratch"):
            return argument
        buffer = _operand(op, argument) if kind == "inputs" else None
        return f"inputs.{buffer}" if buffer in BATCH_INPUTS else ""

    def _address(self, op: Op, argument: str) -> int:
        """A pointer that stays: to a weight, a cache or an activation; "" and what the op does not have are null."""
        name, _, offset = argument.partition("+")
        if name.startswith("weights."):
            weight = op.weights.get(name.partition(".")[2])
            return 0 if weight is None else self._weights.address(weight) + int(offset or 0)
        buffer = _operand(op, name) if name else None
        if buffer is None:
            return 0
        if buffer in self._caches.tensors:
            return int(self._caches.tensors[buffer].data_ptr())
        return self._activations.address(buffer)


def _operand(op: Op, argument: str) -> str | None:
    """The buffer behind "inputs.x" or "outputs.y"."""
    kind, _, name = argument.partition(".")
    spec = OPS[op.kind]
    names, given = (spec.inputs, op.inputs) if kind == "inputs" else (spec.outputs, op.outputs)
    return dict(zip((each.rstrip("?") for each in names), given, strict=False)).get(name)


def _kind(argument: Argument) -> str:
    if isinstance(argument, str):
        return "int" if argument.startswith("sizes.") else "pointer"
    return "float" if isinstance(argument, float) else "int"


def _flat(arguments: Sequence[Argument | tuple[Argument, ...]]) -> list[Argument]:
    return [each for argument in arguments for each in (argument if isinstance(argument, tuple) else (argument,))]


def _matmul(launch: Launch) -> _Matmul:
    a, b, c, columns, inner, dtype = launch.arguments
    names = [str(name).partition(".")[2] for name in (a, b, c)]
    return _Matmul(names[0], names[1], names[2], int(str(columns)), int(str(inner)), DTYPES[str(dtype)])
