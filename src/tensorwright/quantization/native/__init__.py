"""The same quantisation in C++, called through ctypes. It knows no compiler: whoever has one hands the library in."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tensorwright.quantization.reference import CANDIDATES
from tensorwright.quantization.scheme import Array, Quantized, Scheme

SOURCE = Path(__file__).with_name("quantize.cpp")
"""Compile it as a shared library with -O3 and the flags of the machine; no fast math."""

_FLOAT8 = 108  # kFloat8 of the source, in the place of 4 or 8 bits
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}


class NativeQuantizer:
    """A `Quantizer` on a compiled library of `SOURCE`. Calls release the interpreter lock and may run in parallel."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function, self._cast = library.tw_quantize, library.tw_cast
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._function.restype = integer
        self._function.argtypes = [pointer, integer, long, long, long, integer, long, pointer, pointer, pointer,
                                   integer, pointer]
        self._cast.restype = integer
        self._cast.argtypes = [pointer, integer, long, pointer, integer]

    def __call__(self, weight: Array, scheme: Scheme, scale_dtype: np.dtype[Any]) -> Quantized:
        """As `reference.quantize`: the same bits. Rows may be apart, the numbers of a row may not."""
        rows, columns = weight.shape
        groups = scheme.num_groups(columns)
        if weight.strides[1] != weight.itemsize:
            weight = np.ascontiguousarray(weight)
        codes = np.empty((rows, scheme.code_columns(columns)), scheme.code_dtype)
        scales = np.empty((rows, groups), scale_dtype)
        sums = np.zeros(2)
        searches = scheme.bits == 4 and scheme.group_size != -1
        failed = self._function(
            weight.ctypes.data, _DTYPES[weight.dtype], rows, columns, weight.strides[0],
            _FLOAT8 if scheme.is_float else scheme.bits, columns // groups,
            CANDIDATES.ctypes.data if searches else None, codes.ctypes.data, scales.ctypes.data,
            _DTYPES[np.dtype(scale_dtype)], sums.ctypes.data)
        return Quantized(codes, scales, float(sums[0]), float(sums[1]), not failed)

    def cast(self, values: Array, dtype: np.dtype[Any]) -> Array:
        """A `Caster`: the bits of `reference.cast`."""
        values = np.ascontiguousarray(values)
        result = values if values.dtype == dtype else np.empty(values.shape, dtype)
        failed = self._cast(values.ctypes.data, _DTYPES[values.dtype], values.size,
                            None if result is values else result.ctypes.data, _DTYPES[np.dtype(dtype)])
        if failed == 1:
            raise ValueError("NaN or infinity")
        if failed:
            raise OverflowError(f"beyond the range of {dtype}")
        return result
