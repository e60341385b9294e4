"""Joining linears that read the same input: their weights become one, row after row. Shared by two passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorwright.program.program import Buffer, Op, Part, Weight


def join_linears(name: str, ops: Sequence[Op], buffers: dict[str, Buffer], weights: dict[str, Weight]) -> Op:
    """One linear whose output holds the outputs of `ops` side by side. Adds its buffer and weights to the tables."""
    first = ops[0]
    joined: dict[str, str] = {}
    for role in first.weights:
        held = [weights[op.weights[role]] for op in ops]
        rows = sum(weight.shape[0] for weight in held)
        parts = _merge([part for weight in held for part in weight.parts])
        joined[role] = f"{name}.{role}"
        weights[joined[role]] = replace(held[0], name=joined[role], shape=(rows, *held[0].shape[1:]), parts=parts)
    output = f"{name}.y"
    narrow = buffers[first.outputs[0]]
    buffers[output] = replace(narrow, name=output, shape=(narrow.shape[0], weights[joined["weight"]].shape[0]))
    return replace(first, name=name, outputs=(output,), weights=joined)


def _merge(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts that follow each other in one tensor become one part."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last is not None and last.name == part.name and last.start + last.count == part.start:
            merged[-1] = Part(last.name, last.start, last.count + part.count)
        else:
            merged.append(part)
    return tuple(merged)
