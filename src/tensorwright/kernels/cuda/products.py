"""Matrix products by torch's library, as launches ask for them (`launch.matmul`, `launch.scaled_matmul`).

It knows what is multiplied, not where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tensorwright.kernels.cuda.launch import Launch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8,
          "float8_e4m3": torch.float8_e4m3fn}
Matrix = Callable[[str, int, int, torch.dtype], torch.Tensor]
"""Rows and columns of a dtype where an argument of a launch says."""


@dataclass(frozen=True)
class Product:
    """c[rows, columns] of `result` = a[rows, inner] · b[columns, inner]ᵀ of `dtype`; `scales` of a's and b's rows."""

    a: str
    b: str
    c: str
    columns: int
    inner: int
    dtype: torch.dtype
    result: torch.dtype
    scales: tuple[str, ...] = ()

    @staticmethod
    def of(launch: Launch) -> Product:
        """What a launch asks for."""
        a, b, c, columns, inner, dtype, result, *scales = map(str, launch.arguments)
        return Product(a, b, c, int(columns), int(inner), DTYPES[dtype], DTYPES[result], tuple(scales))

    def multiply(self, rows: int, matrix: Matrix) -> None:
        """Start it on the current stream."""
        a, b = matrix(self.a, rows, self.inner, self.dtype), matrix(self.b, self.columns, self.inner, self.dtype)
        c = matrix(self.c, rows, self.columns, self.result)
        if self.scales:
            of_a, of_b = (matrix(name, count, 1, torch.float32)
                          for name, count in zip(self.scales, (rows, self.columns), strict=True))
            torch._scaled_mm(a, b.t(), of_a, of_b.t(), out_dtype=self.result, use_fast_accum=True, out=c)
        elif self.result == self.dtype:
            torch.mm(a, b.t(), out=c)
        else:
            torch.mm(a, b.t(), out_dtype=self.result, out=c)
