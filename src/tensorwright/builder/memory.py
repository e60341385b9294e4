"""Where activations live: buffers whose lifetimes do not overlap share a slot. It knows columns, not row counts.

A slot is a float32 array of so many columns; its rows, one for each token or each output, are given when the engine
is loaded, because limits change no engine file.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorwright.program.program import Buffer, Op, Program


@dataclass(frozen=True)
class Slot:
    """rows is the symbol "tokens" or "outputs"; columns of float32."""

    rows: str
    columns: int


@dataclass(frozen=True)
class Memory:
    """Slots, and the slot of each activation and output buffer."""

    slots: tuple[Slot, ...]
    slot_of: dict[str, int]


def plan_memory(program: Program) -> Memory:
    """Slots by a scan in op order. A linear's or add's output takes its residual's place where that dies there."""
    last_use = {name: index for index, op in enumerate(program.ops) for name in op.inputs}
    slots: list[Slot] = []
    slot_of: dict[str, int] = {}
    free: list[int] = []
    for index, op in enumerate(program.ops):
        dying = [name for name in dict.fromkeys(op.inputs) if name in slot_of and last_use[name] == index]
        for name in op.outputs:
            buffer = program.buffers[name]
            if buffer.kind == "cache":
                continue
            reused = _in_place(op, dying, buffer, program)
            if reused:
                slot_of[name] = slot_of[reused]
                dying.remove(reused)
            else:
                slot_of[name] = _take(buffer, free, slots)
        free += [slot_of[name] for name in dying]
        free += [slot_of[name] for name in op.outputs if name in slot_of and name not in last_use
                 and program.buffers[name].kind != "output"]
    return Memory(tuple(slots), slot_of)


def _in_place(op: Op, dying: list[str], output: Buffer, program: Program) -> str | None:
    """The input whose elements are read just before the output's same elements are written, if it dies here."""
    if op.kind == "linear" and len(op.inputs) == 2 and op.inputs[0] != op.inputs[1]:
        candidate = op.inputs[1]
    elif op.kind == "add":
        candidate = op.inputs[0]
    else:
        return None
    return candidate if candidate in dying and program.buffers[candidate].shape == output.shape else None


def _take(buffer: Buffer, free: list[int], slots: list[Slot]) -> int:
    """The tightest free slot of the same rows, widened if need be; else a new one. Outputs get one of their own."""
    rows, columns = str(buffer.shape[0]), int(buffer.shape[1])
    fitting = [index for index in free if slots[index].rows == rows]
    if buffer.kind != "output" and fitting:
        index = min(fitting, key=lambda i: (slots[i].columns < columns, abs(slots[i].columns - columns)))
        free.remove(index)
        slots[index] = Slot(rows, max(columns, slots[index].columns))
        return index
    slots.append(Slot(rows, columns))
    return len(slots) - 1
