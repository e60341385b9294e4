"""The verifier names the op and the rule that a broken program breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tensorwright.errors import ProgramError
from tensorwright.program.program import Buffer, Op, Program, Weight
from tensorwright.program.verify import verify


def change(program: Program, index: int, **fields: object) -> Program:
    ops = list(program.ops)
    ops[index] = replace(ops[index], **fields)
    return replace(program, ops=tuple(ops))


def linear(program: Program) -> int:
    return next(i for i, op in enumerate(program.ops) if op.kind == "linear")


BREAKS: dict[str, tuple[Callable[[Program], Program], str]] = {
    "unknown kind": (lambda p: change(p, 0, kind="convolution"), "unknown kind"),
    "missing buffer": (lambda p: change(p, 0, inputs=("nothing",)), "no buffer named nothing"),
    "missing input": (lambda p: change(p, linear(p), inputs=()), "0 inputs"),
    "missing weight": (lambda p: change(p, linear(p), weights={"weight": "nothing"}), "no weight named nothing"),
    "strange role": (lambda p: change(p, linear(p), weights={"matrix": "lm_head.weight"}), "expected"),
    "missing attribute": (lambda p: change(p, linear(p), attributes={}), "attributes"),
    "same name": (lambda p: change(p, 1, name=p.ops[0].name), "another op"),
    "wrong order": (lambda p: replace(p, ops=(p.ops[1], p.ops[0], *p.ops[2:])), "before any op writes"),
    "never written": (lambda p: replace(p, buffers={**p.buffers, "x": Buffer("x", ("tokens", 4), "float32")}),
                      "never written"),
    "unknown symbol": (lambda p: replace(p, buffers={**p.buffers, "x": Buffer("x", ("rows",), "int32", "input")}),
                       "unknown symbol"),
    "wrong columns": (lambda p: replace(p, weights={**p.weights, "lm_head.weight": replace(
        p.weights["lm_head.weight"], shape=(50, 25))}), "weight [50, 25]"),
    "scales without group": (lambda p: replace(p, weights={**p.weights, "lm_head.weight": replace(
        p.weights["lm_head.weight"], dtype="int4")}), "group size 0"),
    "float8 in groups": (lambda p: replace(p, weights={**p.weights, "lm_head.weight": replace(
        p.weights["lm_head.weight"], dtype="float8_e4m3", group_size=32, scale_dtype="float16")}), "one scale per row"),
    "float8 activations of other weights": (lambda p: change(p, linear(p), attributes={
        **p.ops[linear(p)].attributes, "float8_rows": 65}), "float8_rows"),
    "unknown dtype": (lambda p: replace(p, buffers={**p.buffers, "x": Buffer("x", ("tokens",), "float8", "input")}),
                      "dtype float8; expected"),
    "parts that do not fit": (lambda p: replace(p, weights={**p.weights, "lm_head.weight": replace(
        p.weights["lm_head.weight"], parts=p.weights["lm_head.weight"].parts * 2)}), "parts hold 100 rows"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_named(program: Program, name: str) -> None:
    breaking, message = BREAKS[name]
    assert verify(program) is program
    with pytest.raises(ProgramError) as error:
        verify(breaking(program), after="some_pass")
    assert message in error.value.message
    assert "after some_pass" in error.value.message


def test_an_output_written_twice_is_refused() -> None:
    buffers = {"a": Buffer("a", ("tokens", 2), "float32", "input"), "y": Buffer("y", ("tokens", 2), "float32")}
    ops = tuple(Op(name, "activation", ("a",), ("y",), {}, {"function": "silu"}) for name in ("first", "second"))
    with pytest.raises(ProgramError, match="second.*written twice"):
        verify(Program(buffers, {}, ops))


def test_weights_know_whether_they_are_quantised() -> None:
    assert Weight("w", (4, 4), "int4", 128, "float16").is_quantized
    assert not Weight("w", (4, 4), "float16").is_quantized
