"""Memory with random numbers in it for launches that are timed: whatever their arguments name. It launches nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tensorwright.builder.clock import Case
from tensorwright.builder.decode_steps import CONTEXT
from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch, operand_name, scratch_offsets
from tensorwright.kernels.cuda.products import DTYPES, Product
from tensorwright.program.ops import BATCH_INPUTS
from tensorwright.program.program import Buffer, Program, Weight

ROTATED_BYTES = 256 << 20  # weights are read in turn from so much memory: several times the L2
MOST_COPIES = 32


class Memory:
    """What the arguments of a way's launches stand for: weights many times over, and the rest once."""

    def __init__(self, case: Case, rows: int, source: GpuSource, processors: int,
                 random_bytes: Callable[[int], torch.Tensor]) -> None:
        """`rows` of activations. `random_bytes` gives so many on the device, which also says where the rest lies."""
        self._program, self._op = case.program, case.candidates.op if case.candidates else None
        self._source, self._taken = source, 0
        self.symbols = {"one": 1, "processors": processors, "rows": rows, "tokens": rows, "sequences": rows,
                        "outputs": rows, "max_query_length": 1, "table_width": CONTEXT}
        held = self._op.weights.values() if self._op else self._program.weights
        sizes = {name: packed_bytes(self._program.weights[name]) for name in held}
        self._starts, self._copy_bytes = _places(sizes)
        self.copies = min(max(1, -(-ROTATED_BYTES // max(1, self._copy_bytes))), MOST_COPIES)
        self._weights = random_bytes(self.copies * self._copy_bytes)
        self._device = self._weights.device
        self._offsets, size = scratch_offsets(dict(source.scratch), self.symbols)
        self._scratch = torch.zeros(max(size, 256), dtype=torch.uint8, device=self._device)
        self._kept: dict[str, torch.Tensor] = {}

    def next_copy(self) -> None:
        """Turn to the weights that were used longest ago."""
        self._taken = (self._taken + 1) % self.copies

    def value(self, argument: Argument) -> int | float:
        """A number, or the address of memory."""
        if not isinstance(argument, str):
            return argument
        whole, _, offset = argument.partition("+")
        kind, _, name = whole.partition(".")
        if kind == "sizes":
            return self.symbols[name]
        if kind == "scratch":
            return int(self._scratch.data_ptr()) + self._offsets[name]
        if kind in ("zeros", "tables"):
            return self._own(kind, name)
        operand = self._name(whole)
        if not operand:
            return 0
        if operand in self._program.weights:
            start = self._taken * self._copy_bytes + self._starts[operand]
            return int(self._weights.data_ptr()) + start + int(offset or 0)
        return int(self._buffer(operand).data_ptr())

    def multiply(self, launch: Launch) -> None:
        """A library's product, as the runtime has it done."""
        Product.of(launch).multiply(launch.grid[0].at(self.symbols), self._matrix)

    def _name(self, argument: str) -> str:
        """The program's name of a buffer."""
        kind, _, name = argument.partition(".")
        return name if kind in ("named", "batch") else operand_name(self._op, argument) or ""

    def _matrix(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        kind, _, piece = name.partition(".")
        if kind != "scratch":
            return self._buffer(self._name(name))[:rows * columns].view(rows, columns)
        start = self._offsets[piece]
        return self._scratch[start:start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    def _own(self, kind: str, name: str) -> int:
        """Memory of the source alone."""
        key = f"{kind}.{name}"
        if key not in self._kept:
            if kind == "zeros":
                self._kept[key] = torch.zeros(dict(self._source.zeros)[name], dtype=torch.uint8, device=self._device)
            else:
                addresses = [self.value(pointer) for pointer in dict(self._source.tables)[name]]
                self._kept[key] = torch.tensor(addresses, dtype=torch.int64, device=self._device)
        return int(self._kept[key].data_ptr())

    def _buffer(self, name: str) -> torch.Tensor:
        """Random activations, a cache in which every sequence has its blocks, or the batch of a decode step."""
        if name not in self._kept:
            rows = self.symbols["rows"]
            self._kept[name] = (_batch_input(name, rows, self._program).to(self._device) if name in BATCH_INPUTS
                                else _numbers(self._program.buffers[name], rows, self._device))
        return self._kept[name]


def packed_bytes(weight: Weight) -> int:
    """As linears pack it; of other weights, at least as much."""
    if len(weight.shape) == 2:
        shape = units.Shape(weight)
        return shape.bytes + shape.tiles * units.UNIT_ROWS * 2
    return 4 * weight.shape[0]


def _places(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each begins, on 256 bytes, and where they end."""
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += -(-size // 256) * 256
    return starts, end


def _batch_input(name: str, rows: int, program: Program) -> torch.Tensor:
    """Of a step of `rows` sequences, each with its last token of CONTEXT to come."""
    block = _block_size(program)
    each = torch.arange(rows, dtype=torch.int32)
    blocks = -(-CONTEXT // block)
    tables = torch.zeros((rows, CONTEXT), dtype=torch.int32)
    tables[:, :blocks] = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)
    values = {"token_ids": each, "positions": torch.full_like(each, CONTEXT - 1),
              "slots": tables[:, blocks - 1] * block + (CONTEXT - 1) % block, "query_starts": each,
              "query_lengths": torch.ones_like(each), "kv_lengths": torch.full_like(each, CONTEXT),
              "block_tables": tables, "output_rows": each}
    return values[name].contiguous()


def _numbers(buffer: Buffer, rows: int, device: torch.device) -> torch.Tensor:
    """Normal activations; a cache, all zeros, with blocks for every sequence."""
    if buffer.kind != "cache":
        return torch.randn(rows * int(buffer.shape[1]), device=device)
    blocks = rows * -(-CONTEXT // int(buffer.shape[3]))
    shape = [blocks if isinstance(dim, str) else dim for dim in buffer.shape]
    return torch.zeros(shape, dtype=DTYPES[buffer.dtype], device=device)


def _block_size(program: Program) -> int:
    return next((int(buffer.shape[3]) for buffer in program.buffers.values() if buffer.kind == "cache"), CONTEXT)

