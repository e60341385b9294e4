"""Ops that touch each number once: embedding, norm, sums, products, activations, copies (native/elementwise.h)."""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import (
    NATIVE_TYPES,
    STORED,
    PlainKernel,
    attribute,
    columns,
    float_bits,
)
from tensorwright.kernels.interface import Cost, Source, Tactic, Target
from tensorwright.program.ops import ACTIVATIONS
from tensorwright.program.program import Op, Program

HEADER = ("elementwise.h",)


class Embedding(PlainKernel):
    """Rows of the table, widened to float32. The table stays as stored."""

    name, layout = "embedding", STORED

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::embedding<number, V, H>."""
        table = program.weights[op.weights["table"]]
        rows, width = table.shape
        return Source(HEADER, f"tw::embedding<{NATIVE_TYPES[table.dtype]}, {rows}, {width}>::run")

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """The rows read and written; the rest of the table is not touched."""
        table = program.weights[op.weights["table"]]
        size = 4 if table.dtype == "float32" else 2
        return Cost(float(num_tokens * table.shape[1] * (size + 4)), 0.0)


class RmsNorm(PlainKernel):
    """Root mean square norm over rows or heads; mean and product in float32."""

    name = "rms_norm"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::rms_norm<columns, size, epsilon>."""
        width = columns(program.buffers[op.inputs[0]])
        size = attribute(op, "head_size") or width
        return Source(("norm.h",), f"tw::rms_norm<{width}, {size}, {float_bits(op.attributes['epsilon'])}>::run")


class Activation(PlainKernel):
    """silu, gelu or gelu_tanh."""

    name = "activation"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """The known functions."""
        return super().supports(op, program, target) and op.attributes["function"] in ACTIVATIONS

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::activate_op<columns, function>."""
        width = columns(program.buffers[op.inputs[0]])
        return Source(HEADER, f"tw::activate_op<{width}, tw::activation::{op.attributes['function']}>::run")


class Add(PlainKernel):
    """a + b."""

    name = "add"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::add<columns>."""
        return Source(HEADER, f"tw::add<{columns(program.buffers[op.inputs[0]])}>::run")


class Multiply(PlainKernel):
    """a · b."""

    name = "multiply"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::multiply<columns>."""
        return Source(HEADER, f"tw::multiply<{columns(program.buffers[op.inputs[0]])}>::run")


class Slice(PlainKernel):
    """Some columns of every row."""

    name = "slice"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::slice<columns, start, size>."""
        width, start, size = columns(program.buffers[op.inputs[0]]), op.attributes["start"], op.attributes["size"]
        return Source(HEADER, f"tw::slice<{width}, {start}, {size}>::run")


class GatherRows(PlainKernel):
    """The rows that get logits."""

    name = "gather_rows"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::gather_rows<columns>."""
        return Source(HEADER, f"tw::gather_rows<{columns(program.buffers[op.inputs[0]])}>::run")
