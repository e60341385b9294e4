"""Runs an engine's ops one by one, natively and in NumPy, on the same inputs, and compares every buffer.

This is how fusions and kernels are trusted. It knows the executor and the reference, and unpacks weights as a rebuild
does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tensorwright.builder.rebuild import EngineSource
from tensorwright.engine.engine import Engine
from tensorwright.program import reference
from tensorwright.program.ops import BATCH_INPUTS
from tensorwright.program.program import Op, Program, Weight
from tensorwright.runtime.batch import Batch


class StepExecutor(Protocol):
    """An executor whose ops run one by one and whose buffers can be read: of CPUs and of GPUs."""

    engine: Engine
    program: Program

    def execute_range(self, batch: Batch, begin: int, end: int) -> None:
        """Run the ops begin .. end − 1."""

    def buffer(self, name: str) -> NDArray[Any]:
        """A buffer's numbers."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of an op's outputs, relative to the largest number of the reference's."""

    op: str
    kind: str
    error: float


def compare_steps(executor: StepExecutor, batch: Batch) -> list[Difference]:
    """One difference for each op, in order. The native results go on to the next op. Changes the caches."""
    source = EngineSource(executor.engine.reader, executor.engine.manifest)
    weights = {name: plain_weight(weight, source) for name, weight in executor.program.weights.items()}
    differences = []
    for index, op in enumerate(executor.program.ops):
        inputs = {name: _snapshot(executor, batch, name) for name in (*op.inputs, *op.outputs)}
        expected = reference.run_op(op, inputs, {role: weights[name] for role, name in op.weights.items()})
        executor.execute_range(batch, index, index + 1)
        differences.append(_difference(op, executor, batch, expected))
    return differences


def plain_weight(weight: Weight, source: EngineSource) -> NDArray[np.float32]:
    """float32 in the weight's shape, multiplied out."""
    tensor = source(weight)
    if tensor.scales is None:
        return np.asarray(tensor.values, np.float32).reshape(weight.shape)
    return reference.dequantize(tensor.values, tensor.scales, weight.dtype)


def _rows(executor: StepExecutor, batch: Batch, name: str) -> int:
    symbol = executor.program.buffers[name].shape[0]
    return batch.output_rows.shape[0] if symbol == "outputs" else batch.token_ids.shape[0]


def _snapshot(executor: StepExecutor, batch: Batch, name: str) -> NDArray[Any]:
    if name in BATCH_INPUTS:
        return np.asarray(getattr(batch, name))
    buffer = executor.buffer(name)
    if executor.program.buffers[name].kind == "cache":
        return buffer.copy()
    return buffer[:_rows(executor, batch, name)].copy()


def _difference(op: Op, executor: StepExecutor, batch: Batch, expected: dict[str, NDArray[Any]]) -> Difference:
    worst = 0.0
    for name, reference_values in expected.items():
        native = executor.buffer(name)
        if executor.program.buffers[name].kind != "cache":
            native = native[:_rows(executor, batch, name)]
        wanted = reference_values.astype(np.float64)
        scale = np.abs(wanted).max(initial=0.0) or 1.0
        worst = max(worst, float(np.abs(native.astype(np.float64) - wanted).max(initial=0.0) / scale))
    return Difference(op.name, op.kind, worst)
