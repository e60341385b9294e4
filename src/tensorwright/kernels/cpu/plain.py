"""What most CPU kernels share: one tactic, and weights that are stored as they are or widened to float32.

It knows no op. Kernels for linears have real layouts and do not derive from this.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tensorwright.kernels.interface import Array, Cost, Source, Tactic, Target, Tensor
from tensorwright.program.ops import ATTRIBUTE_DEFAULTS, OPS
from tensorwright.program.program import Buffer, Op, Program, Weight
from tensorwright.program.reference import run_op

NATIVE_TYPES = {"float32": "float", "float16": "tw::half", "bfloat16": "tw::bfloat16", "int8": "int8_t"}
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FLOAT32, STORED = "float32", "stored"  # layouts: widened to float32, or as in the checkpoint


class PlainKernel:
    """Base of kernels without choices. An heir names its op, and says its source and cost."""

    name = ""  # also the op's kind
    layout = FLOAT32

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Every target, as long as weights are unquantised and activations float32."""
        weights = [program.weights[name] for name in op.weights.values()]
        buffers = [program.buffers[name] for name in (*op.inputs, *op.outputs)]
        return (op.kind == self.name and all(weight.dtype in DTYPES for weight in weights)
                and all(b.dtype == "float32" for b in buffers if b.kind in ("activation", "output")))

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        """The only one."""
        return (Tactic(self.layout),)

    def pack(self, op: Op, program: Program, role: str, tensor: Tensor, tactic: Tactic) -> Array:
        """Row-major numbers: float32, or as stored."""
        dtype = tensor.values.dtype if tactic.layout == STORED else np.float32
        return np.ascontiguousarray(tensor.values, dtype).reshape(-1).view(np.uint8)

    def unpack(self, weight: Weight, packed: Array, layout: str) -> Tensor:
        """The checkpoint's numbers: widening loses nothing."""
        stored = packed.view(DTYPES[weight.dtype] if layout == STORED else np.float32)
        return Tensor(stored.astype(DTYPES[weight.dtype]).reshape(weight.shape))

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """The C++ of the op: what every heir has to say for itself."""
        raise NotImplementedError

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """None, unless the heir says otherwise."""
        return 0

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Activations once each and the weights; one operation per number written."""
        names = [*op.inputs, *(name for name in op.outputs if name not in op.inputs)]
        moved = sum(columns(program.buffers[name]) for name in names if program.buffers[name].kind != "cache")
        held = sum(4 * int(np.prod(program.weights[name].shape)) for name in op.weights.values())
        return Cost(4.0 * num_tokens * moved + held, float(num_tokens * columns(program.buffers[op.outputs[0]])))

    def reference(self, op: Op, program: Program, inputs: Mapping[str, Array],
                  weights: Mapping[str, Tensor]) -> dict[str, Array]:
        """The op's meaning in NumPy; outputs by their names in `program.ops`. Caches are changed in place."""
        spec = OPS[op.kind]
        names = [name.rstrip("?") for name in spec.inputs][:len(op.inputs)]
        given = {buffer: inputs[name] for buffer, name in zip(op.inputs, names, strict=True)}
        numbers = {role: tensor.values.astype(np.float32) for role, tensor in weights.items()}
        results = run_op(op, given, numbers)
        return {name.rstrip("?"): results[buffer] for name, buffer in zip(spec.outputs, op.outputs, strict=False)}


def columns(buffer: Buffer) -> int:
    """Numbers per row of an activation; 1 for the batch's own inputs."""
    return int(buffer.shape[-1]) if len(buffer.shape) == 2 and not isinstance(buffer.shape[-1], str) else 1


def attribute(op: Op, name: str) -> Any:
    """An attribute of the op, or its default."""
    return op.attributes[name] if name in op.attributes else ATTRIBUTE_DEFAULTS[name]


def float_bits(value: float) -> str:
    """A float32 as its bits, for C++ templates: they take no floats before C++20."""
    return f"{int(np.float32(value).view(np.uint32)):#x}u"


def cache_of(op: Op, program: Program) -> Buffer:
    """The op's keys and values [blocks, 2, kv_heads, block_size, head_size]."""
    return next(program.buffers[name] for name in op.inputs if len(program.buffers[name].shape) == 5)


def supports_cache(op: Op, program: Program, dtypes: Container[str] = NATIVE_TYPES) -> bool:
    """Whether the cache's numbers are among the dtypes, and have scales exactly when they are int8."""
    scaled = any(len(program.buffers[n].shape) == 4 and program.buffers[n].kind == "cache" for n in op.inputs)
    dtype = cache_of(op, program).dtype
    return dtype in dtypes and scaled == (dtype == "int8")
