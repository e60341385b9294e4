"""Weights of the program, read from a checkpoint one at a time and packed as their kernels want them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from tensorwright.builder.plan import Choice, Plan
from tensorwright.errors import BuildError
from tensorwright.kernels.interface import Array, Tensor
from tensorwright.program.program import Program, Weight

_CONVERT = "tensorwright convert --model_dir M --output_dir C, then build again"


class WeightSource(Protocol):
    """Gives a weight of the program in the neutral layout: from a checkpoint, or from an older engine."""

    def __call__(self, weight: Weight) -> Tensor:
        """The weight, quantised or not as its dtype says."""


@runtime_checkable
class Alike(Protocol):
    """What a source offers besides where many of its weights are the same: they are packed once."""

    def alike(self, weight: Weight) -> Hashable:
        """Equal for weights of equal numbers."""


def packed_weights(plan: Plan, source: WeightSource) -> Iterator[tuple[Weight, str, str, Array]]:
    """(weight, layout id, kernel name, packed bytes) for every weight once, in the order the ops use them."""
    done: set[str] = set()
    packed: dict[Hashable, Array] = {}
    for choice in plan.choices:
        for role, name in choice.op.weights.items():
            if name not in done:
                done.add(name)
                weight = plan.program.weights[name]
                layout, kernel = choice.tactic.layout, choice.kernel.name
                if not isinstance(source, Alike):
                    yield weight, layout, kernel, _pack(choice, role, weight, plan, source)
                    continue
                key = (role, layout, kernel, source.alike(weight))
                if key not in packed:
                    packed[key] = _pack(choice, role, weight, plan, source)
                yield weight, layout, kernel, packed[key]


def _pack(choice: Choice, role: str, weight: Weight, plan: Plan, source: WeightSource) -> Array:
    tensor = Tensor(np.asarray(weight.values, np.float32)) if weight.values else source(weight)
    return choice.kernel.pack(choice.op, plan.program, role, tensor, choice.tactic)


class CheckpointSource:
    """Weights of one rank of a checkpoint: parts are cut from their tensors and joined row after row."""

    def __init__(self, tensors: TensorReader, rank: int) -> None:
        self._tensors = tensors
        self._rank = rank

    def __call__(self, weight: Weight) -> Tensor:
        """The weight in the neutral layout. Raises BuildError when the checkpoint's tensors do not fit it."""
        parts = [self._part(part.name, part.start, part.count, weight) for part in weight.parts]
        values = parts[0].values if len(parts) == 1 else np.concatenate([part.values for part in parts])
        if weight.dtype == "float32" and not weight.is_quantized:
            values = values.astype(np.float32)
        if parts[0].scales is None:
            return Tensor(values)
        scales = [part.scales for part in parts if part.scales is not None]
        return Tensor(values, np.concatenate(scales))

    def _part(self, name: str, start: int, count: int, weight: Weight) -> Tensor:
        tensor = self._tensors.tensor(self._rank, name)
        rows = tensor.values.shape[0]
        if start + count > rows or weight.is_quantized != (tensor.scales is not None):
            held = "quantised" if tensor.scales is not None else "not quantised"
            raise BuildError(f"{name} of rank {self._rank} has {rows} rows and is {held}; {weight.name} needs rows "
                             f"{start} to {start + count} as {weight.dtype}", mend=_CONVERT)
        scales = tensor.scales
        _check_numbers(f"{name} of rank {self._rank}", tensor.values, *_stored_form(weight))
        if scales is not None:
            groups = 1 if weight.group_size < 0 else weight.shape[1] // weight.group_size
            _check_numbers(f"the scales of {name} of rank {self._rank}", scales, (groups,), (weight.scale_dtype,))
        return Tensor(tensor.values[start:start + count], None if scales is None else scales[start:start + count])


def check_names(tensors: TensorReader, rank: int, program: Program, first: Program) -> None:
    """Raise BuildError where a rank's file and its program name different tensors: one of them is of another model.

    Not missed, and not needed: scales of an int8 KV cache, which are dynamic, and biases that only the `first` rank's
    program adds.
    """
    needed, known = _tensor_names(program), _tensor_names(first)
    held = {name for name in tensors.names(rank) if not name.endswith("kv_cache_scaling_factor")}
    for what, names in (("lacks", needed - held), ("has beyond what config.json describes", held - needed - known)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise BuildError(f"rank {rank} of the checkpoint {what}: {listed}", mend=_CONVERT)


def _tensor_names(program: Program) -> set[str]:
    return {part.name for weight in program.weights.values() for part in weight.parts}


def _stored_form(weight: Weight) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The shape of a row in the checkpoint and the dtypes it may have; norms and biases are widened to float32."""
    if weight.dtype == "int4":
        return (weight.shape[1] // 2,), ("uint8",)
    if weight.dtype == "float8_e4m3":
        return weight.shape[1:], ("float8_e4m3fn",)
    return weight.shape[1:], ("float32", "float16", "bfloat16") if weight.dtype == "float32" else (weight.dtype,)


def _check_numbers(what: str, values: Array, row: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if values.shape[1:] != row or values.dtype.name not in dtypes:
        raise BuildError(f"{what} holds rows of {list(values.shape[1:])} {values.dtype.name}; config.json asks for "
                         f"{list(row)} {' or '.join(dtypes)}", mend=_CONVERT)


class TensorReader(Protocol):
    """What `checkpoint.reader.Checkpoint` offers here."""

    def names(self, rank: int) -> tuple[str, ...]:
        """The names that `tensor` takes."""

    def tensor(self, rank: int, name: str) -> TensorLike:
        """A tensor of a rank's file in the neutral layout."""


class TensorLike(Protocol):
    """What a checkpoint gives for a tensor: the two fields of `kernels.interface.Tensor`."""

    @property
    def values(self) -> Array:
        """Codes or numbers."""

    @property
    def scales(self) -> Array | None:
        """Scales of quantised weights."""
