"""A GPU engine's memory: weights, caches, activations, scratch. It knows sizes and addresses, not what runs.

All of it is taken when the engine is opened, so that a step allocates nothing and addresses stay what graphs recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tensorwright.engine.engine import Engine
from tensorwright.errors import EngineError, LimitError
from tensorwright.kernels.cuda.launch import GpuSource, from_json, scratch_offsets
from tensorwright.kernels.cuda.sample import DRAW

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32,
          "float8_e4m3": torch.float8_e4m3fn}
STAGING_BYTES, READERS = 64 << 20, 4
ALIGNMENT = 256


class Weights:
    """All packed weights in one allocation."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        """Read them into pinned memory, one piece while the last one travels to the device."""
        self._starts: dict[str, int] = {}
        end = 0
        for entry in engine.manifest["weights"]:
            self._starts[entry["name"]] = end
            end += -(-entry["bytes"] // ALIGNMENT) * ALIGNMENT
        self.memory = _empty(max(end, 1), device, "the weights")
        staging = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied: list[Any] = [torch.cuda.Event() for _ in staging]  # type: ignore[no-untyped-call]  # torch: no types
        with engine.reader.path.open("rb") as file, ThreadPoolExecutor(READERS) as pool:
            for turn, (into, offset, size) in enumerate(self._pieces(engine)):
                pinned, event = staging[turn % 2], copied[turn % 2]
                event.synchronize()
                _read(file.fileno(), pinned.numpy()[:size].data, offset, pool)
                self.memory[into:into + size].copy_(pinned[:size], non_blocking=True)
                event.record()
        torch.cuda.synchronize(device)

    def _pieces(self, engine: Engine) -> Iterator[tuple[int, int, int]]:
        """(place in memory, place in the file, bytes) of pieces that fit into a staging buffer."""
        for entry in engine.manifest["weights"]:
            start, offset = self._starts[entry["name"]], engine.reader.offset(f"weights/{entry['name']}")
            for first in range(0, entry["bytes"], STAGING_BYTES):
                yield start + first, offset + first, min(STAGING_BYTES, entry["bytes"] - first)

    def address(self, name: str) -> int:
        """Where a weight begins."""
        return int(self.memory.data_ptr()) + self._starts[name]


class Caches:
    """KV blocks of every layer, zeros at first: what no token wrote must still be finite."""

    def __init__(self, engine: Engine, num_blocks: int, device: torch.device) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for buffer in engine.program.buffers.values():
            if buffer.kind == "cache":
                shape = [num_blocks if dim == "blocks" else int(dim) for dim in buffer.shape]
                self.tensors[buffer.name] = _empty(shape, device, "the KV cache", DTYPES[buffer.dtype]).zero_()

    def copy_block(self, source: int, destination: int) -> None:
        """In every layer."""
        for tensor in self.tensors.values():
            tensor[destination].copy_(tensor[source])


class Activations:
    """The slots that buffers share, and scratch memory, for so many tokens and rows of logits."""

    def __init__(self, engine: Engine, rows: Mapping[str, int], device: torch.device) -> None:
        memory = engine.manifest["memory"]
        self.rows = dict(rows)
        self._slots = [_empty(rows[symbol] * columns, device, "activations", torch.float32)
                       for symbol, columns in memory["slots"]]
        self._slot_of: Mapping[str, int] = memory["slot_of"]
        self.scratch = _empty(scratch_bytes(engine, rows), device, "scratch memory")

    def address(self, name: str) -> int:
        """Where a buffer begins."""
        return int(self._slots[self._slot_of[name]].data_ptr())

    def buffer(self, name: str, columns: int) -> torch.Tensor:
        """A buffer [rows, columns] float32."""
        flat = self._slots[self._slot_of[name]]
        return flat[:flat.shape[0] // columns * columns].view(-1, columns)


def entries_of(engine: Engine) -> dict[str, GpuSource]:
    """Launches by entry point."""
    return {symbol: from_json(entry) for symbol, entry in engine.manifest["kernels"]["entries"].items()}


def scratch_bytes(engine: Engine, rows: Mapping[str, int]) -> int:
    """What the most demanding op needs."""
    entries = entries_of(engine)
    most = scratch_offsets(dict(entries[DRAW].scratch), {"rows": rows["outputs"], "one": 1})[1]
    for op, step in zip(engine.program.ops, engine.steps, strict=True):
        symbol = str(engine.program.buffers[op.outputs[0]].shape[0])
        for variant in step.variants:
            its_rows = min(rows[symbol], variant.max_rows or rows[symbol])
            sizes = {"rows": its_rows, "one": 1}
            most = max(most, scratch_offsets(dict(entries[variant.symbol].scratch), sizes)[1])
    for stretch in engine.manifest["kernels"]["stretches"]:
        scratch = dict(entries[stretch["entry"]].scratch)
        sizes = {"one": 1, **rows}
        if any(size.of == "processors" for size in scratch.values()):  # otherwise no GPU is asked
            sizes["processors"] = torch.cuda.get_device_properties(0).multi_processor_count
        most = max(most, scratch_offsets(scratch, sizes)[1])
    return most


def free_bytes() -> int:
    """Bytes of the current GPU that nobody has taken."""
    return int(torch.cuda.mem_get_info()[0])


def _read(file: int, into: memoryview, offset: int, pool: ThreadPoolExecutor) -> None:
    """Fill a buffer from a place of the file: several threads copy from the system's cache faster than one."""
    share = -(-len(into) // READERS)

    def fill(first: int) -> None:
        part = into[first:first + share]
        while part:
            count = os.preadv(file, [part], offset + first)
            if count == 0:
                raise EngineError("the engine file ended while its weights were read",
                                  mend="copy the engine again, or rebuild it with tensorwright build")
            part, first = part[count:], first + count

    list(pool.map(fill, range(0, len(into), share)))


def _empty(shape: Any, device: torch.device, what: str, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        free = free_bytes()
        raise LimitError(
            f"{what} do not fit into the GPU's memory: {free / 2**30:.2f} GiB are free",
            mend="end other programs on the GPU, or give a smaller --max_tokens_in_paged_kv_cache") from None
