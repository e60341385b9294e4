"""Runs the launches of one op in the simulator over arrays by name, as `testing.gpu_ops` does on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.kernels.cuda.driver import KINDS
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch
from tensorwright.kernels.interface import Target
from tensorwright.runtime.batch import Batch
from tensorwright.testing.simulator.compile import Kernels

PROCESSORS = 4


class SimulatedLaunches:
    """`testing.attention_cases.Launches`. Scratch memory is NaN; zeros must be zero again after each run."""

    def __init__(self, source: GpuSource, target: Target, arrays: Mapping[str, NDArray[Any]], batch: Batch) -> None:
        tokens = batch.token_ids.shape[0]
        self._symbols = {"one": 1, "rows": tokens, "tokens": tokens, "sequences": batch.query_starts.shape[0],
                         "max_query_length": int(batch.query_lengths.max()), "table_width": batch.block_tables.shape[1],
                         "processors": PROCESSORS}
        self._arrays: dict[str, NDArray[Any]] = {
            **arrays, **{f"inputs.{name}": array for name, array in vars(batch).items()},
            **{f"scratch.{name}": np.full(-(-size.at(self._symbols) // 4), np.nan, np.float32)
               for name, size in source.scratch},
            **{f"zeros.{name}": np.zeros(count, np.uint8) for name, count in source.zeros}}
        self._source, self._seed = source, 0
        self._kernels = Kernels([(source.headers, source.functions)], target)

    def run(self) -> None:
        """Every launch, each in another order of warps."""
        ranges = [(array.ctypes.data, array.nbytes) for array in self._arrays.values()]
        for launch in self._source.launches:
            self._seed += 1
            grid = [size.at(self._symbols) for size in launch.grid]
            self._kernels[launch.function].launch(grid, [launch.threads], launch.shared_bytes,
                                                  self._parameters(launch), ranges=ranges, seed=self._seed)
        for name, _ in self._source.zeros:
            assert not self._arrays[f"zeros.{name}"].any(), name

    def array(self, name: str) -> NDArray[Any]:
        """The array itself."""
        return self._arrays[name]

    def _parameters(self, launch: Launch) -> bytes:
        parts = [a if isinstance(a, tuple) else (a,) for a in launch.arguments]
        inner = [type("Argument", (ctypes.Structure,), {"_fields_": [
            (f"a{i}", KINDS[_kind(each)]) for i, each in enumerate(part)]}) for part in parts]
        whole: Any = type("Parameters", (ctypes.Structure,), {"_fields_": [(f"p{i}", t) for i, t in enumerate(inner)]})
        return bytes(whole(*(made(*map(self._value, part)) for made, part in zip(inner, parts, strict=True))))

    def _value(self, argument: Argument) -> int | float:
        if not isinstance(argument, str):
            return argument
        kind, _, name = argument.partition(".")
        if kind == "sizes":
            return self._symbols[name]
        return self._arrays[argument].ctypes.data if argument in self._arrays else 0


def _kind(argument: Argument) -> str:
    if isinstance(argument, str):
        return "int" if argument.startswith("sizes.") else "pointer"
    return "float" if isinstance(argument, float) else "int"
