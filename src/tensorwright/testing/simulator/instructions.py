"""From PTX statements to instructions of the simulator: which handler, which rows. It knows opcodes' spelling.

An opcode that is not here, or a modifier that would change what is computed, is refused by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from tensorwright.testing.simulator.ptx import SPECIALS, ZEROS, Body, Rows, Statement, operands_of

PLAIN, BRANCH, EXIT, TOGETHER, BARRIER, BARRIER_ARRIVE = range(6)
GENERIC, GLOBAL, SHARED, LOCAL, PARAM = range(5)
SPACES = {"global": GLOBAL, "shared": SHARED, "shared::cta": SHARED, "shared::cluster": SHARED, "local": LOCAL,
          "param": PARAM, "const": GLOBAL}
TYPES = {f"{kind}{bits}" for kind in "busf" for bits in (8, 16, 32, 64)} | {
    "pred", "bf16", "f16x2", "bf16x2", "e4m3x2", "e5m2x2"}
IGNORED = {"rn", "ftz", "approx", "full", "uni", "sync", "aligned", "noftz"}
CACHED = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "release", "gpu", "sys", "cta", "cluster", "acq_rel"}
POLLING = {"volatile", "relaxed", "acquire"}
NOTHING = ("griddepcontrol", "setmaxnreg", "fence", "membar", "prefetch", "prefetchu", "createpolicy", "discard",
           "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "applypriority", "cp.async.bulk.commit_group")
ROUNDINGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rni": 16, "rzi": 17, "rmi": 18, "rpi": 19, "rna": 0}
SATURATED = 8


@dataclass
class Instruction:
    """One of the simulator's: machine.h says what the numbers mean."""

    name: str
    flow: int = PLAIN
    operands: list[int] = field(default_factory=list)
    space: int = GENERIC
    vector: int = 1
    mode: int = 0
    width: int = 0
    immediate: int = 0


class Lowering:
    """The instructions of one kernel."""

    def __init__(self, body: Body, symbols: dict[str, int]) -> None:
        """`symbols`: host addresses of the module's variables."""
        self._body, self._symbols = body, symbols
        self.rows = Rows(body)
        self._scopes: tuple[int, ...] = (0,)

    def lower(self, statement: Statement) -> tuple[Instruction, int, bool]:
        """(instruction, guard's predicate or −1, whether it is negated).

        Raises:
            ValueError: an opcode, a modifier or an operand that is not known.
        """
        self._scopes = statement.scopes
        guard = -1 if not statement.guard else self.rows.predicate(statement.guard.lstrip("!"), self._scopes)
        try:
            return self._instruction(statement), guard, statement.guard.startswith("!")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{error} in {statement.text!r}") from None

    def _instruction(self, s: Statement) -> Instruction:
        if s.opcode.startswith(NOTHING):
            return Instruction("nothing")
        parts = s.opcode.split(".")
        for name, method in _METHODS.items():
            if s.opcode == name or s.opcode.startswith(name + "."):
                return method(self, parts, s.operands)
        return self._arithmetic(parts, s.operands)

    # Operands

    def row(self, text: str, size: int) -> int:
        """A register or an immediate of so many bytes a lane; −1 for "_"."""
        if text == "_":
            return -1
        if text in ZEROS:
            return self.rows.constant(0, size)
        if text in SPECIALS or self._is_register(text):
            row, has = self.rows.register(text, self._scopes)
            if has != size:
                raise ValueError(f"{text} has {has} bytes a lane, not {size}")
            return row
        return self.rows.constant(self._bits(text, size), size)

    def _is_register(self, text: str) -> bool:
        try:
            self.rows.kind(text, self._scopes)
        except ValueError:
            return False
        return True

    def _bits(self, text: str, size: int) -> int:
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return int(text[2:], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        if re.fullmatch(r"-?\d+\.\d*", text):
            return int.from_bytes(struct.pack("<f" if size == 4 else "<d", float(text)), "little")
        return self._symbol(text)

    def _symbol(self, text: str) -> int:
        name, _, offset = text.partition("+")
        variable = self._body.variables.get(name)
        start = variable.offset if variable is not None else self._symbols[name]
        return start + int(offset or 0)

    def address(self, text: str) -> tuple[list[int], int]:
        """([row, whether it has 64 bits], offset) of "[register+offset]"."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise ValueError(f"not an address: {text!r}")
        offset = int(match[2], 0) if match[2] else 0
        if self._is_register(match[1]):
            row, size = self.rows.register(match[1], self._scopes)
            return [row, int(size == 8)], offset
        return [self.rows.constant(self._bits(match[1], 8), 8), 1], offset

    def predicate(self, text: str) -> int:
        """Its number; constants too."""
        if text in ("0", "1", "-1"):
            return int(text != "0")
        return self.rows.predicate(text.lstrip("!"), self._scopes)

    def _vector(self, text: str, size: int) -> list[int]:
        return [self.row(each, size) for each in (operands_of(text[1:-1]) if text.startswith("{") else (text,))]

    # Instructions

    def _arithmetic(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """Registers in, a register out, lane by lane."""
        base, types = parts[0], [part for part in parts[1:] if part in TYPES]
        modifiers = [part for part in parts[1:] if part not in TYPES and part not in IGNORED]
        if base == "mov" and any(each.startswith("{") for each in operands):
            return self._pieces(types[0], operands)
        if types == ["pred"]:
            return Instruction(f"{base}.pred", operands=[self.predicate(each) for each in operands])
        size = _size(types[0])
        if base == "cvt":
            return self._convert(modifiers, types, operands)
        if base == "setp":
            return self._compare(modifiers, types[0], operands)
        if base == "selp":
            return Instruction(f"selp.{types[0]}", operands=[*(self.row(each, size) for each in operands[:3]),
                                                             self.predicate(operands[3])])
        if modifiers not in ([], ["lo"], ["hi"], ["wide"], ["l", "wrap"], ["r", "wrap"]):
            raise ValueError(f"modifiers {modifiers} of {base}")
        sizes = [size] * len(operands)
        if modifiers == ["wide"]:
            double = 4 if types[0].endswith("16") else 8
            sizes = [double, size, size, double][:len(operands)]
        if base in ("shl", "shr", "bfe"):
            sizes[2:] = [4] * len(sizes[2:])
        if base == "bfi":
            sizes[3:] = [4, 4]
        if base in ("popc", "clz"):
            sizes[0] = 4
        immediate = int(operands[4], 0) if base == "lop3" else 0
        rows = [self.row(each, size) for each, size in zip(operands[:5 - (base == "lop3")], sizes, strict=False)]
        return Instruction(".".join([base, *modifiers, types[0]]), operands=rows, immediate=immediate)

    def _pieces(self, kind: str, operands: tuple[str, ...]) -> Instruction:
        """A mov between a register and its parts."""
        size = _size(kind)
        if operands[0].startswith("{"):
            return Instruction(f"split.{kind}", operands=[*self._vector(operands[0], 4), self.row(operands[1], size)])
        parts = self._vector(operands[1], 4)
        return Instruction(f"join{'' if len(parts) == 2 else len(parts)}.{kind}",
                           operands=[self.row(operands[0], size), *parts])

    def _convert(self, modifiers: list[str], types: list[str], operands: tuple[str, ...]) -> Instruction:
        mode = 0
        for modifier in modifiers:
            mode |= SATURATED if modifier in ("sat", "satfinite") else ROUNDINGS[modifier]
        sizes, low = [_size(types[0])] + [_size(types[1])] * (len(operands) - 1), ""
        if sizes[1] == 4 and self._is_register(operands[1]) and self.rows.register(operands[1], self._scopes)[1] == 8:
            sizes[1], low = 8, ".low"  # the lower part of a wider register
        rows = [self.row(each, size) for each, size in zip(operands, sizes, strict=True)]
        return Instruction(f"cvt.{types[0]}.{types[1]}{low}", operands=rows, mode=mode)

    def _compare(self, modifiers: list[str], kind: str, operands: tuple[str, ...]) -> Instruction:
        first, _, second = operands[0].partition("|")
        found = [self.predicate(first), self.predicate(second) if second else -1]
        rows = [self.row(each, _size(kind)) for each in operands[1:3]]
        mode = {"and": 1, "or": 2, "xor": 3}[modifiers[1]] if len(modifiers) > 1 else 0
        extra = [self.predicate(operands[3])] if mode else []
        return Instruction(f"setp.{modifiers[0]}.{kind}", operands=found + rows + extra, mode=mode)

    def _access(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """Loads and stores."""
        is_load = parts[0] == "ld"
        kind = parts[-1]
        space = next((SPACES[part] for part in parts if part in SPACES), GENERIC)
        address, offset = self.address(operands[0 if not is_load else 1])
        registers = operands[0 if is_load else 1]
        width = int(re.sub(r"\D", "", kind)) // 8
        texts = operands_of(registers[1:-1]) if registers.startswith("{") else (registers,)
        sizes = {self.rows.register(t, self._scopes)[1] for t in texts if t != "_" and self._is_register(t)}
        size = sizes.pop() if sizes else _size(kind)
        if sizes or (size == 8) < (width == 8) or (not is_load and (size == 8) != (width == 8)):
            raise ValueError(f"registers of {registers} for {kind}")
        mode = (kind[0] == "s") | 2 * any(part in POLLING for part in parts) | 4 * (size == 8 and width < 8)
        return Instruction(parts[0], operands=[*address, *(self.row(t, size) for t in texts)], space=space,
                           vector=len(texts), mode=mode, width=width, immediate=offset)

    def _atomic(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """Atomic operations: atom and red."""
        kind = parts[-1]
        operation = next(part for part in parts if part in ("add", "min", "max", "exch", "cas", "and", "or", "xor",
                                                            "inc", "dec"))
        space = next((SPACES[part] for part in parts if part in SPACES), GENERIC)
        given = operands if parts[0] == "atom" else ("_", *operands)
        address, offset = self.address(given[1])
        rows = [self.row(each, _size(kind)) for each in given[2:]]
        return Instruction(f"atom.{operation}.{kind}", operands=[self.row(given[0], _size(kind)), *address, *rows],
                           space=space, immediate=offset)

    def _generic(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """Generic addresses: cvta."""
        space = next(SPACES[part] for part in parts if part in SPACES)
        return Instruction("cvta", operands=[self.row(each, 8) for each in operands], space=space,
                           mode=int("to" in parts))

    def _branch(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        return Instruction("nothing", BRANCH, immediate=self._body.labels[operands[0]])

    def _exit(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        return Instruction("nothing", EXIT)

    def _trap(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        return Instruction("trap")

    def _sleep(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        return Instruction("poll")

    def _barrier(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        flow = BARRIER_ARRIVE if "arrive" in parts else BARRIER
        return Instruction("nothing", flow, [self.row(each, 4) for each in operands])

    def _warp_barrier(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        return Instruction("nothing", TOGETHER, space=self.row(operands[0], 4))

    def _shuffle(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        to, _, inside = operands[0].partition("|")
        mode = ("idx", "up", "down", "bfly").index(parts[2])
        rows = [self.row(to, 4), self.predicate(inside) if inside else -1, *(self.row(o, 4) for o in operands[1:4])]
        return Instruction("shfl", TOGETHER, rows, space=self.row(operands[4], 4), mode=mode)

    def _vote(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        kind = ("all", "any", "uni", "ballot").index(parts[2])
        to = self.row(operands[0], 4) if kind == 3 else self.predicate(operands[0])
        mode = kind | 4 * operands[1].startswith("!")
        return Instruction("vote", TOGETHER, [to, self.predicate(operands[1])], space=self.row(operands[2], 4),
                           mode=mode)

    def _active(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        return Instruction("activemask", operands=[self.row(operands[0], 4)])

    def _elect(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        to, _, chosen = operands[0].partition("|")
        return Instruction("elect", TOGETHER, [self.row(to, 4), self.predicate(chosen)], space=self.row(operands[1], 4))

    def _product(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """The instruction mma.sync.aligned.SHAPE.row.col.d.a.b.c."""
        shape, to, number = parts[3], parts[6], parts[7]
        if parts[7] != parts[8] or parts[6] != parts[9] or len(parts) != 10:
            raise ValueError(f"types {parts[6:]} of mma")
        rows = [row for each in operands for row in self._vector(each, 4)]
        return Instruction(f"mma.{shape}.{to}.{number}", TOGETHER, rows, space=-1)

    def _group_product(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """The instruction wgmma.mma_async.sync.aligned.m64nNkK.f32.a.b."""
        match = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
        if match is None or parts[6] != parts[7]:
            raise ValueError(f"shape {parts[4]} or types {parts[6:]} of wgmma")
        is_shared = not operands[1].startswith("{")
        scales, transposed = operands[4:6], [text == "1" for text in operands[6:]]
        if scales != ("1", "1"):
            raise ValueError("wgmma with negated operands")
        a_turned, b_turned = ([False] * (not is_shared) + transposed + [False] * 2)[:2]
        rows = [*self._vector(operands[0], 4), *self._vector(operands[1], 8 if is_shared else 4),
                self.row(operands[2], 8), self.predicate(operands[3])]
        return Instruction(f"wgmma.k{match[2]}.{parts[5]}.{parts[6]}", TOGETHER, rows, space=-1, vector=int(match[1]),
                           mode=is_shared | 2 * b_turned | 4 * a_turned)

    def _matrices(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """The instructions ldmatrix and stmatrix."""
        count, is_load = int(next(part for part in parts if re.fullmatch(r"x\d", part))[1]), parts[0] == "ldmatrix"
        address, offset = self.address(operands[int(is_load)])
        rows = self._vector(operands[int(not is_load)], 4)
        return Instruction(parts[0], TOGETHER, rows + address if is_load else address + rows, space=-1, vector=count,
                           mode=int("trans" in parts), immediate=offset)

    def _move_matrix(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        return Instruction("movmatrix", TOGETHER, [self.row(each, 4) for each in operands], space=-1)

    def _mbarrier(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        kind = parts[1]
        if kind == "inval":
            return Instruction("nothing")
        if kind in ("try_wait", "test_wait"):
            if "parity" not in parts:
                raise ValueError("only waits for a parity")
            address, offset = self.address(operands[1])
            return Instruction("mbarrier.try_wait.parity", immediate=offset, operands=[
                self.predicate(operands[0]), *address, self.row(operands[2], 4)])
        at = next(index for index, each in enumerate(operands) if each.startswith("["))
        address, offset = self.address(operands[at])
        rest = [self.row(each, 4) for each in operands[at + 1:]]
        if kind == "arrive" and "expect_tx" not in parts and rest:
            raise ValueError("arrivals of more than one")
        name = "mbarrier.arrive.expect_tx" if kind == "arrive" and "expect_tx" in parts else f"mbarrier.{kind}"
        return Instruction(name, operands=address + rest, immediate=offset)

    def _copy(self, parts: list[str], operands: tuple[str, ...]) -> Instruction:
        """Asynchronous copies: cp.async and its groups."""
        rest = parts[2:]
        if rest[0] in ("commit_group", "wait_all"):
            return Instruction(f"cp.async.{rest[0]}")
        if rest[0] == "wait_group":
            return Instruction("cp.async.wait_group", immediate=int(operands[0]))
        if rest[0] == "mbarrier":
            address, offset = self.address(operands[0])
            if "noinc" not in rest:
                raise ValueError("only cp.async.mbarrier.arrive.noinc")
            return Instruction("cp.async.mbarrier.arrive", operands=address, immediate=offset)
        to, offset = self.address(operands[0])
        source, source_offset = self.address(operands[1])
        if rest[0] == "bulk":
            barrier, barrier_offset = self.address(operands[3])
            if not any(part.startswith("mbarrier") for part in rest) or not rest[1].startswith("shared"):
                raise ValueError("only bulk copies to shared memory that an mbarrier counts")
            return Instruction("cp.async.bulk", operands=[*to, *source, self.row(operands[2], 4), *barrier],
                               immediate=offset, mode=source_offset, width=barrier_offset)
        sizes = [self.row(each, 4) for each in (operands[2], operands[3] if len(operands) > 3 else operands[2])]
        return Instruction("cp.async", operands=[*to, *source, *sizes], immediate=offset, mode=source_offset)


def _size(kind: str) -> int:
    """Bytes a lane of a register that holds the type."""
    return 8 if kind.endswith("64") else 4


_Method = Callable[[Lowering, list[str], tuple[str, ...]], Instruction]
_METHODS: dict[str, _Method] = {
    "ld": Lowering._access, "st": Lowering._access, "atom": Lowering._atomic, "red": Lowering._atomic,
    "cvta": Lowering._generic, "bra": Lowering._branch, "ret": Lowering._exit, "exit": Lowering._exit,
    "trap": Lowering._trap, "nanosleep": Lowering._sleep, "bar.warp": Lowering._warp_barrier,
    "bar": Lowering._barrier, "barrier": Lowering._barrier, "shfl": Lowering._shuffle, "vote": Lowering._vote,
    "activemask": Lowering._active, "elect": Lowering._elect, "mma": Lowering._product,
    "wgmma.mma_async": Lowering._group_product, "ldmatrix": Lowering._matrices, "stmatrix": Lowering._matrices,
    "movmatrix": Lowering._move_matrix, "mbarrier": Lowering._mbarrier, "cp.async": Lowering._copy,
}
