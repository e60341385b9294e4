"""Muon: momentum whose update is made orthogonal, for the matrices inside the network.

Knows how to step a list of matrices; those of one shape go together, as one batched product.
Embeddings, the output head and the norms are AdamW's work (``demo.train``).
The idea is Keller Jordan's (2024); this is our own short form of it.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(batch: Tensor) -> Tensor:
    """Each matrix ``[n, rows, columns]`` with its singular values brought near one.

    Five steps of a Newton-Schulz iteration with a quintic polynomial; bfloat16 is enough, since
    only the direction of the update matters.
    """
    x = batch.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    out: Tensor = x if wide else x.mT
    return out


class Muon:
    """The optimiser for matrices.  ``lr`` is set by the caller before each step."""

    def __init__(self, matrices: Iterable[Tensor], momentum: float, weight_decay: float) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.lr = 0.0
        by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self.groups = list(by_shape.values())
        self.buffers = [torch.zeros_like(torch.stack(group)) for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp_(buffer, self.momentum)).float()
            rows, columns = buffer.shape[-2:]
            scale = self.lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(group, 1 - self.lr * self.weight_decay)
            torch._foreach_add_(group, list((update * -scale).unbind()))
