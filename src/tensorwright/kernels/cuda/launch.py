"""How a GPU op is started, as plain data: the builder writes it into the manifest, the runtime reads it there.

An op is a list of launches, one after the other. It knows no kernel, no driver and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensorwright.kernels.interface import Source
from tensorwright.program.ops import OPS
from tensorwright.program.program import Op

RANKS = "ranks.state"
Argument = str | int | float
Arguments = tuple[Argument | tuple[Argument, ...], ...]


@dataclass(frozen=True)
class Size:
    """times · ceil(symbol / per). Symbols are a step's `tokens`, `sequences`, `outputs`, `max_query_length` and
    `table_width`, the op's own `rows` (tokens or outputs) and the GPU's `processors`; "one" is 1.
    """

    of: str = "one"
    per: int = 1
    times: int = 1

    def at(self, symbols: Mapping[str, int]) -> int:
        """The number for these sizes."""
        return self.times * -(-symbols[self.of] // self.per)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, or one call of a library: `matmul`, or `all_reduce` and `all_gather` over ranks (x, y and
    the numbers of a row; rows are the grid).

    `function` is a name expression such as "tw::embedding<tw::half, 5120>". An inner tuple of `arguments` is a
    structure passed by value. An argument is an int (int32), a float (float32), "sizes.tokens" (int32), "" (a null
    pointer) or a pointer: "inputs.x", "outputs.y", "weights.weight" (null where the op has no such weight),
    "scratch.x", "zeros.x", "tables.x", "ranks.state" (tw::Ranks, of an engine of several), or, of no op,
    "batch.positions" and "named.layers.0.kv" (a weight or buffer of the program). A pointer may end in "+bytes".
    """

    function: str
    grid: tuple[Size, Size, Size] = (Size(), Size(), Size())
    threads: int = 256
    shared_bytes: int = 0
    arguments: Arguments = ()
    cooperative: bool = False  # its blocks wait for each other: all must fit on the GPU at once, or it is refused


@dataclass(frozen=True)
class GpuSource(Source):
    """The launches of an op or of a stretch of ops, and memory by name.

    `scratch`, in bytes, lives while they run. `zeros`, in bytes, is theirs alone and zero before the first launch.
    `tables` are arrays of pointers.
    """

    launches: tuple[Launch, ...] = ()
    scratch: tuple[tuple[str, Size], ...] = ()
    zeros: tuple[tuple[str, int], ...] = ()
    tables: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def functions(self) -> tuple[str, ...]:
        """Name expressions of the kernels among the launches."""
        return tuple(launch.function for launch in self.launches if not is_library_call(launch.function))


@dataclass(frozen=True)
class Stretch:
    """Another way to run ops begin .. end − 1 (end excluded). It leaves behind what those ops leave that others read.

    tokens: in decode steps of so many sequences, each with one token and one row of logits; 0: in any step of `least`
    tokens or more. processors: of the GPU; 0: any. window: the most tokens that a sequence may have, the new one
    included; 0: any number.
    """

    begin: int
    end: int
    tokens: int
    processors: int
    source: GpuSource
    window: int = 0
    least: int = 0

    @property
    def entry(self) -> str:
        """Its name in the manifest."""
        if not self.tokens:
            return f"steps_from_{self.least}"
        return f"decode_{self.tokens}" + (f"_on_{self.processors}" if self.processors else "")


def gpu_source(headers: tuple[str, ...], *launches: Launch, scratch: Mapping[str, Size] | None = None) -> GpuSource:
    """The launches of one op; a GPU op has no single function."""
    return GpuSource(headers, "", launches, tuple((scratch or {}).items()))


def matmul(rows: Size, a: str, b: str, c: str, shape: tuple[int, int], dtype: str, result: str) -> Launch:
    """A library's c[rows, n] = a[rows, k] · b[n, k]ᵀ with float32 sums; `shape` is (n, k), `dtype` that of a and b."""
    return Launch("matmul", (rows, Size(), Size()), arguments=(a, b, c, *shape, dtype, result))


def scaled_matmul(rows: Size, a: str, b: str, c: str, shape: tuple[int, int], result: str,
                  scales: tuple[str, str]) -> Launch:
    """The same of float8 numbers: c = (a · bᵀ) times the scale of a's row and that of b's row, float32 each."""
    return Launch("scaled_matmul", (rows, Size(), Size()), arguments=(a, b, c, *shape, "float8_e4m3", result, *scales))


def is_library_call(function: str) -> bool:
    """Whether a launch is a call of a library: kernels are names of the namespace tw."""
    return not function.startswith("tw::")


def operand_name(op: Op | None, argument: str) -> str | None:
    """The program's name for "inputs.x", "outputs.y" or "weights.bias" of an op; None: it has none."""
    kind, _, name = argument.partition(".")
    if op is None or kind not in ("inputs", "outputs", "weights"):
        return None
    if kind == "weights":
        return op.weights.get(name)
    spec = OPS[op.kind]
    names, given = (spec.inputs, op.inputs) if kind == "inputs" else (spec.outputs, op.outputs)
    return dict(zip((each.rstrip("?") for each in names), given, strict=False)).get(name)


def parameter_kinds(launch: Launch) -> list[str | tuple[str, ...]]:
    """"pointer", "int" or "float" for each parameter; a tuple of them for a structure."""
    return [_kind(a) if not isinstance(a, tuple) else tuple(map(_kind, a)) for a in launch.arguments]


def flat(arguments: Arguments) -> list[Argument]:
    """Arguments in order, those of structures among them."""
    return [each for argument in arguments for each in (argument if isinstance(argument, tuple) else (argument,))]


def _kind(argument: Argument) -> str:
    if isinstance(argument, str):
        return "int" if argument.startswith("sizes.") else "pointer"
    return "float" if isinstance(argument, float) else "int"


def needs_peers(source: GpuSource) -> bool:
    """Whether a kernel writes into the memory of other ranks' GPUs."""
    return any(RANKS in flat(launch.arguments) for launch in source.launches)


def scratch_offsets(scratch: Mapping[str, Size], symbols: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each piece of scratch memory begins, on 256 bytes, and how much there is in all."""
    offsets, end = {}, 0
    for name, size in scratch.items():
        offsets[name] = end
        end += -(-size.at(symbols) // 256) * 256
    return offsets, end


def to_json(source: GpuSource) -> dict[str, Any]:
    """JSON values; headers stay behind."""
    return {"launches": [asdict(launch) for launch in source.launches],
            "scratch": {name: asdict(size) for name, size in source.scratch},
            "zeros": dict(source.zeros), "tables": {name: list(pointers) for name, pointers in source.tables}}


def from_json(data: Mapping[str, Any]) -> GpuSource:
    """The inverse of `to_json`."""
    launches = tuple(
        Launch(launch["function"], _grid(launch["grid"]), launch["threads"],
               launch["shared_bytes"], tuple(tuple(a) if isinstance(a, list) else a for a in launch["arguments"]),
               launch.get("cooperative", False))
        for launch in data["launches"])
    scratch = tuple((name, Size(**size)) for name, size in data["scratch"].items())
    tables = tuple((name, tuple(pointers)) for name, pointers in data["tables"].items())
    return GpuSource((), "", launches, scratch, tuple(data["zeros"].items()), tables)


def _grid(sizes: Sequence[Mapping[str, Any]]) -> tuple[Size, Size, Size]:
    x, y, z = (Size(**size) for size in sizes)
    return x, y, z
