"""Linears of 8 to 64 sequences on the asynchronous tensor cores of sm_90: which shapes native/linear_wgmma.cuh takes.

It knows one linear at a time, not the chain. Activations are in core order (native/outputs.cuh).
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorwright.kernels.cuda import units
from tensorwright.kernels.cuda.launch import Arguments, Launch, Size
from tensorwright.kernels.cuda.linear import native_weights
from tensorwright.kernels.cuda.targets import SHARED_BYTES
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Weight

TARGET, MOST_PROCESSORS, MOST_STAGES = "sm_90", 192, 8
STATIC_SHARED = 6 << 10  # barriers and what else the kernel declares
MANY_ROWS = 16384  # from here on, taller blocks read the tokens less often
# Warpgroups, row tiles of a warp, units of a step, by the most tokens that they suit; the first that a weight fits.
TILES = {16: ((2, 2, 2), (2, 1, 4), (2, 1, 2), (2, 1, 1)), 32: ((4, 1, 2), (2, 1, 2), (2, 1, 1)),
         64: ((4, 1, 1), (2, 1, 1))}


@dataclass(frozen=True)
class WgmmaTile:
    """How a block of wgmma_linear cuts a weight."""

    weight: Weight
    tokens: int
    warpgroups: int
    row_tiles: int
    step_units: int

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.warpgroups * self.row_tiles * 64

    @property
    def block_steps(self) -> int:
        """Of a block of rows."""
        return self.weight.shape[1] // units.UNIT_INPUTS // self.step_units

    @property
    def steps(self) -> int:
        """Dealt out to the processors: each must have one, or the last sum is never made."""
        return self.weight.shape[0] // self.rows * self.block_steps

    @property
    def stage_bytes(self) -> int:
        """WgmmaShape::STAGE_BYTES."""
        tokens = units.UNIT_INPUTS * self.tokens * 2
        return self.step_units * (self.rows // units.UNIT_ROWS * units.Shape(self.weight).unit_bytes + tokens)

    @property
    def stages(self) -> int:
        """As many as fit."""
        return min(MOST_STAGES, (SHARED_BYTES[TARGET] - STATIC_SHARED) // self.stage_bytes)

    @property
    def part_bytes(self) -> int:
        """Of a block's sums of cut row blocks: it has up to two."""
        return 2 * self.rows * self.tokens * 4

    @property
    def is_whole(self) -> bool:
        """Whether whole steps cover the weight."""
        rows, inputs = self.weight.shape
        return rows % self.rows == 0 and inputs % (units.UNIT_INPUTS * self.step_units) == 0

    @property
    def fits(self) -> bool:
        """Whether wgmma_linear takes the weight so, whatever the number of steps."""
        return (self.is_whole and (self.row_tiles == 1 or self.weight.shape[0] >= MANY_ROWS)
                and self.stages >= (2 if self.step_units == 1 else 3))


def wgmma_tile(weight: Weight, tokens: int, target: Target, processors: int = MOST_PROCESSORS) -> WgmmaTile | None:
    """The best way to cut the weight for up to so many processors; None: the kernel does not take it."""
    if target.name != TARGET:
        return None
    shapes = next(shapes for most, shapes in TILES.items() if tokens <= most)
    tiles = (WgmmaTile(weight, tokens, *shape) for shape in shapes)
    return next((tile for tile in tiles if tile.fits and tile.steps >= processors), None)


def wgmma_linear(tile: WgmmaTile, partial_sums: int, output_type: str, arguments: Arguments) -> Launch:
    """The launch. `partial_sums` of squares of the input: the norm that is yet to be applied."""
    rows, inputs = tile.weight.shape
    function = (f"tw::wgmma_linear<{native_weights(tile.weight)}, {rows}, {inputs}, {tile.tokens}, {tile.warpgroups}, "
                f"{tile.row_tiles}, {tile.step_units}, {tile.stages}, {partial_sums}, {output_type}>")
    return Launch(function, (Size("processors"), Size(), Size()), 128 * (tile.warpgroups + 1),
                  tile.stages * tile.stage_bytes, arguments)
