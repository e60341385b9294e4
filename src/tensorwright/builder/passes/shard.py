"""Cuts the program for one rank of a tensor-parallel group (Shoeybi et al., 2019).

q, k, v, fc and gate keep a slice of their output rows; dense and proj a slice of their inputs, and an all_reduce adds
the ranks' partial sums; lm_head keeps a slice of the vocabulary, and an all_gather joins the logits. The checkpoint's
rank file already holds the slices; tied embeddings are cut here.
"""

from __future__ import annotations

from dataclasses import replace

from tensorwright.builder.passes.context import Context
from tensorwright.program.program import Buffer, Op, Part, Program, Weight

BY_ROWS = ("attention.q", "attention.k", "attention.v", "mlp.fc", "mlp.gate")
BY_INPUTS = ("attention.dense", "mlp.proj")


def run(program: Program, context: Context) -> Program:
    """The rank's own program. With one rank the program stays as it is."""
    if context.tp_size == 1:
        return program
    cut = _Cut(program, context)
    for op in program.ops:
        cut.add(op)
    return program.with_ops(cut.ops, buffers=cut.buffers, weights=cut.weights)


class _Cut:
    """The sharded program while it grows: later ops see the new column counts of earlier ones."""

    def __init__(self, program: Program, context: Context) -> None:
        self.context = context
        self.buffers: dict[str, Buffer] = dict(program.buffers)
        self.weights: dict[str, Weight] = dict(program.weights)
        self.ops: list[Op] = []
        self.kv_heads = max(1, context.num_kv_heads // context.tp_size)

    def add(self, op: Op) -> None:
        if op.name.endswith(BY_ROWS) and op.kind == "linear":
            self._linear_by_rows(op)
        elif op.name.endswith(BY_INPUTS) and op.kind == "linear":
            self._linear_by_inputs(op)
        elif op.name == "lm_head":
            self._lm_head(op)
        elif op.kind in ("attention", "cache_write"):
            self._heads(op)
        else:
            self._follow(op)

    def _columns(self, name: str, columns: int) -> None:
        self.buffers[name] = replace(self.buffers[name], shape=(self.buffers[name].shape[0], columns))

    def _linear_by_rows(self, op: Op) -> None:
        rows, width = self.weights[op.weights["weight"]].shape
        local = rows // self.context.tp_size
        if op.name.endswith((".k", ".v")):  # fewer heads than ranks: each rank holds a copy of one
            local = self.kv_heads * (rows // self.context.num_kv_heads)
        start = self._local_start(op, local)
        for role, name in op.weights.items():
            weight = self.weights[name]
            shape = (local, width) if role == "weight" else (local,)
            self.weights[name] = replace(weight, shape=shape, parts=(Part(weight.parts[0].name, start, local),))
        self._columns(op.outputs[0], local)
        self.ops.append(op)

    def _local_start(self, op: Op, local: int) -> int:
        """Where q, k and v begin in the rank's joined tensor; other tensors are held alone."""
        head = op.name.rsplit(".", 1)[0]
        if op.name.endswith((".attention.q", ".mlp.fc", ".mlp.gate")):
            return 0
        q_rows = self.weights[f"{head}.q.weight"].shape[0]
        return q_rows if op.name.endswith(".k") else q_rows + local

    def _linear_by_inputs(self, op: Op) -> None:
        name = op.weights["weight"]
        rows, width = self.weights[name].shape
        self.weights[name] = replace(self.weights[name], shape=(rows, width // self.context.tp_size))
        kept = {role: held for role, held in op.weights.items() if role != "bias" or self.context.rank == 0}
        output = op.outputs[0]
        partial = f"{op.name}.partial"
        self.buffers[partial] = replace(self.buffers[output], name=partial)
        self.ops.append(replace(op, outputs=(partial,), weights=kept))
        self.ops.append(Op(f"{op.name}.all_reduce", "all_reduce", (partial,), (output,)))

    def _lm_head(self, op: Op) -> None:
        name = op.weights["weight"]
        weight = self.weights[name]
        vocab, width = weight.shape
        tied = weight.parts[0].name != "lm_head"
        if tied and vocab % self.context.tp_size:  # ranks must gather equal slices: every rank does it all
            self.ops.append(op)
            return
        local = -(-vocab // self.context.tp_size)
        start = self.context.rank * local if tied else 0
        self.weights[name] = replace(weight, shape=(local, width), parts=(Part(weight.parts[0].name, start, local),))
        logits, slices, padded = op.outputs[0], "lm_head.slice", "lm_head.padded"
        self.buffers[slices] = Buffer(slices, ("outputs", local), "float32")
        self.ops.append(replace(op, outputs=(slices,)))
        total = local * self.context.tp_size
        if total == vocab:
            self.ops.append(Op("lm_head.all_gather", "all_gather", (slices,), (logits,)))
            return
        self.buffers[padded] = Buffer(padded, ("outputs", total), "float32")
        self.ops.append(Op("lm_head.all_gather", "all_gather", (slices,), (padded,)))
        self.ops.append(Op("lm_head.unpad", "slice", (padded,), (logits,), {}, {"start": 0, "size": vocab}))

    def _heads(self, op: Op) -> None:
        attributes = {**op.attributes, "num_kv_heads": self.kv_heads}
        if op.kind == "attention":
            attributes["num_heads"] = op.attributes["num_heads"] // self.context.tp_size
            self._columns(op.outputs[0], attributes["num_heads"] * op.attributes["head_size"])
        for name in op.outputs:
            buffer = self.buffers[name]
            if buffer.kind == "cache":
                self.buffers[name] = replace(buffer, shape=(*buffer.shape[:2], self.kv_heads, *buffer.shape[3:]))
        self.ops.append(replace(op, attributes=attributes))

    def _follow(self, op: Op) -> None:
        """Ops that keep the columns of their input."""
        if op.kind in ("rope", "rms_norm", "activation", "multiply"):
            columns = self.buffers[op.inputs[0]].shape[-1]
            if isinstance(columns, int):
                self._columns(op.outputs[0], columns)
        self.ops.append(op)
