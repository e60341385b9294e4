"""Cubins loaded and kernels launched through the CUDA driver. It knows no engine and no op.

A prompt takes hundreds of launches: each is one call through ctypes with everything prepared in memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from cuda.bindings import driver

from tensorwright.errors import EngineError

KINDS: dict[str, Any] = {"pointer": ctypes.c_void_p, "int": ctypes.c_int32, "float": ctypes.c_float}
LAUNCH, LAUNCH_VERSION = b"cuLaunchKernelEx", 12000
OVERLAP = int(driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
COOPERATIVE = int(driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, whose value is one int."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("unused", ctypes.c_int * 15))


class _Configuration(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (("grid_x", ctypes.c_uint), ("grid_y", ctypes.c_uint), ("grid_z", ctypes.c_uint),
                ("block_x", ctypes.c_uint), ("block_y", ctypes.c_uint), ("block_z", ctypes.c_uint),
                ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint))


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
                 kinds: Sequence[str | Sequence[str]], *, cooperative: bool = False) -> None:
        """`kinds`: "pointer", "int" or "float" for each parameter; a sequence of them for a structure by value.

        `cooperative`: all blocks are on the GPU at once, or the driver refuses; then nothing overlaps.
        """
        attribute = _Attribute(COOPERATIVE if cooperative else OVERLAP, value=1)
        self._configuration = _Configuration(1, 1, 1, threads, 1, 1, shared_bytes, None, ctypes.pointer(attribute),
                                             int(overlap or cooperative))
        self._values = [_structure(*((kind,) if isinstance(kind, str) else kind))() for kind in kinds]
        self._pointers = (ctypes.c_void_p * max(1, len(kinds)))(*map(ctypes.addressof, self._values))
        self._fields = [(value, field[0]) for value in self._values for field in value._fields_]
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
        self._start = prototype(int(checked(driver.cuGetProcAddress(LAUNCH, LAUNCH_VERSION, 0))[0]))
        self._given = (ctypes.addressof(self._configuration), int(function.handle), ctypes.addressof(self._pointers),
                       None)

    def set(self, index: int, value: int | float) -> None:
        """Argument `index`, counted through all structures."""
        structure, name = self._fields[index]
        setattr(structure, name, value)

    def launch(self, grid: Sequence[int], stream: int) -> None:
        """Start it after what the stream holds; with `overlap`, it waits for that by itself."""
        configuration = self._configuration
        configuration.grid_x, configuration.grid_y, configuration.grid_z = grid
        configuration.stream = stream
        if status := self._start(*self._given):
            checked((driver.CUresult(status),))


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


@cache
def _structure(*kinds: str) -> type[ctypes.Structure]:
    """Making such a type takes longer than a launch, and hundreds of launches share a few."""
    fields = [(f"argument{index}", KINDS[kind]) for index, kind in enumerate(kinds)]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})
