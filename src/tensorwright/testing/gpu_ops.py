"""Runs the launches of one op on the GPU over given tensors: what the differential tests of GPU kernels stand on.

It binds arguments by name as `runtime.cuda.plan` does. It knows no engine and no plan of many ops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tensorwright.kernels.cuda.compile import Module, compile_modules
from tensorwright.kernels.cuda.driver import Call, Function, load_module
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch
from tensorwright.kernels.cuda.targets import can_overlap
from tensorwright.kernels.interface import Target
from tensorwright.runtime.batch import Batch
from tensorwright.runtime.cuda.inputs import Sizes, sizes_of


class GpuLaunches:
    """A source's launches over tensors by name: "inputs.q", "outputs.y", "weights.norm", as its arguments say."""

    def __init__(self, source: GpuSource, target: Target, tensors: Mapping[str, torch.Tensor], batch: Batch, *,
                 sizes: Sizes | None = None) -> None:
        """`tensors`: on the GPU, without the batch's, which come from `batch`. Scratch memory is filled with NaN."""
        torch.zeros(1, device="cuda")  # makes the context, which modules are loaded into
        self._tensors = dict(tensors) | {
            f"inputs.{name}": torch.from_numpy(array).cuda() for name, array in vars(batch).items()}
        self.symbols = {**vars(sizes or sizes_of(batch)), "one": 1, "rows": batch.token_ids.shape[0],
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


def _kind(argument: Argument) -> str:
    if isinstance(argument, str):
        return "int" if argument.startswith("sizes.") else "pointer"
    return "float" if isinstance(argument, float) else "int"
