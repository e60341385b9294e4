"""The product of packed float8 weights and float8 activations (native/linear_float8.cuh): its launch and its memory."""

from __future__ import annotations

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.launch import Argument, Launch, Size
from tensorwright.program.program import Weight

TOKENS, BLOCK_TILES, STAGES, THREADS = 256, 8, 4, 384  # of a tile; row tiles of one; of the ring; of a block
TOGETHER = 8  # token tiles that follow each other
SHARED_BYTES = STAGES * (BLOCK_TILES * units.UNIT_ROWS + TOKENS) * units.UNIT_INPUTS
OPERAND = "tw::RowsFloat8Order"


def ordered(rows: str, columns: int) -> Size:
    """Bytes of so many rows in float8 order: whole tiles."""
    return Size(rows, per=TOKENS, times=TOKENS * columns)


def linear_float8(weight: Weight, address: str, x: tuple[Argument, ...], number: str, output_type: str,
                  output: tuple[Argument, ...]) -> Launch:
    """`address`: of the packed weight; `x`: the operand's codes, scales and rows; `number`: C++ type of the scales."""
    kernel = f"tw::linear_float8<{number}, {weight.shape[0]}, {weight.shape[1]}, {TOGETHER}, {output_type}>"
    return Launch(kernel, (Size("processors"), Size(), Size()), THREADS, SHARED_BYTES,
                  ((address, f"{address}+{units.Shape(weight).bytes}", *x), output))
