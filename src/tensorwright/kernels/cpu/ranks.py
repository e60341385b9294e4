"""Sums and gathers over ranks (native/comm.h). One rank copies."""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import PlainKernel, columns
from tensorwright.kernels.interface import Source, Tactic
from tensorwright.program.program import Op, Program


class AllReduce(PlainKernel):
    """The sum over ranks, added in rank order through shared memory, or by MPI between hosts."""

    name = "all_reduce"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::all_reduce<columns>."""
        return Source(("comm.h",), f"tw::all_reduce<{columns(program.buffers[op.inputs[0]])}>::run")

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """A copy of x: MPI does not reduce in place portably."""
        return 4 * num_tokens * columns(program.buffers[op.inputs[0]])


class AllGather(PlainKernel):
    """The columns of all ranks side by side."""

    name = "all_gather"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::all_gather<columns of one rank>."""
        return Source(("comm.h",), f"tw::all_gather<{columns(program.buffers[op.inputs[0]])}>::run")

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """What MPI gathers, rank after rank."""
        return 4 * num_tokens * columns(program.buffers[op.outputs[0]])
