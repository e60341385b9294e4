"""Every GPU kernel. A new one is a class and a line here."""

from __future__ import annotations

from tensorwright.kernels.cuda.attention import Attention, RopeCache
from tensorwright.kernels.cuda.elementwise import Activation, Add, Embedding, GatherRows, Multiply, RmsNorm, Slice
from tensorwright.kernels.cuda.linear import Linear
from tensorwright.kernels.cuda.ranks import AllGather, AllReduce
from tensorwright.kernels.interface import Kernel

KERNELS: tuple[Kernel, ...] = (
    Embedding(), RmsNorm(), Linear(), RopeCache(), Attention(), Activation(), Multiply(), Add(), Slice(), GatherRows(),
    AllReduce(), AllGather(),
)
