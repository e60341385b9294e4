"""Cubins loaded and kernels launched through the CUDA driver. It knows no engine and no op."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from cuda.bindings import driver

from tensorwright.errors import EngineError

KINDS: dict[str, Any] = {"pointer": ctypes.c_void_p, "int": ctypes.c_int32, "float": ctypes.c_float}


class Function:
    """A kernel of a loaded cubin."""

    def __init__(self, module: Any, symbol: str, shared_bytes: int) -> None:
        self.handle = checked(driver.cuModuleGetFunction(module, symbol.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if shared_bytes:
            checked(driver.cuFuncSetAttribute(self.handle, attribute, shared_bytes))


class Call:
    """A launch with its arguments in memory: those that a step changes are written in place."""

    def __init__(self, function: Function, threads: int, shared_bytes: int, overlap: bool,
                 kinds: Sequence[str | Sequence[str]]) -> None:
        """`kinds`: "pointer", "int" or "float" for each parameter; a sequence of them for a structure by value."""
        self._function = function
        self._config = driver.CUlaunchConfig()
        self._config.blockDimX, self._config.blockDimY, self._config.blockDimZ = threads, 1, 1
        self._config.sharedMemBytes = shared_bytes
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs, self._config.numAttrs = [attribute], 1
        self._values = [_structure(kind) for kind in kinds]
        self._pointers = (ctypes.c_void_p * max(1, len(kinds)))(*map(ctypes.addressof, self._values))
        self._fields = [(value, field[0]) for value in self._values for field in value._fields_]

    def set(self, index: int, value: int | float) -> None:
        """Argument `index`, counted through all structures."""
        structure, name = self._fields[index]
        setattr(structure, name, value)

    def launch(self, grid: Sequence[int], stream: int) -> None:
        """Start it after what the stream holds; with `overlap`, it waits for that by itself."""
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.hStream = driver.CUstream(stream)
        checked(driver.cuLaunchKernelEx(config, self._function.handle, ctypes.addressof(self._pointers), 0))


def load_module(cubin: bytes) -> Any:
    """A cubin for the current GPU."""
    return checked(driver.cuModuleLoadData(cubin))


def current_context() -> Any:
    """The context of the calling thread."""
    return checked(driver.cuCtxGetCurrent())


def use_context(context: Any) -> None:
    """Make it the calling thread's."""
    checked(driver.cuCtxSetCurrent(context))


def checked(result: tuple[Any, ...]) -> Any:
    """The value after the status.

    Raises:
        EngineError: the driver refused; its name for the error is in the message.
    """
    error, *values = result
    if int(error) != 0:
        name = driver.cuGetErrorName(error)[1]
        raise EngineError(f"the CUDA driver answered {name.decode() if isinstance(name, bytes) else error!r}",
                          mend="tensorwright doctor")
    return values[0] if len(values) == 1 else tuple(values)


def _structure(kind: str | Sequence[str]) -> ctypes.Structure:
    kinds = (kind,) if isinstance(kind, str) else kind
    fields = [(f"argument{index}", KINDS[each]) for index, each in enumerate(kinds)]
    made: ctypes.Structure = type("Arguments", (ctypes.Structure,), {"_fields_": fields})()
    return made
