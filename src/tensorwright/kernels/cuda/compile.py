"""From kernel templates to cubins: one NVRTC program for each set of headers, in parallel, kept between builds.

It knows NVRTC and its options. It does not know ops: `GpuSource` says which headers and which functions. Running an
engine needs nothing of this.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorwright.errors import BuildError
from tensorwright.kernels.cpu.compile import cache_folder
from tensorwright.kernels.cuda.launch import GpuSource
from tensorwright.kernels.headers import inlined
from tensorwright.kernels.interface import Target

NATIVE_FOLDER = Path(__file__).parent / "native"
OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")
INSTALL = "pip install 'tensorwright[cuda]'"
MAX_THREADS, MODULE_KERNELS = 16, 4


@dataclass(frozen=True)
class Function:
    """A compiled kernel: its name in the cubin, and what the assembler said that it takes."""

    symbol: str
    registers: int
    shared_bytes: int  # declared in the kernel, beside what a launch asks for
    spilled_bytes: int


@dataclass(frozen=True)
class Module:
    """A cubin and its kernels by name expression."""

    cubin: bytes
    functions: Mapping[str, Function]


def compile_modules(sources: Iterable[GpuSource], target: Target) -> tuple[Module, ...]:
    """A module for a few kernels of one set of headers: many small ones compile side by side, and are found again when
    another engine needs the same.

    Raises:
        BuildError: NVRTC or its headers are not installed, or a kernel does not compile.
    """
    functions: dict[tuple[str, ...], dict[str, None]] = {}
    for source in sources:
        functions.setdefault(source.headers, {}).update(dict.fromkeys(source.functions))
    include = _include_folder()
    parts = [(headers, tuple(names)[first:first + MODULE_KERNELS]) for headers, names in functions.items()
             for first in range(0, len(names), MODULE_KERNELS)]
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return tuple(pool.map(lambda part: _module(part[0], part[1], target, include), parts))


def nvrtc_version() -> str:
    """Such as "13.0".

    Raises:
        BuildError: it is not installed.
    """
    return ".".join(map(str, _checked(_nvrtc().nvrtcVersion())))


def _module(headers: tuple[str, ...], functions: tuple[str, ...], target: Target, include: Path) -> Module:
    source, options = program_text(headers), (*OPTIONS, *target.flags)
    identity = json.dumps([nvrtc_version(), options, source, functions])
    path = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.cubin"
    if (module := _read_cached(path)) is None:
        module = _compile(source, functions, (*options, *_include_options(include)))
        _write_cached(path, module)
    return module


def program_text(headers: Sequence[str]) -> str:
    """The headers written out: what NVRTC compiles for the functions of a source."""
    seen: set[str] = set()
    return "".join(inlined(NATIVE_FOLDER, name, seen) for name in headers)


def compile_ptx(headers: Sequence[str], functions: Sequence[str], target: Target) -> tuple[str, dict[str, str]]:
    """(PTX of these functions, symbols by name expression), for reading and for simulating.

    Raises:
        BuildError: as `compile_modules`.
    """
    options = [*OPTIONS[:-1], *(flag.replace("sm_", "compute_") for flag in target.flags), *_include_options()]
    program, _ = _compiled(program_text(headers), functions, options)
    text = bytes(_checked(_nvrtc().nvrtcGetPTXSize(program))[0])
    _checked(_nvrtc().nvrtcGetPTX(program, text))
    return text.decode().rstrip("\0"), _symbols(program, functions)


def _compile(source: str, functions: Sequence[str], options: Sequence[str]) -> Module:
    nvrtc = _nvrtc()
    program, log = _compiled(source, functions, options)
    symbols = _symbols(program, functions)
    cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program))[0])
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return Module(cubin, {function: _function(symbol, log) for function, symbol in symbols.items()})


def _compiled(source: str, functions: Sequence[str], options: Sequence[str]) -> tuple[Any, str]:
    """NVRTC's program and what it printed."""
    nvrtc = _nvrtc()
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"engine.cu", 0, [], []))[0]
    for function in functions:
        _checked(nvrtc.nvrtcAddNameExpression(program, function.encode()))
    result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program))[0])
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode(errors="replace")
    if int(result[0]) != 0:
        raise BuildError(f"NVRTC failed on {', '.join(functions)} with {' '.join(options)}:\n{text[:3000]}")
    return program, text


def _symbols(program: Any, functions: Sequence[str]) -> dict[str, str]:
    return {f: _checked(_nvrtc().nvrtcGetLoweredName(program, f.encode()))[0].decode() for f in functions}


def _function(symbol: str, log: str) -> Function:
    """What the assembler printed of a kernel."""
    part = log[log.index(f"Compiling entry function '{symbol}'"):]
    spilled, used = (re.search(pattern, part) for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers(.*)"))
    if spilled is None or used is None:
        raise BuildError(f"NVRTC's log does not say what {symbol} takes:\n{part[:500]}")
    shared = re.search(r"(\d+) bytes smem", used[2])
    return Function(symbol, int(used[1]), int(shared[1]) if shared else 0, int(spilled[1]))


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as error:
        raise BuildError(f"building for a GPU needs NVRTC, which cannot be loaded: {error}", mend=INSTALL) from None
    return nvrtc


def _include_options(include: Path | None = None) -> tuple[str, str]:
    folder = include or _include_folder()
    return f"-I{folder}", f"-I{folder / 'cccl'}"


def _include_folder() -> Path:
    """The folder of cuda_fp16.h and of what it includes: the packages', or the toolkit's."""
    places = [*(Path(entry) / "nvidia" / "cu13" / "include" for entry in sys.path), Path("/usr/local/cuda/include")]
    for place in places:
        if (place / "cuda_fp16.h").is_file() and (place / "cccl" / "nv" / "target").is_file():
            return place
    raise BuildError("building for a GPU needs the CUDA headers (cuda_fp16.h and cccl), which are not installed",
                     mend=INSTALL)


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values after the status."""
    if int(result[0]) != 0:
        raise BuildError(f"NVRTC answered {result[0]!r}")
    return result[1:]


def _read_cached(path: Path) -> Module | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, size, rest = data[:32], int.from_bytes(data[32:40], "little"), data[32:]
    if len(data) < 40 or hashlib.sha256(rest).digest() != digest:
        return None
    table = json.loads(rest[8:8 + size])
    return Module(rest[8 + size:], {name: Function(**facts) for name, facts in table.items()})


def _write_cached(path: Path, module: Module) -> None:
    """A cache that cannot be written costs time, never the build."""
    table = json.dumps({name: asdict(function) for name, function in module.functions.items()}).encode()
    rest = len(table).to_bytes(8, "little") + table + module.cubin
    aside = path.with_name(f".{path.name}.{id(module)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(hashlib.sha256(rest).digest() + rest)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
