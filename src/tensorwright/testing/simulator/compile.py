"""Kernel templates into PTX, through NVRTC, one function at a time and kept between runs. It knows no launch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from tensorwright.kernels.cpu.compile import cache_folder
from tensorwright.kernels.cuda.compile import compile_ptx, program_text
from tensorwright.kernels.interface import Target
from tensorwright.testing.simulator.machine import SimulatedKernel, load


class Kernels:
    """Name expressions ("tw::embedding<tw::half, 64>") to kernels, compiled when they are first asked for."""

    def __init__(self, headers: Iterable[tuple[tuple[str, ...], tuple[str, ...]]], target: Target) -> None:
        """`headers`: (headers, name expressions of what they hold)."""
        self._headers = {name: files for files, names in headers for name in names}
        self._target = target
        self._loaded: dict[str, SimulatedKernel] = {}

    def __getitem__(self, function: str) -> SimulatedKernel:
        if function not in self._loaded:
            ptx, symbol = _ptx(self._headers[function], function, self._target)
            self._loaded[function] = load(ptx)[symbol]
        return self._loaded[function]


def _ptx(headers: tuple[str, ...], function: str, target: Target) -> tuple[str, str]:
    """(PTX, the function's symbol), from the cache where it was compiled before."""
    identity = json.dumps(["ptx", target.flags, program_text(headers), function])
    path = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.ptx"
    if not path.exists():
        ptx, symbols = compile_ptx(headers, (function,), target)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{id(ptx)}")
        aside.write_text(f"// {symbols[function]}\n{ptx}", encoding="utf-8")
        aside.replace(path)
    first, _, ptx = path.read_text(encoding="utf-8").partition("\n")
    return ptx, first.removeprefix("// ")
