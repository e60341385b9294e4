"""One weight of a checkpoint in the neutral layout. It knows neither files nor kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray


class Tensor(NamedTuple):
    """Unquantised: values as stored, scales None. int8 and float8_e4m3: values [out, in] and scales [out, in/group].

    int4: values uint8 [out, in/2], low nibble = even input, code = nibble − 8, and the same scales. One scale per
    output channel has shape [out, 1].
    """

    values: NDArray[Any]
    scales: NDArray[Any] | None = None
