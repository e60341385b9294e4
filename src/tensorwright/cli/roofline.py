"""What a step must move and compute, as its kernels state it, and how near a time comes to the machine's limits.

The roofline model: no step is faster than its bytes at the memory's speed, nor than its operations at the speed of the
arithmetic they are done in. The larger of the two times is the limit. It knows engines and kernels; others measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwright.engine.engine import Engine
    from tensorwright.program.program import Op, Program

FLOAT_BITS = 32


@dataclass(frozen=True)
class Limits:
    """What the machine can do: bytes read per second, and operations per second by the bits of the numbers multiplied.

    4 and 8: weights of so many bits times int8; 16: by 16; 32: float32. None: the engine cannot tell.
    """

    bytes_s: float
    operations_s: Mapping[int, float] | None


@dataclass(frozen=True)
class Step:
    """Rows of one step, and cached positions that they attend to; those of one prompt share most of them."""

    num_tokens: int
    num_outputs: int
    kv_read: int  # cached positions, each sequence's once
    kv_scored: int  # cached positions, once for every token that attends to them


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one op, or of several together, and their shortest times on a machine."""

    bytes: float
    operations: float
    memory_s: float
    arithmetic_s: float | None  # None: the limit is not known

    @property
    def limit_s(self) -> float:
        """No faster than this."""
        return max(self.memory_s, self.arithmetic_s or 0.0)

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        times = (self.arithmetic_s, other.arithmetic_s)
        both = None if times[0] is None or times[1] is None else times[0] + times[1]
        return Work(self.bytes + other.bytes, self.operations + other.operations, self.memory_s + other.memory_s, both)


def work_of(engine: Engine, steps: Sequence[Step], limits: Limits) -> list[Work]:
    """The work of each op of the program, over all the steps."""
    from tensorwright.builder.backends import backend_of

    kernels = {kernel.name: kernel for kernel in backend_of(engine.metadata["architecture"]).kernels}
    result = []
    for op, plan in zip(engine.program.ops, engine.steps, strict=True):
        rate = None if limits.operations_s is None else limits.operations_s[operand_bits(op, engine.program)]
        moved = operations = 0.0
        for step in steps:
            is_output = engine.program.buffers[op.outputs[0]].shape[0] == "outputs"
            rows = step.num_outputs if is_output else step.num_tokens
            if rows:  # an op without rows does not even read its weights
                moved += kernels[plan.kernel].cost(op, engine.program, rows, step.kv_read).bytes
                operations += kernels[plan.kernel].cost(op, engine.program, rows, step.kv_scored).operations
        result.append(Work(moved, operations, moved / limits.bytes_s, None if rate is None else operations / rate))
    return result


def total(works: Sequence[Work]) -> Work:
    """All together."""
    return sum(works[1:], works[0])


def decode_step(batch: int, kv_length: int) -> Step:
    """One new token for each of `batch` sequences, which see `kv_length` positions each, their own included."""
    return Step(batch, batch, batch * kv_length, batch * kv_length)


def prefill_steps(input_len: int, chunk: int) -> list[Step]:
    """One prompt in chunks of at most so many tokens; only the last chunk gives logits."""
    steps = []
    for begin in range(0, input_len, chunk):
        end = min(begin + chunk, input_len)
        scored = (end * (end + 1) - begin * (begin + 1)) // 2
        steps.append(Step(end - begin, int(end == input_len), end, scored))
    return steps


def operand_bits(op: Op, program: Program) -> int:
    """4 or 8 where a linear multiplies quantised weights with int8 activations, what attention says; else 32."""
    if op.kind == "attention":
        return int(op.attributes.get("activation_bits", 0)) or FLOAT_BITS
    if op.kind != "linear" or not op.attributes.get("activation_group", 0):
        return FLOAT_BITS
    return 4 if program.weights[op.weights["weight"]].dtype == "int4" else 8


def operand_widths(engine: Engine) -> set[int]:
    """Every width that the engine multiplies, float32 always."""
    return {FLOAT_BITS, *(operand_bits(op, engine.program) for op in engine.program.ops)}
