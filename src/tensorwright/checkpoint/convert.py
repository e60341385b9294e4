"""From a Hugging Face folder to a checkpoint folder: decide, check everything, write aside, then rename.

config.json is written last, and a previous checkpoint in the same folder stays whole until the new one is. It knows no
command line, and how to quantise only through the `Quantizer` it is given.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tensorwright.checkpoint.config import CheckpointConfig, Quantization, read_config, to_json
from tensorwright.checkpoint.dummy import write_dummy
from tensorwright.checkpoint.model_folder import FLOAT_DTYPES, ModelFolder
from tensorwright.checkpoint.plan import METADATA, Plan, make_plan
from tensorwright.checkpoint.sharding import check_sizes, pieces
from tensorwright.checkpoint.tensor_file import DTYPES, TensorFileWriter, aside
from tensorwright.checkpoint.transfer import Distance, Transfer
from tensorwright.errors import CheckpointError, ModelError, UsageError
from tensorwright.models import from_huggingface
from tensorwright.models.config import ModelConfig
from tensorwright.models.weight_names import weights
from tensorwright.quantization import reference
from tensorwright.quantization.scheme import Caster, Quantizer

Report = Callable[[int, str], None]
DType = Literal["auto", "float32", "float16", "bfloat16"]
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MAX_THREADS = 16


@dataclass(frozen=True)
class ConvertOptions:
    """What to make of a model. dtype "auto" is the model's own, with float16 in the place of float32."""

    dtype: DType = "auto"
    quantization: Quantization = Quantization()
    tp_size: int = 1
    dummy_weights: bool = False
    seed: int = 0
    num_threads: int | None = None
    quantizer: Quantizer = reference.quantize
    caster: Caster = reference.cast


@dataclass
class ConvertReport:
    """What came out: the config, sizes, and each quantised matrix's distance by (kind, layer; None for lm_head)."""

    config: CheckpointConfig
    num_bytes: int
    distances: dict[tuple[str, int | None], Distance] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """A checked conversion that is ready to run."""

    folder: ModelFolder
    plan: Plan
    options: ConvertOptions

    @property
    def report_bytes(self) -> int:
        """What the numbers given to `report` will add up to: bytes read, or written where weights are random."""
        if self.options.dummy_weights:
            return self.plan.num_bytes
        return sum(len(piece.rows) * (1 if piece.columns is None else len(piece.columns))
                   * DTYPES[self.folder.entry(piece.source.name).dtype].itemsize
                   for rank in range(self.plan.config.tp_size) for weight in self.plan.weights
                   for piece in pieces(weight.spec, self.plan.config, rank))


def prepare(model_dir: Path, options: ConvertOptions) -> Conversion:
    """Reads config and headers, and checks names, shapes, dtypes and sizes. Raises ModelError and UsageError."""
    folder = ModelFolder(model_dir, with_weights=not options.dummy_weights)
    model = _model(folder)
    if not options.dummy_weights:
        folder.tokenizer_files()
        expected = [source for spec in weights(model, write_lm_head=not model.tied_embeddings)
                    for source in spec.sources]
        folder.check(expected, ignored=(_HEAD,) if model.tied_embeddings else ())
        model = _checked_tie(folder, model)
    end_ids = folder.end_ids() or ((min(2, model.vocab_size - 1),) if options.dummy_weights else ())
    model = replace(model, dtype=_stored_dtype(folder, model, options))
    quantization = options.quantization
    if quantization.algorithm != "W4A16":
        quantization = replace(quantization, group_size=-1)
    config = CheckpointConfig(model, quantization, options.tp_size, end_ids)
    check_sizes(config)
    return Conversion(folder, make_plan(config), options)


def convert(model_dir: Path, output_dir: Path, options: ConvertOptions, report: Report) -> ConvertReport:
    """Converts a model folder. Raises ModelError, UsageError and CheckpointError; then no new files are left."""
    return run(prepare(model_dir, options), output_dir, report)


def run(conversion: Conversion, output_dir: Path, report: Report) -> ConvertReport:
    """Writes the checkpoint folder. Raises ModelError for bad numbers, CheckpointError when writing fails."""
    plan, options = conversion.plan, conversion.options
    _check_place(conversion, output_dir)
    result = ConvertReport(plan.config, plan.num_bytes)
    with _writing(output_dir), ExitStack() as stack:
        paths = [output_dir / f"rank{rank}.safetensors" for rank in range(plan.config.tp_size)]
        writers = [stack.enter_context(TensorFileWriter(path, plan.tensors(), METADATA)) for path in paths]
        for rank, writer in enumerate(writers):
            if options.dummy_weights:
                write_dummy(plan, writer, options.seed, report)
            else:
                _write_rank(conversion, rank, writer, result, report)
            for name in plan.kv_scale_names():
                writer.write(name, np.ones(1, np.float32))
        _finish(conversion, output_dir, writers)
    return result


def write_config(config: CheckpointConfig, output_dir: Path) -> None:
    """Writes config.json aside, then gives it its name."""
    path = output_dir / "config.json"
    aside(path).write_text(json.dumps(to_json(config), indent=2) + "\n", encoding="utf-8")
    aside(path).replace(path)


def _model(folder: ModelFolder) -> ModelConfig:
    """The model of config.json; where it cannot be read, the mend names this folder."""
    try:
        return from_huggingface(folder.config)
    except ModelError as error:
        mend = error.mend and error.mend.replace("MODEL_DIR", str(folder.directory))
        raise ModelError(error.message, mend=mend) from error


def _stored_dtype(folder: ModelFolder, model: ModelConfig,
                  options: ConvertOptions) -> Literal["float32", "float16", "bfloat16"]:
    """`auto`: as config.json declares, else as the embedding table is stored; float32 becomes float16."""
    if options.dtype != "auto":
        return options.dtype
    declared = folder.config.get("dtype") or folder.config.get("torch_dtype")
    dtype = model.dtype if declared or options.dummy_weights else FLOAT_DTYPES[folder.entry(_TABLE).dtype]
    return "float16" if dtype == "float32" else dtype


def _checked_tie(folder: ModelFolder, model: ModelConfig) -> ModelConfig:
    """A model that says it is tied but holds another lm_head is not tied; transformers decides so too."""
    if not model.tied_embeddings or not folder.has(_HEAD):
        return model
    head, table = folder.entry(_HEAD), folder.entry(_TABLE)
    blocks = [(row, min(row + 1024, model.vocab_size)) for row in range(0, model.vocab_size, 1024)]
    same = (head.dtype, head.shape) == (table.dtype, table.shape) and all(
        folder.read_rows(_HEAD, *block).tobytes() == folder.read_rows(_TABLE, *block).tobytes() for block in blocks)
    return model if same else replace(model, tied_embeddings=False)


def _check_place(conversion: Conversion, output_dir: Path) -> None:
    """The output must not be the model folder, and its disk must have room for the new files beside the old."""
    if output_dir.resolve() == conversion.folder.directory.resolve():
        raise UsageError(f"--output_dir is the model folder {output_dir}, whose config.json would be replaced",
                         mend=f"--output_dir {output_dir}-checkpoint")
    if (output_dir / "config.json").exists() and not _is_checkpoint(output_dir):
        raise UsageError(f"{output_dir} holds a config.json that is no checkpoint's, and converting would replace it",
                         mend=f"--output_dir {output_dir}-checkpoint")
    with _writing(output_dir):
        free = shutil.disk_usage(output_dir).free
    needed = conversion.plan.num_bytes + (64 << 20)
    if free < needed:
        raise CheckpointError(f"the checkpoint needs {needed / 2**30:.2f} GiB in {output_dir}, its disk has "
                              f"{free / 2**30:.2f} GiB free", mend=f"df -h {output_dir}")


def _is_checkpoint(directory: Path) -> bool:
    try:
        read_config(directory)
    except CheckpointError:
        return False
    return True


@contextmanager
def _writing(output_dir: Path) -> Iterator[None]:
    """Makes the folder, clears what this or a killed run leaves aside, and gives the system's errors a meaning."""
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _clear(output_dir)
        try:
            yield
        finally:
            _clear(output_dir)
            if is_new and not any(output_dir.iterdir()):
                output_dir.rmdir()
    except OSError as cause:
        raise CheckpointError(f"the checkpoint cannot be written to {output_dir}: {cause.strerror or cause}",
                              mend=f"df -h {output_dir}; ls -ld {output_dir}") from cause


def _clear(output_dir: Path) -> None:
    for leftover in output_dir.glob(".*.partial"):
        leftover.unlink()


def _write_rank(conversion: Conversion, rank: int, writer: TensorFileWriter, result: ConvertReport,
                report: Report) -> None:
    plan, options = conversion.plan, conversion.options
    threads = options.num_threads or min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    transfer = Transfer(conversion.folder, writer, plan.dtype, options.quantizer, options.caster, threads)
    tensors = ((weight, pieces(weight.spec, plan.config, rank)) for weight in plan.weights)
    for weight, distance in transfer.move(tensors, report):
        if weight.scheme is not None:
            key = (weight.spec.kind, weight.spec.layer)
            result.distances[key] = result.distances.get(key, Distance()) + distance


def _finish(conversion: Conversion, output_dir: Path, writers: list[TensorFileWriter]) -> None:
    """Replaces an earlier checkpoint: without config.json no folder is a checkpoint, so that goes first, comes last."""
    copies = () if conversion.options.dummy_weights else conversion.folder.tokenizer_files()
    for path in copies:
        shutil.copyfile(path, aside(output_dir / path.name))
    (output_dir / "config.json").unlink(missing_ok=True)
    names = {writer.path.name for writer in writers}
    for stale in output_dir.glob("rank*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    for writer in writers:
        writer.commit()
    for path in copies:
        aside(output_dir / path.name).replace(output_dir / path.name)
    write_config(conversion.plan.config, output_dir)
