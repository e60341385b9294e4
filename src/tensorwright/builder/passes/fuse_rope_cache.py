"""Makes one op of everything between the qkv linear and attention: slices, head norms, ropes and the cache write."""

from __future__ import annotations

from tensorwright.builder.passes.context import Context
from tensorwright.program.program import Op, Program


def run(program: Program, context: Context) -> Program:
    """`rope_cache` in the place of each cache_write whose keys and values come from one qkv buffer."""
    ops = list(program.ops)
    for write in [op for op in ops if op.kind == "cache_write"]:
        group = _group(program, write)
        if group is not None:
            replaced, fused = group
            ops[ops.index(write)] = fused
            ops = [op for op in ops if op not in replaced]
    return program.with_ops(ops)


def _chain(program: Program, buffer: str) -> list[Op]:
    """Ops from the qkv slice to `buffer`, last first: rope, rms_norm and slice where they are there."""
    chain: list[Op] = []
    op = program.producer(buffer)
    while op is not None and op.kind in ("rope", "rms_norm", "slice"):
        chain.append(op)
        if op.kind == "slice":
            break
        op = program.producer(op.inputs[0])
    return chain


def _group(program: Program, write: Op) -> tuple[list[Op], Op] | None:
    attention = next(op for op in program.consumers(write.outputs[0]) if op.kind == "attention")
    q, k, v = (_chain(program, name) for name in (attention.inputs[0], write.inputs[0], write.inputs[1]))
    kinds = [op.kind for op in q]
    if kinds not in (["rope", "slice"], ["rope", "rms_norm", "slice"]) or [op.kind for op in k] != kinds or len(v) != 1:
        return None
    rope, split = q[0], q[-1]
    weights = {"inverse_frequencies": rope.weights["inverse_frequencies"]}
    epsilon = 0.0
    if len(q) == 3:
        weights.update(q_norm=q[1].weights["weight"], k_norm=k[1].weights["weight"])
        epsilon = q[1].attributes["epsilon"]
    attributes = {name: attention.attributes[name] for name in ("num_heads", "num_kv_heads", "head_size")}
    attributes.update(attention_factor=rope.attributes["attention_factor"], norm_epsilon=epsilon)
    fused = Op(write.name.replace("cache_write", "rope_cache"), "rope_cache",
               (split.inputs[0], "positions", *write.inputs[2:]), (attention.inputs[0], *write.outputs),
               weights, attributes)
    return [*q, *k, *v], fused
