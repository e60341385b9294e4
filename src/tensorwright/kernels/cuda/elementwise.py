"""Ops that touch each number once (native/elementwise.cuh): embedding, norm, copies, sums, products, activations."""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import STORED, PlainKernel, attribute, columns
from tensorwright.kernels.cuda.launch import Arguments, GpuSource, Launch, Size, gpu_source
from tensorwright.kernels.interface import Cost, Source, Tactic, Target
from tensorwright.program.ops import ACTIVATIONS
from tensorwright.program.program import Op, Program

NATIVE_TYPES = {"float16": "tw::half", "bfloat16": "tw::bfloat16", "int8": "signed char",
                "float8_e4m3": "tw::float8"}


def rowwise(function: str, *arguments: str | float, heads: int = 1) -> GpuSource:
    """One block a row (and head)."""
    given: Arguments = tuple(arguments)
    return gpu_source(("elementwise.cuh",), Launch(function, (Size("rows"), Size(times=heads), Size()), 256, 0, given))


class Embedding(PlainKernel):
    """Rows of the table, widened to float32. The table stays as stored."""

    name, layout = "embedding", STORED

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """16-bit tables."""
        return super().supports(op, program, target) and program.weights[op.weights["table"]].dtype in NATIVE_TYPES

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::embedding<number, H>."""
        table = program.weights[op.weights["table"]]
        return rowwise(f"tw::embedding<{NATIVE_TYPES[table.dtype]}, {table.shape[1]}>",
                       "inputs.token_ids", "weights.table", "outputs.y")

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """The rows read and written; the rest of the table is not touched."""
        return Cost(6.0 * num_tokens * program.weights[op.weights["table"]].shape[1], 0.0)


class RmsNorm(PlainKernel):
    """Root mean square norm over rows or heads."""

    name = "rms_norm"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::rms_norm<columns, size>."""
        width = columns(program.buffers[op.inputs[0]])
        size = attribute(op, "head_size") or width
        return rowwise(f"tw::rms_norm<{width}, {size}>", "inputs.x", "weights.weight", "outputs.y",
                       float(op.attributes["epsilon"]), heads=width // size)


class Activation(PlainKernel):
    """silu, gelu or gelu_tanh."""

    name = "activation"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """The known functions."""
        return super().supports(op, program, target) and op.attributes["function"] in ACTIVATIONS

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::activation<columns, function>."""
        width, function = columns(program.buffers[op.inputs[0]]), op.attributes["function"]
        return rowwise(f"tw::activation<{width}, tw::Function::{function}>", "inputs.x", "outputs.y")


class Add(PlainKernel):
    """a + b."""

    name = "add"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::add<columns>."""
        return rowwise(f"tw::add<{columns(program.buffers[op.inputs[0]])}>", "inputs.a", "inputs.b", "outputs.y")


class Multiply(PlainKernel):
    """a · b."""

    name = "multiply"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::multiply_rows<columns>."""
        width = columns(program.buffers[op.inputs[0]])
        return rowwise(f"tw::multiply_rows<{width}>", "inputs.a", "inputs.b", "outputs.y")


class Slice(PlainKernel):
    """Some columns of every row."""

    name = "slice"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::slice<columns, start, size>."""
        width, start, size = columns(program.buffers[op.inputs[0]]), op.attributes["start"], op.attributes["size"]
        return rowwise(f"tw::slice<{width}, {start}, {size}>", "inputs.x", "outputs.y")


class GatherRows(PlainKernel):
    """The rows that get logits."""

    name = "gather_rows"

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """tw::gather_rows<columns>."""
        width = columns(program.buffers[op.inputs[0]])
        return rowwise(f"tw::gather_rows<{width}>", "inputs.x", "inputs.output_rows", "outputs.y")
