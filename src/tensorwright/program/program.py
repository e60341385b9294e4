"""The program: ops over named buffers and weights, as plain data that goes to JSON and back.

It knows what an op looks like, not what it means (`ops.py`) nor how it is computed (`reference.py`, kernels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Dim = int | str
"""A size: a number, or one of the symbols "tokens", "sequences", "outputs" (rows that get logits), "blocks"."""

SYMBOLS = ("tokens", "sequences", "outputs", "blocks", "block_table")

BufferKind = Literal["input", "activation", "cache", "output"]


@dataclass(frozen=True)
class Buffer:
    """A named array. Activations on the CPU are float32; a cache lives as long as the executor."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    kind: BufferKind = "activation"


@dataclass(frozen=True)
class Part:
    """Rows [start, start + count) of a checkpoint tensor (`name` without `.weight`)."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Weight:
    """A parameter of the program: shape as used ([out, in] for a linear), and how its numbers are held.

    dtype is float32, float16 or bfloat16, or int8, int4 or float8_e4m3 with one scale (of `scale_dtype`) per
    `group_size` inputs of each output row; group_size −1 is one scale per row. `parts` are joined along the rows.
    `values`: a small constant held in the program itself instead of in the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group_size: int = 0
    scale_dtype: str = ""
    parts: tuple[Part, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether it is codes and scales."""
        return self.dtype in ("int4", "int8", "float8_e4m3")


@dataclass(frozen=True)
class Op:
    """One step. `name` is unique and readable, such as "layers.3.attention.qkv"."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)  # role -> weight name
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Ops in order. Every buffer and weight an op names must be in the tables (see `verify`)."""

    buffers: Mapping[str, Buffer]
    weights: Mapping[str, Weight]
    ops: tuple[Op, ...]

    def with_ops(self, ops: list[Op], *, buffers: Mapping[str, Buffer] | None = None,
                 weights: Mapping[str, Weight] | None = None) -> Program:
        """The program with other ops; buffers and weights that no op uses any more are dropped."""
        all_buffers = self.buffers if buffers is None else buffers
        all_weights = self.weights if weights is None else weights
        used = {name for op in ops for name in (*op.inputs, *op.outputs)}
        held = {name for op in ops for name in op.weights.values()}
        return Program(
            {n: b for n, b in all_buffers.items() if n in used or b.kind in ("input", "output")},
            {n: w for n, w in all_weights.items() if n in held},
            tuple(ops),
        )

    def producer(self, buffer: str) -> Op | None:
        """The op that writes an activation (caches are written in place and have many writers)."""
        return next((op for op in self.ops if buffer in op.outputs), None)

    def consumers(self, buffer: str) -> list[Op]:
        """The ops that read a buffer, in order."""
        return [op for op in self.ops if buffer in op.inputs]


def to_json(program: Program) -> dict[str, Any]:
    """A program as JSON values; `from_json` gives an equal program back."""
    return {
        "buffers": [{"name": b.name, "shape": list(b.shape), "dtype": b.dtype, "kind": b.kind}
                    for b in program.buffers.values()],
        "weights": [{"name": w.name, "shape": list(w.shape), "dtype": w.dtype, "group_size": w.group_size,
                     "scale_dtype": w.scale_dtype, "values": list(w.values),
                     "parts": [[p.name, p.start, p.count] for p in w.parts]}
                    for w in program.weights.values()],
        "ops": [{"name": o.name, "kind": o.kind, "inputs": list(o.inputs), "outputs": list(o.outputs),
                 "weights": dict(o.weights), "attributes": dict(o.attributes)} for o in program.ops],
    }


def from_json(data: Mapping[str, Any]) -> Program:
    """The inverse of `to_json`."""
    buffers = [Buffer(b["name"], tuple(b["shape"]), b["dtype"], b["kind"]) for b in data["buffers"]]
    weights = [Weight(w["name"], tuple(w["shape"]), w["dtype"], w["group_size"], w["scale_dtype"],
                      tuple(Part(*p) for p in w["parts"]), tuple(w["values"])) for w in data["weights"]]
    ops = [Op(o["name"], o["kind"], tuple(o["inputs"]), tuple(o["outputs"]), dict(o["weights"]),
              dict(o["attributes"])) for o in data["ops"]]
    return Program({b.name: b for b in buffers}, {w.name: w for w in weights}, tuple(ops))

