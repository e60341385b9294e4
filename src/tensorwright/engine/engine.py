"""An engine that has been opened: its program, plan, packed weights and limits. It runs nothing itself.

Everything is refused before a weight is read: another format version, machine, rank or number of ranks.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tensorwright.engine.config import limits_of, read_config
from tensorwright.engine.format import FORMAT_VERSION, KERNELS, MANIFEST, Bytes, Reader
from tensorwright.engine.limits import Limits
from tensorwright.errors import EngineError, IncompatibleEngineError, RanksError
from tensorwright.program.program import Program, from_json


@dataclass(frozen=True)
class Variant:
    """A tactic for steps of up to `max_rows` rows (None: of any number), and its entry point in the shared object."""

    max_rows: int | None
    parameters: Mapping[str, int]
    symbol: str


@dataclass(frozen=True)
class Step:
    """One op of the plan: the kernel that runs it, the layout of its weights, and its tactic for any number of rows.

    `few_rows`: other tactics, by rising `max_rows`; engines of format 1 have none.
    """

    op: str
    kernel: str
    layout: str
    parameters: Mapping[str, int]
    symbol: str
    few_rows: tuple[Variant, ...] = ()

    def at(self, rows: int) -> Variant:
        """The tactic for so many rows."""
        return next(variant for variant in self.variants if variant.max_rows is None or rows <= variant.max_rows)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All tactics, that for any number of rows last."""
        return (*self.few_rows, Variant(None, self.parameters, self.symbol))


class Engine:
    """`Engine.open(directory, rank)`: checked, mapped, not yet running."""

    def __init__(self, reader: Reader, config: Mapping[str, Any], directory: Path) -> None:
        self.reader = reader
        self.config = config
        self.directory = directory
        self.metadata = reader.metadata
        self.limits: Limits = limits_of(config)
        self.rank = int(self.metadata["rank"])
        self.world_size = int(self.metadata["world_size"])

    @classmethod
    def open(cls, directory: Path, rank: int = 0) -> Engine:
        """The engine of a rank. Raises EngineError, IncompatibleEngineError or RanksError with what mends it."""
        directory = Path(directory)
        config = read_config(directory)
        reader = Reader(directory / f"rank{rank}.engine")
        check_format(reader, directory)
        _check_machine(reader, directory)
        if config.get("build_key") != reader.metadata.get("build_key"):
            raise EngineError(f"{reader.path} and config.json beside it are from different builds (one of them was "
                              "stopped)", mend=f"tensorwright build --checkpoint_dir C --output_dir {directory}")
        engine = cls(reader, config, directory)
        if engine.rank != rank:
            raise RanksError(f"{reader.path} was built for rank {engine.rank}, not {rank}",
                             mend=f"copy the engine again; this file's name is rank{engine.rank}.engine")
        return engine

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest after its SHA-256 was checked."""
        return read_manifest(self.reader)

    @cached_property
    def program(self) -> Program:
        """The program after all passes."""
        return from_json(self.manifest["program"])

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The plan, one step for each op in order."""
        return tuple(Step(**{**step, "few_rows": tuple(Variant(**variant) for variant in step.get("few_rows", ()))})
                     for step in self.manifest["steps"])

    def kernels(self) -> bytes:
        """The shared object, after its SHA-256 was checked."""
        return self.reader.checked(KERNELS)

    def weight(self, name: str) -> Bytes:
        """A packed weight in the mapped file."""
        return self.reader.section(f"weights/{name}")

    def verify(self) -> None:
        """Read the whole file and check every section, or raise EngineError that names the damaged ones."""
        verify(self.reader)

    @property
    def target(self) -> str:
        """Name of the machine it was built for."""
        return self.metadata["target"]

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features that it needs, as /proc/cpuinfo names them."""
        return tuple(self.metadata["features"].split())

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one KV block."""
        return int(self.manifest["tokens_per_block"])

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return int(self.manifest["vocab_size"])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end a text, as the checkpoint's config says."""
        return tuple(self.manifest["end_ids"])

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes of all layers' caches for one token, scales included."""
        width = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3": 1}
        total = 0
        for buffer in self.program.buffers.values():
            if buffer.kind == "cache":
                per_block = 1
                for dim in buffer.shape[1:]:
                    per_block *= int(dim)
                total += per_block * width[buffer.dtype] // self.tokens_per_block
        return total

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weights, padding included."""
        return sum(self.weight(w["name"]).nbytes for w in self.manifest["weights"])


def read_manifest(reader: Reader) -> dict[str, Any]:
    """The manifest of an engine file, after its SHA-256 was checked."""
    manifest: dict[str, Any] = json.loads(reader.checked(MANIFEST).rstrip(b"\0"))
    return manifest


def verify(reader: Reader) -> None:
    """Read a whole engine file and check every section, or raise EngineError that names the damaged ones."""
    checksums = {f"weights/{weight['name']}": weight["crc32"] for weight in read_manifest(reader)["weights"]}
    reader.checked(KERNELS)
    if damaged := reader.damaged_sections(checksums):
        raise EngineError(f"{reader.path}: {len(damaged)} damaged: {', '.join(damaged[:5])}",
                          mend="copy the engine again, or rebuild it with tensorwright build")


def check_format(reader: Reader, directory: Path) -> None:
    """Raise EngineError for a file that is no engine, or IncompatibleEngineError for one of a newer format."""
    metadata = reader.metadata
    missing = {"format_version", "target", "architecture", "features", "rank", "world_size"} - set(metadata)
    if missing:
        raise EngineError(f"{reader.path} is a safetensors file but no engine: no {', '.join(sorted(missing))} in its "
                          "header", mend=f"tensorwright build --checkpoint_dir C --output_dir {directory}")
    numbers = {name: metadata[name] for name in ("format_version", "rank", "world_size")}
    if not all(text.isdecimal() for text in numbers.values()):
        raise EngineError(f"{reader.path}: the header holds {numbers}, expected numbers",
                          mend="rebuild the engine with tensorwright build, or copy it again")
    version = int(metadata["format_version"])
    if version > FORMAT_VERSION:
        raise IncompatibleEngineError(
            f"{reader.path} has format {version} (written by Tensorwright {metadata.get('builder', '?')}); this is "
            f"Tensorwright with format {FORMAT_VERSION}", mend="pip install --upgrade tensorwright")


def _check_machine(reader: Reader, directory: Path) -> None:
    """The architecture. CPU features and the GPU are checked by the loader of the target's kernels."""
    metadata = reader.metadata
    if metadata["architecture"] not in (platform.machine(), "cuda"):
        raise IncompatibleEngineError(
            f"{reader.path} was built for {metadata['architecture']} ({metadata['target']}), this machine is "
            f"{platform.machine()}", mend=f"tensorwright build --rebuild_kernels {directory} --output_dir E")
