"""PTX text into kernels whose statements have their names resolved: registers are rows, labels are places.

It knows PTX's grammar (PTX ISA 9.0, "Syntax"). What instructions do is `instructions.py`'s matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

LANES = 32
SPECIALS = ("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
            "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid")
ZEROS = ("%clock", "%clock64", "%globaltimer", "%smid", "%cluster_ctarank", "%clusterid.x")
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
POISON = 0xFF
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{")
_GLOBAL = re.compile(r"^\s*(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(global|const|shared)\s+(.*?);", re.M | re.S)
_VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?\.(?:volatile\s+\.)?[a-z]+(\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?")


@dataclass(frozen=True)
class Variable:
    """Memory with a name: of a block ("shared"), of a thread ("local"), a parameter, or of the module ("global")."""

    space: str
    offset: int
    size: int


@dataclass(frozen=True)
class Statement:
    """An instruction: `guard` is a register, with "!" in front where it is negated; operands as text."""

    guard: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    scopes: tuple[int, ...]  # innermost last


@dataclass
class Body:
    """A kernel as it is read."""

    name: str
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    registers: dict[tuple[int, str], str] = field(default_factory=dict)  # (scope, name or prefix) -> type
    parameter_bytes: int = 0
    shared_bytes: int = 0
    local_bytes: int = 0


def parse(text: str) -> list[Body]:
    """The kernels of a module.

    Raises:
        ValueError: text that is not understood.
    """
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text).replace("\0", "")
    outside, kernels = [], []
    at = 0
    for match in _ENTRY.finditer(text):
        end = _closing(text, match.end())
        outside.append(text[at:match.start()])
        kernels.append((match[1], match[2], text[match.end():end]))
        at = end + 1
    shared = [declaration for space, declaration in _GLOBAL.findall("".join(outside)) if space == "shared"]
    return [_kernel(name, parameters, body, shared) for name, parameters, body in kernels]


def operands_of(text: str) -> tuple[str, ...]:
    """Split at commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return tuple([*parts, last] if last else parts)


def _closing(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("a kernel's brace is not closed")


def _kernel(symbol: str, parameters: str, text: str, shared: list[str]) -> Body:
    body = Body(symbol)
    for declaration in filter(None, map(str.strip, parameters.split(","))):
        body.parameter_bytes = _declare(body, "param", declaration.removeprefix(".param").strip(), body.parameter_bytes)
    dynamic = [declaration for declaration in shared if "[]" in declaration]
    for declaration in (each for each in shared if each not in dynamic):
        name = declaration.partition("[")[0].split()[-1]
        if re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", text):
            body.shared_bytes = _declare(body, "shared", declaration, body.shared_bytes)
    for kind, word, scopes in _words(text):
        if kind == "label":
            body.labels[word] = len(body.statements)
        elif word.startswith("."):
            _directive(body, word, scopes)
        else:
            body.statements.append(_statement(word, scopes))
    body.labels = {label: place for label, place in body.labels.items() if place <= len(body.statements)}
    for declaration in dynamic:
        body.shared_bytes = _declare(body, "shared", declaration, body.shared_bytes)
    return body


def _words(text: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """("label" or "statement", text, scopes)."""
    token = re.compile(r"\s*(?:([{}])|([A-Za-z_$][\w$]*):(?!:)|([^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)")
    scopes, count, at = [0], 0, 0
    while match := token.match(text, at):
        at = match.end()
        if match[1] == "{":
            count += 1
            scopes.append(count)
        elif match[1] == "}":
            scopes.pop()
        elif match[2]:
            yield "label", match[2], tuple(scopes)
        elif match[3].strip():
            yield "statement", " ".join(match[3].split()), tuple(scopes)
    if text[at:].strip():
        raise ValueError(f"not understood: {text[at:at + 80]!r}")


def _directive(body: Body, word: str, scopes: tuple[int, ...]) -> None:
    kind, _, rest = word.partition(" ")
    if kind == ".reg":
        kind, _, names = rest.strip().partition(" ")
        for name in names.split(","):
            body.registers[scopes[-1], re.sub(r"<\d+>", "", name.strip())] = kind.removeprefix(".")
    elif kind in (".shared", ".local"):
        if kind == ".shared":
            body.shared_bytes = _declare(body, "shared", rest, body.shared_bytes)
        else:
            body.local_bytes = _declare(body, "local", rest, body.local_bytes)
    elif kind not in (".loc", ".pragma", ".file"):
        raise ValueError(f"not understood: {word!r}")


def _declare(body: Body, space: str, declaration: str, end: int) -> int:
    match = _VARIABLE.search(declaration)
    if match is None:
        raise ValueError(f"not understood: {declaration!r}")
    element = int(match[2]) // 8
    start = -(-end // int(match[1] or element)) * int(match[1] or element)
    size = element * (int(match[4]) if match[4] else 0 if match[4] == "" else 1)
    body.variables[match[3]] = Variable(space, start, size)
    return start + size


def _statement(word: str, scopes: tuple[int, ...]) -> Statement:
    guard, rest = "", word
    if rest.startswith("@"):
        guard, _, rest = rest[1:].partition(" ")
    opcode, _, operands = rest.strip().partition(" ")
    return Statement(guard, opcode, operands_of(operands), word, scopes)


class Rows:
    """Where registers and immediates of a kernel lie, in bytes, and predicates by number."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._rows: dict[tuple[int, str], tuple[int, int]] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self._predicates: dict[tuple[int, str], int] = {}
        self.end = len(SPECIALS) * LANES * 4  # which lie first

    @property
    def num_predicates(self) -> int:
        """The first two are never and always."""
        return 2 + len(self._predicates)

    def kind(self, name: str, scopes: tuple[int, ...]) -> tuple[tuple[int, str], str]:
        """Its identity and declared type.

        Raises:
            ValueError: no such register.
        """
        prefix = re.sub(r"\d+$", "", name)
        for scope in reversed(scopes):
            for known in (name, prefix):
                if (scope, known) in self._body.registers:
                    return (scope, name), self._body.registers[scope, known]
        raise ValueError(f"no register {name!r}")

    def register(self, name: str, scopes: tuple[int, ...]) -> tuple[int, int]:
        """(row, bytes a lane) of a register that is no predicate."""
        if name in SPECIALS:
            return SPECIALS.index(name) * LANES * 4, 4
        identity, kind = self.kind(name, scopes)
        if identity not in self._rows:
            size = 8 if kind.endswith("64") else 4
            self._rows[identity] = self._take(size), size
        return self._rows[identity]

    def predicate(self, name: str, scopes: tuple[int, ...]) -> int:
        """Its number."""
        return self._predicates.setdefault(self.kind(name, scopes)[0], 2 + len(self._predicates))

    def constant(self, bits: int, size: int) -> int:
        """A row whose lanes hold these bits."""
        key = (bits & ((1 << 8 * size) - 1), size)
        if key not in self._constants:
            self._constants[key] = self._take(size)
        return self._constants[key]

    def first_rows(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Registers as a warp begins with them: poison, but for the constants."""
        rows = np.full(self.end, POISON, np.uint8)
        for (bits, size), row in self._constants.items():
            rows[row:row + LANES * size] = np.frombuffer(bits.to_bytes(size, "little") * LANES, np.uint8)
        return rows

    def _take(self, size: int) -> int:
        self.end += LANES * size
        return self.end - LANES * size
