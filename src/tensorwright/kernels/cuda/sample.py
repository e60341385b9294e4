"""What begins and ends every step and belongs to no op: tokens taken over, and tokens chosen (native/sample.cuh)."""

from __future__ import annotations

from tensorwright.kernels.cuda.launch import GpuSource, Launch, Size, gpu_source
from tensorwright.program.program import Program

GREEDY, DRAW, TAKE = "greedy", "draw", "take_tokens"  # the entries' names in the manifest


def step_sources(program: Program) -> dict[str, GpuSource]:
    """The greedy choice from each row of the program's output; other draws from it; and drawn tokens as token ids."""
    columns = next(buffer.shape[1] for buffer in program.buffers.values() if buffer.kind == "output")
    rows = (Size("rows"), Size(), Size())
    return {
        GREEDY: gpu_source(("sample.cuh",), Launch(
            f"tw::greedy<{columns}>", rows, 1024, 0, ("step.logits", "step.chosen", "step.drawn"))),
        DRAW: gpu_source(("draw.cuh",), Launch(
            f"tw::draw<{columns}>", rows, 1024, 0,
            ("step.logits", "scratch.lines", "step.samplings", "step.adjustments", "step.chosen", "step.drawn")),
            scratch={"lines": Size("rows", times=4 * int(columns))}),
        TAKE: gpu_source(("sample.cuh",), Launch(
            "tw::take_tokens", (Size("tokens", per=256), Size(), Size()), 256, 0,
            ("batch.token_ids", "step.drawn", "sizes.tokens"))),
    }
