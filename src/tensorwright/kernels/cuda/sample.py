"""The greedy choice, which ends every step and belongs to no op (native/sample.cuh)."""

from __future__ import annotations

from tensorwright.kernels.cuda.launch import GpuSource, Launch, Size, gpu_source
from tensorwright.program.program import Program

GREEDY = "greedy"  # the entry's name in the manifest


def greedy_source(program: Program) -> GpuSource:
    """tw::greedy<vocabulary> over the program's output."""
    columns = next(buffer.shape[1] for buffer in program.buffers.values() if buffer.kind == "output")
    return gpu_source(("sample.cuh",), Launch(f"tw::greedy<{columns}>", (Size("rows"), Size(), Size()), 1024, 0,
                                              ("step.logits", "step.chosen")))
