"""Programs as text, one op a line, so that two programs can be read and diffed. It knows no meaning."""

from __future__ import annotations

from tensorwright.program.ops import ATTRIBUTE_DEFAULTS
from tensorwright.program.program import Buffer, Op, Program, Weight


def to_text(program: Program) -> str:
    """The program, e.g. `%3 float32[tokens, 256] = linear(%2, %0) weight=int4g128[256, 512] norm_epsilon=1e-05`."""
    lines = [f"input  {name} {_type(buffer)}" for name, buffer in program.buffers.items() if buffer.kind == "input"]
    lines += [f"cache  {name} {_type(buffer)}" for name, buffer in program.buffers.items() if buffer.kind == "cache"]
    return "\n".join(lines + [_op(op, program) for op in program.ops]) + "\n"


def _type(buffer: Buffer) -> str:
    return f"{buffer.dtype}[{', '.join(str(dim) for dim in buffer.shape)}]"


def _weight(weight: Weight) -> str:
    group = "" if not weight.is_quantized else ("" if weight.group_size < 0 else f"g{weight.group_size}")
    return f"{weight.dtype}{group}{list(weight.shape)}"


def _op(op: Op, program: Program) -> str:
    results = ", ".join(name if program.buffers[name].kind == "cache" else f"{name} {_type(program.buffers[name])}"
                        for name in op.outputs)
    weights = "".join(f" {role}={_weight(program.weights[name])}" for role, name in op.weights.items())
    attributes = "".join(f" {name}={value}" for name, value in op.attributes.items()
                         if value != ATTRIBUTE_DEFAULTS.get(name))
    return f"{results} = {op.kind}({', '.join(op.inputs)}){weights}{attributes}  # {op.name}"
