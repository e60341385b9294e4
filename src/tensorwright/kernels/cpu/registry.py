"""Every CPU kernel. A new one is a class and a line here."""

from __future__ import annotations

from tensorwright.errors import BuildError
from tensorwright.kernels.cpu.attention import Attention
from tensorwright.kernels.cpu.elementwise import Activation, Add, Embedding, GatherRows, Multiply, RmsNorm, Slice
from tensorwright.kernels.cpu.linear import Linear
from tensorwright.kernels.cpu.ranks import AllGather, AllReduce
from tensorwright.kernels.cpu.rope import CacheWrite, Rope, RopeCache
from tensorwright.kernels.interface import Kernel, Target
from tensorwright.program.program import Op, Program

KERNELS: tuple[Kernel, ...] = (
    Embedding(), RmsNorm(), Linear(), Rope(), CacheWrite(), RopeCache(), Attention(), Activation(), Multiply(), Add(),
    Slice(), GatherRows(), AllReduce(), AllGather(),
)


def find_kernel(op: Op, program: Program, target: Target) -> Kernel:
    """The first kernel that supports the op.

    Raises:
        BuildError: none does.
    """
    for kernel in KERNELS:
        if kernel.supports(op, program, target):
            return kernel
    dtypes = ", ".join(f"{name} {program.weights[name].dtype}" for name in op.weights.values())
    raise BuildError(f"no kernel for op {op.name} ({op.kind}) on target {target.name}; weights: {dtypes or 'none'}")
