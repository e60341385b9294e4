"""Sums and gathers over ranks: over memory that they write into each other's, or by NCCL (native/collectives.cuh).

The first is one launch for few numbers, and needs GPUs that reach each other's memory; NCCL serves any number, and
GPUs that do not. Either gives the same bits on all ranks.
"""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import PlainKernel, columns
from tensorwright.kernels.cuda.launch import RANKS, GpuSource, Launch, Size, gpu_source
from tensorwright.kernels.interface import Source, Tactic, Target
from tensorwright.program.program import Op, Program

HEADERS = ("collectives.cuh",)
ONE_SHOT_BYTES, ONE_SHOT_ROWS = 512 << 10, 64  # of one rank's message, at most
ROWS = (Size("rows"), Size(), Size())
COUNT = "tw::count_collectives"


class _Collective(PlainKernel):
    """What both have in common: a tactic for few numbers and one for any number."""

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        """The last one needs no peer memory."""
        return (Tactic(self.layout, {"one_shot": 1}), Tactic(self.layout))

    def estimate(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> float:
        """One shot as long as messages are small."""
        if "one_shot" not in tactic.parameters:
            return 2.0
        width = columns(program.buffers[op.inputs[0]])
        return 1.0 if num_tokens <= min(ONE_SHOT_ROWS, ONE_SHOT_BYTES // (4 * width)) else float("inf")


class AllReduce(_Collective):
    """The sum over ranks, in rank order where it is one shot."""

    name = "all_reduce"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::all_reduce<columns>, or NCCL's."""
        width = columns(program.buffers[op.inputs[0]])
        if "one_shot" in tactic.parameters:
            return _one_shot(f"tw::all_reduce<{width}>", width)
        return gpu_source(HEADERS, Launch("all_reduce", ROWS, arguments=("inputs.x", "outputs.y", width)))


class AllGather(_Collective):
    """The columns of all ranks side by side."""

    name = "all_gather"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::all_gather<columns of one rank>, or NCCL's, which gathers rank after rank, and tw::join_columns."""
        width = columns(program.buffers[op.inputs[0]])
        if "one_shot" in tactic.parameters:
            return _one_shot(f"tw::all_gather<{width}>", width)
        ranks = columns(program.buffers[op.outputs[0]]) // width
        return gpu_source(
            HEADERS, Launch("all_gather", ROWS, arguments=("inputs.x", "scratch.gathered", width)),
            Launch(f"tw::join_columns<{width}>", (Size("rows"), Size(times=ranks), Size()), 256, 0,
                   ("scratch.gathered", "outputs.y")),
            scratch={"gathered": Size("rows", times=4 * width * ranks)})

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """What NCCL gathers."""
        return 0 if "one_shot" in tactic.parameters else 4 * num_tokens * columns(program.buffers[op.outputs[0]])


def count_collectives(number: int) -> Launch:
    """Ends so many collectives of an op or a stretch."""
    return Launch(COUNT, threads=1, arguments=(RANKS, number))


def _one_shot(function: str, width: int) -> GpuSource:
    grid = (Size("rows"), Size(times=-(-width // 256)), Size())
    return gpu_source(HEADERS, Launch(function, grid, 256, 0, (RANKS, 1, "inputs.x", "outputs.y")),
                      count_collectives(1))
