"""The verifier: every rule a program must keep, run between passes. It knows `ops.OPS` and no model or kernel."""

from __future__ import annotations

from tensorwright.errors import ProgramError
from tensorwright.program.ops import ACTIVATIONS, OPS
from tensorwright.program.program import SYMBOLS, Buffer, Op, Program

FLOATS = ("float32", "float16", "bfloat16")
CODES = ("int8", "float8_e4m3")  # of caches


def verify(program: Program, after: str = "") -> Program:
    """Give the program back, or raise ProgramError that names the op, the rule and the pass it came `after`."""
    where = f" (after {after})" if after else ""
    written = {name for name, buffer in program.buffers.items() if buffer.kind in ("input", "cache")}
    seen: set[str] = set()
    for op in program.ops:
        problem = (_operands(op, program) or _order(op, program, written, seen) or _shapes(op, program))
        if problem:
            raise ProgramError(f"op {op.name} [{op.kind}]{where}: {problem}")
        seen.add(op.name)
        written.update(op.outputs)
    for name, buffer in program.buffers.items():
        problem = _buffer(buffer) or ("" if name in written else "it is never written")
        if problem:
            raise ProgramError(f"buffer {name}{where}: {problem}")
    for weight in program.weights.values():
        if weight.is_quantized != bool(weight.group_size) or (weight.is_quantized and weight.scale_dtype not in FLOATS):
            raise ProgramError(f"weight {weight.name}{where}: {weight.dtype} with group size {weight.group_size} "
                               f"and scales of '{weight.scale_dtype}'")
        if weight.dtype == "float8_e4m3" and weight.group_size != -1:
            raise ProgramError(f"weight {weight.name}{where}: float8_e4m3 has one scale per row, not per group of "
                               f"{weight.group_size}")
        rows = sum(part.count for part in weight.parts)
        if weight.parts and rows != weight.shape[0]:
            raise ProgramError(f"weight {weight.name}{where}: parts hold {rows} rows, its shape says {weight.shape[0]}")
    return program


def _buffer(buffer: Buffer) -> str:
    unknown = [dim for dim in buffer.shape if isinstance(dim, str) and dim not in SYMBOLS]
    if unknown:
        return f"unknown symbol {unknown[0]}"
    known = (*FLOATS, *CODES) if buffer.kind == "cache" else (*FLOATS, "int32")
    return "" if buffer.dtype in known else f"dtype {buffer.dtype}; expected {', '.join(known)}"


def _operands(op: Op, program: Program) -> str:
    spec = OPS.get(op.kind)
    if spec is None:
        return f"unknown kind; known: {', '.join(OPS)}"
    for what, given, names in (("inputs", op.inputs, spec.inputs), ("outputs", op.outputs, spec.outputs)):
        least = sum(not name.endswith("?") for name in names)
        if not least <= len(given) <= len(names):
            return f"{len(given)} {what}, expected {least} to {len(names)}: {', '.join(names)}"
        missing = [name for name in given if name not in program.buffers]
        if missing:
            return f"no buffer named {missing[0]}"
    roles = {name.rstrip("?") for name in spec.weights}
    needed = {name for name in spec.weights if not name.endswith("?")}
    if not needed <= set(op.weights) <= roles:
        return f"weights {sorted(op.weights)}, expected {list(spec.weights)}"
    missing = [name for name in op.weights.values() if name not in program.weights]
    if missing:
        return f"no weight named {missing[0]}"
    if set(op.attributes) != set(spec.attributes):
        return f"attributes {sorted(op.attributes)}, expected {sorted(spec.attributes)}"
    return ""


def _order(op: Op, program: Program, written: set[str], seen: set[str]) -> str:
    if op.name in seen:
        return "another op has this name"
    for name in op.inputs:
        if name not in written:
            return f"it reads {name} before any op writes it"
    for name in op.outputs:
        kind = program.buffers[name].kind
        if kind == "input":
            return f"it writes the input {name}"
        if name in written and kind != "cache":
            return f"{name} is written twice"
    return ""


def _shapes(op: Op, program: Program) -> str:
    """Columns and rows that must agree. Rows are compared as symbols."""
    columns = [program.buffers[name].shape[-1] for name in (*op.inputs, *op.outputs)]
    rows = [program.buffers[name].shape[0] for name in (*op.inputs, *op.outputs)]
    a = op.attributes
    if op.kind == "linear":
        out, width = program.weights[op.weights["weight"]].shape
        expected = 2 * width if a["gate"] else width
        if columns[0] != expected or columns[-1] != out or (len(op.inputs) == 2 and columns[1] != out):
            return f"x has {columns[0]} columns and y {columns[-1]}; weight [{out}, {width}] gate '{a['gate']}'"
        if a["gate"] and a["gate"] not in ACTIVATIONS:
            return f"unknown gate '{a['gate']}'"
        bits = {"float8_e4m3": 0, "int4": 4}.get(program.weights[op.weights["weight"]].dtype)
        if a["float8_rows"] and (a["activation_group"] or a["weight_bits"] != bits):
            return ("float8_rows is for float8_e4m3 weights, and for int4 ones with weight_bits 4; activations are "
                    "rounded once")
        if (a["norm_epsilon"] > 0) != ("norm" in op.weights):
            return "norm_epsilon and the norm weight go together"
        return "" if len(set(rows)) == 1 else f"rows differ: {rows}"
    if op.kind in ("add", "multiply", "activation", "all_reduce", "rms_norm", "rope"):
        same = len({program.buffers[name].shape for name in (*op.inputs[: _operand_count(op)], *op.outputs)}) == 1
        return "" if same else f"shapes differ: columns {columns}, rows {rows}"
    if op.kind == "slice" and (a["start"] + a["size"] > columns[0] or columns[1] != a["size"]):
        return f"columns {a['start']} .. {a['start'] + a['size']} of {columns[0]} into {columns[1]}"
    if op.kind == "gather_rows" and rows[-1] != "outputs":
        return f"its output has rows '{rows[-1]}', expected 'outputs'"
    if op.kind in ("attention", "rope_cache") and a["num_heads"] % a["num_kv_heads"]:
        return f"{a['num_heads']} heads do not divide by {a['num_kv_heads']} kv heads"
    if op.kind == "rope_cache" and columns[0] != (a["num_heads"] + 2 * a["num_kv_heads"]) * a["head_size"]:
        return f"qkv has {columns[0]} columns"
    return ""


def _operand_count(op: Op) -> int:
    return 2 if op.kind in ("add", "multiply") else 1
