"""Slots: no buffer is overwritten while it is still to be read, and sharing saves memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorwright.builder.memory import Memory, plan_memory
from tensorwright.builder.passes import run_passes
from tensorwright.builder.passes.context import Context
from tensorwright.models.config import ModelConfig
from tensorwright.models.decoder import build_program
from tensorwright.program.program import Buffer, Op, Program
from tensorwright.program.verify import verify

CONFIG = ModelConfig("LlamaForCausalLM", "float32", 64, 32, 5, 4, 2, 8, 48, 128)


def violations(program: Program, memory: Memory) -> list[str]:
    """Follows what each slot holds through the program, op by op."""
    holds: dict[int, str] = {}
    found = []
    for op in program.ops:
        for name in op.inputs:
            if name in memory.slot_of and holds.get(memory.slot_of[name]) != name:
                found.append(f"{op.name} reads {name}, its slot holds {holds.get(memory.slot_of[name])}")
        for name in op.outputs:
            if name in memory.slot_of:
                holds[memory.slot_of[name]] = name
                slot, buffer = memory.slots[memory.slot_of[name]], program.buffers[name]
                if slot.rows != buffer.shape[0] or slot.columns < int(buffer.shape[1]):
                    found.append(f"{name} does not fit its slot {slot}")
    return found


@pytest.mark.parametrize("context", [Context(), Context(tp_size=2, rank=1, num_kv_heads=2)])
def test_a_decoder_keeps_its_buffers_apart(context: Context) -> None:
    plain = build_program(CONFIG, kv_dtype="float32", tokens_per_block=8)
    for program in (plain, run_passes(plain, context)):
        assert violations(program, plan_memory(program)) == []


def test_memory_does_not_grow_with_layers() -> None:
    sizes = []
    for layers in (2, 12):
        config = replace(CONFIG, num_layers=layers)
        program = run_passes(build_program(config, kv_dtype="float32", tokens_per_block=8), Context())
        sizes.append(sum(slot.columns for slot in plan_memory(program).slots))
    assert sizes[0] == sizes[1]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random graphs of adds and activations over tokens, 8 columns wide."""
    buffers = {"x": Buffer("x", ("tokens", 8), "float32", "input")}
    names, ops = ["x"], []
    for index in range(draw(st.integers(1, 25))):
        output = f"b{index}"
        buffers[output] = Buffer(output, ("tokens", 8), "float32")
        if draw(st.booleans()):
            inputs = (draw(st.sampled_from(names)), draw(st.sampled_from(names)))
            ops.append(Op(f"op{index}", "add", inputs, (output,)))
        else:
            ops.append(Op(f"op{index}", "activation", (draw(st.sampled_from(names)),), (output,), {},
                          {"function": "silu"}))
        names.append(output)
    last = ops[-1].outputs[0]
    buffers[last] = replace(buffers[last], kind="output")
    return verify(Program(buffers, {}, tuple(ops)))


@settings(max_examples=200, deadline=None)
@given(program=programs())
def test_no_program_overwrites_what_it_still_reads(program: Program) -> None:
    assert violations(program, plan_memory(program)) == []
