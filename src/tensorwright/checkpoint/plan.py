"""What a conversion will write: every rank's tensors, their dtypes, shapes and makers. It reads and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tensorwright.checkpoint.config import CheckpointConfig
from tensorwright.checkpoint.sharding import shard_shape
from tensorwright.checkpoint.tensor_file import layout
from tensorwright.models.weight_names import WeightSpec, weights
from tensorwright.quantization.scheme import Scheme

Shapes = dict[str, tuple["np.dtype[Any]", tuple[int, ...]]]

METADATA = {"format": "tensorwright-checkpoint", "version": "1"}


@dataclass(frozen=True)
class PlannedWeight:
    """One tensor of every rank: how it is cut, its shape per rank, and its scheme when it is quantised."""

    spec: WeightSpec
    shape: tuple[int, ...]
    scheme: Scheme | None

    @property
    def scale_name(self) -> str:
        """Upstream's name: groups have weights_scaling_factor, whole channels per_channel_scale."""
        grouped = self.scheme is not None and self.scheme.group_size != -1
        return self.spec.name.removesuffix("weight") + ("weights_scaling_factor" if grouped else "per_channel_scale")

    def stored(self, dtype: np.dtype[Any]) -> Shapes:
        """The tensors in the file, where unquantised ones and scales have `dtype`."""
        if self.scheme is None:
            return {self.spec.name: (dtype, self.shape)}
        rows, columns = self.shape
        groups = self.scheme.num_groups(columns)
        scales = (rows, groups) if self.scheme.group_size != -1 else (rows,)
        return {self.spec.name: (self.scheme.code_dtype, (rows, self.scheme.code_columns(columns))),
                self.scale_name: (dtype, scales)}


@dataclass(frozen=True)
class Plan:
    """The whole checkpoint. All ranks have the same names and shapes."""

    config: CheckpointConfig
    weights: tuple[PlannedWeight, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of unquantised weights and of scales."""
        return numpy_dtype(self.config.model.dtype)

    def tensors(self) -> Shapes:
        """Names, dtypes and shapes in each rank's file."""
        found: Shapes = {}
        for weight in self.weights:
            found |= weight.stored(self.dtype)
        for name in self.kv_scale_names():
            found[name] = (np.dtype(np.float32), (1,))
        return found

    def kv_scale_names(self) -> Iterator[str]:
        """Upstream's scales of a quantised KV cache: 1 for FP8; ours of int8 are dynamic, so they are written as 1."""
        if self.config.quantization.kv_cache:
            for layer in range(self.config.model.num_layers):
                yield f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"

    @property
    def num_bytes(self) -> int:
        """Size of all ranks' files."""
        return self.config.tp_size * layout(self.tensors(), METADATA)[2]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """float32, float16 or bfloat16 as a NumPy dtype."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def make_plan(config: CheckpointConfig) -> Plan:
    """Every weight of the model with its scheme: matrices of layers as the algorithm says, lm_head's if asked."""
    quantization = config.quantization
    is_float = quantization.algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
    whole = Scheme(8, is_float=is_float)
    matrices = {None: None, "W4A16": Scheme(4, quantization.group_size)}.get(quantization.algorithm, whole)
    head = whole if quantization.quantize_lm_head else None
    return Plan(config, tuple(
        PlannedWeight(spec, shard_shape(spec, config),
                      matrices if spec.quantizable else head if spec.kind == "lm_head" else None)
        for spec in weights(config.model, write_lm_head=config.has_lm_head)))
