"""From kernel sources to a shared object: generate the one C++ file of an engine, find a compiler, compile, cache.

It knows compilers and flags. It does not know ops: `Source` says which headers and which function.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tensorwright.errors import BuildError
from tensorwright.kernels.cpu.elf import needed_libraries
from tensorwright.kernels.headers import inlined
from tensorwright.kernels.interface import Source, Target, symbols

NATIVE_FOLDER = Path(__file__).parent / "native"
CORE_HEADERS = ("abi.h", "exports.h")
# No fast-math: NaN and infinity must behave. Contraction and unordered simd reductions (where asked for) are enough.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fno-plt", "-ffp-contract=fast",
         "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
         "-fopenmp-simd", "-static-libgcc", "-static-libstdc++", "-Wl,--as-needed", "-Wl,-z,relro,-z,now", "-s")
SYSTEM_LIBRARIES = ("libc.so", "libm.so", "libpthread.so", "ld-linux", "ld-musl")


def engine_source(entries: Sequence[Source]) -> str:
    """The one C++ file of an engine, with every header of the package written out: it compiles by itself."""
    seen: set[str] = set()
    headers = (*CORE_HEADERS, *(header for entry in entries for header in entry.headers))
    parts = [inlined(NATIVE_FOLDER, name, seen) for name in headers]
    for symbol, function in dict(zip(symbols(entries), (e.function for e in entries), strict=True)).items():
        parts.append(f'extern "C" TW_EXPORT void {symbol}(const tw_step* step, const tw_run* run, '
                     f"const tw_worker* worker) {{\n  {function}(step, run, worker);\n}}\n")
    return "".join(parts)


def kernel_text(entry: Source) -> str:
    """Everything that decides an entry's own code: its headers, written out, and its function."""
    seen: set[str] = set()
    return "".join([*(inlined(NATIVE_FOLDER, name, seen) for name in entry.headers), entry.function])


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: CXX if set (it may hold options), else g++, clang++ or c++.

    Raises:
        BuildError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"CXX names {asked[0]!r}, which is not found", mend="unset CXX")
        return tuple(asked)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return (name,)
    raise BuildError("no C++ compiler found (looked for g++, clang++, c++): building an engine needs one, "
                     "running it does not", mend="apt-get install g++")


def compile_shared(source: str, target: Target, *, report: Callable[[int, str], None] | None = None) -> bytes:
    """The shared object of a C++ source for a target, from the cache where the same was compiled before.

    Raises:
        BuildError: no compiler, or it failed; the message holds its command and first errors.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *target.flags)
    if target.architecture != platform.machine() and "CXX" not in os.environ:
        raise BuildError(f"target {target.name} needs a cross compiler for {target.architecture}",
                         mend=f"CXX={target.architecture}-linux-gnu-g++ tensorwright build ...")
    identity = "\0".join((compiler_version(compiler), *compiler, *flags, source))
    cached = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.so"
    data = _read_cached(cached)
    if data is None:
        if report:
            report(0, f"compiling kernels for {target.name} with {compiler[0]}")
        data = _compile(source, compiler, flags)
        _write_cached(cached, data)
    if report:
        report(len(data), f"kernels for {target.name}")
    return data


def cache_folder() -> Path:
    """Where compiled kernels are kept between builds; deleting it is always safe."""
    base = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/")) / ".cache"
    return Path(base) / "tensorwright"


@functools.lru_cache(maxsize=8)
def compiler_version(compiler: tuple[str, ...]) -> str:
    """What the compiler prints of itself."""
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return result.stdout


def _compile(source: str, compiler: tuple[str, ...], flags: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="tensorwright-") as folder:
        code, output = Path(folder) / "engine.cpp", Path(folder) / "engine.so"
        code.write_text(source, encoding="utf-8")
        command = [*compiler, *flags, str(code), "-o", str(output), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode != 0 or not output.exists():
            raise BuildError(f"the C++ compiler failed (status {result.returncode}): {' '.join(command)}\n"
                             f"{_shortened(result.stderr)}")
        data = output.read_bytes()
    strangers = [name for name in needed_libraries(data) if not name.startswith(SYSTEM_LIBRARIES)]
    if strangers:
        raise BuildError(f"the compiled kernels need {', '.join(strangers)}; only libc and libm are allowed")
    return data


def _shortened(messages: str, max_lines: int = 12) -> str:
    lines = [line[:300] for line in messages.splitlines() if "error" in line or "fatal" in line] or \
        [line[:300] for line in messages.splitlines()]
    more = [f"... and {len(lines) - max_lines} lines more"] if len(lines) > max_lines else []
    return "\n".join(lines[:max_lines] + more)


def _read_cached(path: Path) -> bytes | None:
    """A cached object if it is whole: its own SHA-256 stands in front of it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _write_cached(path: Path, data: bytes) -> None:
    """Keep an object; a cache that cannot be written costs time, never the build."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(hashlib.sha256(data).digest() + data)
        Path(file.name).replace(path)
