"""Runs the launches of one op on the GPU over given tensors: what the differential tests of GPU kernels stand on.

It binds arguments by name as `runtime.cuda.plan` does. It knows no engine and no plan of many ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tensorwright.kernels.cuda.compile import Module, compile_modules
from tensorwright.kernels.cuda.driver import Call, Function, load_module
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch
from tensorwright.kernels.cuda.targets import can_overlap
from tensorwright.kernels.interface import Target
from tensorwright.runtime.batch import Batch
from tensorwright.runtime.cuda.inputs import sizes_of


class GpuLaunches:
    """A source's launches over arrays by name: "inputs.q", "outputs.y", "weights.norm", as its arguments say."""

    def __init__(self, source: GpuSource, target: Target, arrays: Mapping[str, NDArray[Any]], batch: Batch) -> None:
        """`arrays`: without the batch's, which come from `batch`. Scratch memory is filled with NaN."""
        torch.zeros(1, device="cuda")  # makes the context, which modules are loaded into
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        self._tensors = {name: _on_device(array) for name, array in arrays.items()}
        self._tensors |= {f"inputs.{name}": _on_device(array) for name, array in vars(batch).items()}
        self.symbols = {**vars(sizes_of(batch)), "one": 1, "rows": batch.token_ids.shape[0],
                        "processors": torch.cuda.get_device_properties(0).multi_processor_count}
        for name, size in source.scratch:
            whole = -(-size.at(self.symbols) // 4)
            self._tensors[f"scratch.{name}"] = torch.full((whole,), float("nan"), device="cuda")
        for name, count in source.zeros:
            self._tensors[f"zeros.{name}"] = torch.zeros(count, dtype=torch.uint8, device="cuda")
        modules = compile_modules([source], target)
        self._calls = [self._bind(launch, modules, can_overlap(target)) for launch in source.launches]

    def run(self) -> None:
        """Every launch, on torch's current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        for call, grid in self._calls:
            call.launch(grid, stream)

    def array(self, name: str) -> NDArray[Any]:
        """A copy of what is in an array now."""
        tensor = self._tensors[name]
        return np.asarray(tensor.cpu().numpy()).reshape(-1).view(self._dtypes[name]).reshape(tuple(tensor.shape))

    def _bind(self, launch: Launch, modules: tuple[Module, ...], overlap: bool) -> tuple[Call, list[int]]:
        module = next(module for module in modules if launch.function in module.functions)
        function = Function(load_module(module.cubin), module.functions[launch.function].symbol, launch.shared_bytes)
        fields = [a if isinstance(a, tuple) else (a,) for a in launch.arguments]
        call = Call(function, launch.threads, launch.shared_bytes, overlap,
                    [tuple(map(_kind, arguments)) for arguments in fields])
        for index, argument in enumerate(each for arguments in fields for each in arguments):
            call.set(index, self._value(argument))
        return call, [size.at(self.symbols) for size in launch.grid]

    def _value(self, argument: Argument) -> int | float:
        if not isinstance(argument, str):
            return argument
        kind, _, name = argument.partition(".")
        if kind == "sizes":
            return int(self.symbols[name])
        return int(self._tensors[argument].data_ptr()) if argument in self._tensors else 0


def _on_device(array: NDArray[Any]) -> torch.Tensor:
    """Numbers that torch does not take from NumPy, as integers of their size."""
    whole = np.ascontiguousarray(array)
    if whole.dtype.name in ("bfloat16", "float8_e4m3fn"):
        whole = whole.view(np.int16 if whole.dtype.itemsize == 2 else np.uint8)
    return torch.from_numpy(whole).cuda()


def _kind(argument: Argument) -> str:
    if isinstance(argument, str):
        return "int" if argument.startswith("sizes.") else "pointer"
    return "float" if isinstance(argument, float) else "int"
