"""What an engine's manifest tells of its tactics: for ops that are alike, each bucket's choice, times and limits."""

from __future__ import annotations

from typing import Any

from tensorwright.builder.clock import Limits
from tensorwright.builder.plan import Choice, Plan
from tensorwright.builder.tactics import Pick, describe
from tensorwright.program.program import Op, Program


def tuning_facts(plan: Plan) -> dict[str, Any]:
    """JSON values. Seconds, bytes and operations are of one execution; ops without a choice are left out.

    `limit_s` is the least time that the bytes or the operations need at the measured rates, where those are known.
    """
    groups: dict[str, dict[str, Any]] = {}
    for choice in plan.choices:
        if any(pick.why != "only" for pick in choice.picks):
            name = f"{choice.op.kind} {choice.op.name.rpartition('.')[2]}"
            picks = [_pick(choice, pick, plan) for pick in choice.picks]
            group = groups.setdefault(f"{name} {picks}", {"name": name, "ops": [], "picks": picks})
            group["ops"].append(choice.op.name)
    limits = plan.tuning.limits
    return {"machine": plan.tuning.machine, "bytes_per_s": None if limits is None else limits.bytes_per_s,
            "operations_per_s": {} if limits is None else {str(b): r for b, r in limits.operations_per_s.items()},
            "groups": list(groups.values())}


def _pick(choice: Choice, pick: Pick, plan: Plan) -> dict[str, Any]:
    cost = choice.kernel.cost(choice.op, plan.program, pick.max_rows, 0)
    next_best = None if pick.next_best is None else [describe(pick.next_best[0]), pick.next_best[1]]
    return {"max_rows": pick.max_rows, "tactic": describe(pick.tactic), "why": pick.why, "seconds": pick.seconds,
            "next_best": next_best, "bytes": cost.bytes, "operations": cost.operations,
            "limit_s": _limit_s(cost.bytes, cost.operations, _bits(choice.op, plan.program), plan.tuning.limits)}


def _limit_s(num_bytes: float, operations: float, bits: int, limits: Limits | None) -> float | None:
    if limits is None:
        return None
    return max(num_bytes / limits.bytes_per_s, operations / limits.operations_per_s[bits])


def _bits(op: Op, program: Program) -> int:
    """Bits of the weights in integer dot products; 32 where products are of float32."""
    if not op.attributes.get("activation_group") or "weight" not in op.weights:
        return 32
    return {"int4": 4, "int8": 8}.get(program.weights[op.weights["weight"]].dtype, 32)
