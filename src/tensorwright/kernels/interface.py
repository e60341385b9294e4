"""The one interface between builder and kernels. It knows no kernel and no target.

A kernel class implements one algorithm. The builder asks it what it can do, lets it pack weights, collects its C++
and stores its tactic; the runtime only ever sees the compiled entry point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from tensorwright.program.program import Op, Program, Weight

Array = NDArray[Any]


@dataclass(frozen=True)
class Target:
    """A machine to build for: the name users give, the compiler's flags, and what a CPU must have."""

    name: str  # "native", "x86-64-v3", "x86-64-v4", "aarch64", "portable", "sm_90"
    architecture: str  # platform.machine(): "x86_64" or "aarch64"; "cuda" for GPUs
    flags: tuple[str, ...]  # for the C++ compiler, e.g. ("-march=x86-64-v3",)
    features: tuple[str, ...]  # as /proc/cpuinfo names them, e.g. ("avx2", "fma", "avx512_vnni")


@dataclass(frozen=True)
class Tensor:
    """A weight's numbers in the checkpoint's neutral layout.

    Unquantised: values as stored (float32, float16 or ml_dtypes.bfloat16). int8: values int8 [out, in] and scales
    [out, in/group]. float8_e4m3: values ml_dtypes.float8_e4m3fn [out, in], scales [out, 1]. int4: values uint8
    [out, in/2], low nibble = even input, code = nibble − 8, and scales as for int8.
    """

    values: Array
    scales: Array | None = None


@dataclass(frozen=True)
class Tactic:
    """One way to run a kernel for an op: the layout its weights need and the algorithm's own numbers."""

    layout: str  # layout id stored with each weight, e.g. "panel64"
    parameters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What one execution must move and compute, for T tokens; measured times are compared with it."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Source:
    """C++ for an entry point: headers of the target's native folder, and a function name expression.

    `function` must be callable as `function(const tw_step*, const tw_run*, const tw_worker*)`,
    e.g. "tw::linear<tw::int4_weights<128, tw::half>, 6144, 5120>::run".
    """

    headers: tuple[str, ...]
    function: str


def symbols(sources: Sequence[Source]) -> tuple[str, ...]:
    """The name of each entry point: equal sources share one, "tw_kernel_<i>"."""
    distinct = {source: index for index, source in enumerate(dict.fromkeys(sources))}
    return tuple(f"tw_kernel_{distinct[source]}" for source in sources)


class Kernel(Protocol):
    """One algorithm for one kind of op. Stateless: every method is a pure function of its arguments."""

    name: str

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Whether this kernel can run the op on the target."""

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        """Ways to run it, the heuristic's choice first. Those of one layout give the same bits."""

    def pack(self, op: Op, program: Program, role: str, tensor: Tensor, tactic: Tactic) -> Array:
        """A weight's bytes (uint8, one dimension) in the tactic's layout."""

    def unpack(self, weight: Weight, packed: Array, layout: str) -> Tensor:
        """The inverse of `pack`: exact, so that engines can be repacked without their checkpoint."""

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """The C++ of the op, with its shapes as constants."""

    def scratch_bytes(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> int:
        """Shared scratch memory that one execution needs for this many tokens."""

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Bytes moved and operations; kv_tokens is the sum over sequences of cached positions read."""

    def reference(self, op: Op, program: Program, inputs: Mapping[str, Array],
                  weights: Mapping[str, Tensor]) -> dict[str, Array]:
        """The op in NumPy with the kernel's own rounding. Inputs and outputs by the names in `program.ops`."""


@runtime_checkable
class Estimates(Protocol):
    """What a kernel may offer besides: a model of its tactics, for machines that cannot be measured."""

    def estimate(self, op: Op, program: Program, tactic: Tactic, num_tokens: int) -> float:
        """About how long one execution takes, in any unit that is the same for all tactics of the op.

        Infinite: the tactic is not for so many tokens.
        """
