"""`build --rebuild_kernels E`: the same program and weights with kernels compiled anew, without the checkpoint.

Weights go back to the neutral layout through their layout ids, and are packed for the new target.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tensorwright
from tensorwright.builder.backends import backend_for, backend_of
from tensorwright.builder.folder import copy_tokenizer, engine_folder
from tensorwright.builder.options import BuildOptions
from tensorwright.builder.rank import EngineFacts, build_rank
from tensorwright.builder.report import BuildReport, report_on
from tensorwright.builder.tune import CacheFiles
from tensorwright.engine.config import limits_of, read_config, write_config
from tensorwright.engine.engine import check_format, read_manifest, verify
from tensorwright.engine.format import Reader
from tensorwright.errors import BuildError, EngineError, UsageError
from tensorwright.kernels.interface import Kernel, Tensor
from tensorwright.program.program import Weight, from_json

Report = Callable[[int, str], None]


class EngineSource:
    """Weights of an engine file, unpacked by the kernels that packed them. The engine's machine does not matter."""

    def __init__(self, reader: Reader, manifest: Mapping[str, Any]) -> None:
        self._reader = reader
        self._table = {entry["name"]: entry for entry in manifest["weights"]}
        kernels = backend_of(reader.metadata["architecture"]).kernels
        self._kernels: dict[str, Kernel] = {kernel.name: kernel for kernel in kernels}

    def __call__(self, weight: Weight) -> Tensor:
        """The weight in the neutral layout, exactly as it was packed from."""
        entry = self._table[weight.name]
        kernel = self._kernels.get(entry["kernel"])
        if kernel is None:
            raise BuildError(f"{self._reader.path}: {weight.name} was packed by kernel {entry['kernel']}, which this "
                             "version does not have", mend="build again from the checkpoint")
        packed = self._reader.section(f"weights/{weight.name}")[:entry["bytes"]]
        return kernel.unpack(weight, np.asarray(packed), entry["layout"])


def rebuild_kernels(options: BuildOptions, report: Report) -> BuildReport:
    """Build every rank of engine folder `options.rebuild_kernels` again for `options.target`, into output_dir."""
    begin = time.monotonic()
    source_dir, output_dir = options.rebuild_kernels, options.output_dir
    if source_dir is None:
        raise UsageError("no engine folder was given", mend="tensorwright build --rebuild_kernels E --output_dir F")
    config = read_config(source_dir)
    for name in ("exact", "fp8_activations"):
        if getattr(options, name) and not config["build_config"].get(name):
            raise UsageError(f"the engine in {source_dir} was built without --{name}; a rebuild keeps the program",
                             mend=f"tensorwright build --checkpoint_dir C --output_dir {output_dir} --{name}")
    backend = backend_for(options.target)
    target = backend.resolve_target(options.target)
    origin = _origin(config)
    key = f"rebuilt {target.name} {' '.join(target.features)} by {tensorwright.__version__} from {origin}"
    readers = _readers(source_dir, origin)
    if backend_of(readers[0].metadata["architecture"]).rounds_activations != backend.rounds_activations:
        raise UsageError(f"the engine in {source_dir} was built for {readers[0].metadata['target']}; GPUs and CPUs run "
                         "different programs", mend=f"tensorwright build --checkpoint_dir C --target {target.name}")
    manifests = [read_manifest(reader) for reader in readers]
    programs = [from_json(manifest["program"]) for manifest in manifests]
    with engine_folder(output_dir):
        tuning = backend.tune(programs, target, measure=not options.no_tune and backend.can_measure(target),
                              files=CacheFiles(options.input_timing_cache, options.output_timing_cache), report=report)
        for rank, (reader, manifest, program) in enumerate(zip(readers, manifests, programs, strict=True)):
            names = EngineFacts.__dataclass_fields__
            facts = replace(EngineFacts(**{name: manifest[name] for name in names}), build_key=key,
                            builder=tensorwright.__version__)
            build_rank(program, target, facts, EngineSource(reader, manifest), output_dir / f"rank{rank}.engine",
                       report, tuning)
        copy_tokenizer(source_dir, output_dir)
        write_config(output_dir, {**config, "build_key": key})
    notes = [f"kernels rebuilt for {target.name}", *tuning.notes]
    return report_on(output_dir, limits_of(config), notes, time.monotonic() - begin, reused=False)


def _readers(folder: Path, origin: str) -> list[Reader]:
    """Every rank's file, checked whole: a new file must not give damaged weights new checksums."""
    first = Reader(folder / "rank0.engine")
    check_format(first, folder)
    readers = [first, *(Reader(folder / f"rank{rank}.engine") for rank in range(1, int(first.metadata["world_size"])))]
    for reader in readers:
        verify(reader)
        if _origin(reader.metadata) != origin:
            raise EngineError(f"{reader.path} and config.json beside it are from different builds",
                              mend=f"tensorwright build --checkpoint_dir C --output_dir {folder}")
    return readers


def _origin(facts: Mapping[str, Any]) -> str:
    """The key of the build from a checkpoint, rebuilt since or not: a rebuild in place that was stopped can go on."""
    return str(facts.get("build_key", "")).rpartition(" ")[2]
