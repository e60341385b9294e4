"""Builds an engine folder: derives limits, builds or reuses each rank's file, writes config.json last.

It knows the order of things and what is written where; `rank.py` knows how one engine file is made.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tensorwright
from tensorwright.builder.backends import Backend, backend_for, backend_of
from tensorwright.builder.dummy import DummySource
from tensorwright.builder.folder import copy_tokenizer, engine_folder
from tensorwright.builder.limits import derive, rope_factor
from tensorwright.builder.options import BuildOptions
from tensorwright.builder.pack import CheckpointSource, WeightSource, check_names
from tensorwright.builder.passes import run_passes
from tensorwright.builder.passes.context import Context
from tensorwright.builder.rank import EngineFacts, build_rank
from tensorwright.builder.rebuild import rebuild_kernels
from tensorwright.builder.report import BuildReport, engine_config, report_on
from tensorwright.builder.reuse import build_key, remember, reuse
from tensorwright.builder.tune import CacheFiles, Tuning
from tensorwright.checkpoint.config import CheckpointConfig, read_config, to_json
from tensorwright.checkpoint.reader import Checkpoint
from tensorwright.engine.config import write_config
from tensorwright.engine.limits import Limits
from tensorwright.errors import BuildError, UsageError
from tensorwright.kernels.interface import Target
from tensorwright.models.decoder import build_program
from tensorwright.program.program import Program

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class _Job:
    """Everything one rank's build needs; it crosses to a worker process."""

    checkpoint_dir: Path
    output: Path
    config: CheckpointConfig
    target: Target
    tokens_per_block: int
    exact: bool
    fp8_activations: bool
    key: str
    rank: int
    tuning: Tuning = Tuning()
    dummy_weights: bool = False


def build(options: BuildOptions, report: Report) -> BuildReport:
    """Build the engine folder. `report` is told bytes packed and what is being done.

    Raises UsageError for limits that cannot be meant, CheckpointError and BuildError for what stops the build.
    """
    if options.rebuild_kernels is not None:
        return rebuild_kernels(options, report)
    if options.checkpoint_dir is None:
        raise UsageError("no checkpoint was given", mend="tensorwright build --checkpoint_dir C --output_dir E")
    begin = time.monotonic()
    backend = backend_for(options.target)
    config = read_config(options.checkpoint_dir) if options.dummy_weights else Checkpoint(options.checkpoint_dir).config
    target = backend.resolve_target(options.target)
    _check_activations(options, config, target, backend)
    model = config.model
    limits, notes = derive(options, max_position_embeddings=model.max_position_embeddings,
                           rope_factor=rope_factor(model.rope.kind, model.rope.scaling))
    if options.dry_run:
        return _dry_run(options, config, target, limits, notes)
    key = build_key(_facts(options, target), options.checkpoint_dir)
    jobs = [_Job(options.checkpoint_dir, options.output_dir / f"rank{rank}.engine", config, target,
                 options.tokens_per_block, options.exact, options.fp8_activations, key, rank,
                 dummy_weights=options.dummy_weights) for rank in range(config.tp_size)]
    measure = not options.no_tune and backend.can_measure(target)
    with engine_folder(options.output_dir):
        missing = [job for job in jobs if not reuse(key, job.rank, job.output, tuned=measure)]
        _check_space(missing)
        tuning = backend.tune((_program(job) for job in missing), target, measure=measure, report=report,
                              files=CacheFiles(options.input_timing_cache, options.output_timing_cache))
        _build_ranks([replace(job, tuning=tuning) for job in missing], options.workers, report)
        copy_tokenizer(options.checkpoint_dir, options.output_dir)
        write_config(options.output_dir, engine_config(options, limits, to_json(config), key))
    return report_on(options.output_dir, limits, [*notes, *tuning.notes], time.monotonic() - begin, reused=not missing)


def _check_activations(options: BuildOptions, config: CheckpointConfig, target: Target, backend: Backend) -> None:
    if not options.fp8_activations:
        return
    if options.exact:
        raise UsageError("fp8_activations and exact exclude each other", mend="leave --exact out")
    if config.quantization.algorithm != "W4A16" or config.quantization.group_size < 0:
        raise UsageError("fp8_activations is for int4 weights in groups",
                         mend="tensorwright convert --use_weight_only --weight_only_precision int4 --group_size 128")
    if not backend.float8_rows(target):
        raise UsageError(f"fp8_activations needs a GPU of sm_90; the target is {target.name}", mend="--target sm_90")


def program_of(config: CheckpointConfig, tokens_per_block: int, rank: int = 0, *, exact: bool = False,
               fp8_activations: bool = False, target: Target | None = None) -> Program:
    """The program of a rank before kernels are chosen: the model's, after all passes of the target's backend.

    `exact`: no activation is rounded to 8 bits. `fp8_activations`: those of int4 weights may be rounded to float8.
    `target`: none means CPUs.
    """
    model, quantization, backend = config.model, config.quantization, backend_of(target.architecture if target else "")
    rounds = backend.rounds_activations and not exact
    float8_rows = backend.float8_rows(target) if target and not exact else 0
    context = Context(
        algorithm=quantization.algorithm, group_size=quantization.group_size,
        quantize_lm_head=quantization.quantize_lm_head, scale_dtype=model.dtype, tp_size=config.tp_size, rank=rank,
        num_kv_heads=model.num_kv_heads, activation_group=Context.activation_group if rounds else 0,
        float8_rows=float8_rows, int4_float8_rows=float8_rows if fp8_activations else 0)
    kv_dtype = {"INT8": "int8", "FP8": "float8_e4m3"}.get(quantization.kv_cache or "", model.dtype)
    return run_passes(build_program(model, kv_dtype=kv_dtype, tokens_per_block=tokens_per_block), context,
                      backend.passes)


def _build_ranks(jobs: list[_Job], workers: int, report: Report) -> None:
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            _run(job, report)
        return
    context = multiprocessing.get_context("spawn")  # threads of the compiler driver and NumPy do not survive a fork
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        for job, size in zip(jobs, pool.map(_run_quietly, jobs), strict=True):
            report(size, f"rank {job.rank} built")


def _run(job: _Job, report: Report) -> int:
    facts = EngineFacts(
        rank=job.rank, world_size=job.config.tp_size, build_key=job.key, vocab_size=job.config.model.vocab_size,
        end_ids=job.config.end_ids, tokens_per_block=job.tokens_per_block, model=asdict(job.config.model),
        builder=tensorwright.__version__)
    program = _program(job)
    size = build_rank(program, job.target, facts, _source(job, program), job.output, report, job.tuning)
    remember(job.key, job.rank, job.output)
    return size


def _source(job: _Job, program: Program) -> WeightSource:
    if job.dummy_weights:
        return DummySource()
    checkpoint = Checkpoint(job.checkpoint_dir)
    first = program_of(job.config, job.tokens_per_block, target=job.target)
    check_names(checkpoint, job.rank, program, first)
    return CheckpointSource(checkpoint, job.rank)


def _program(job: _Job) -> Program:
    return program_of(job.config, job.tokens_per_block, job.rank, exact=job.exact, fp8_activations=job.fp8_activations,
                      target=job.target)


def _run_quietly(job: _Job) -> int:
    return _run(job, lambda size, what: None)


def _facts(options: BuildOptions, target: Target) -> dict[str, Any]:
    own = backend_of(target.architecture).facts(target)
    return {"version": tensorwright.__version__, "target": asdict(target), **own,
            "tokens_per_block": options.tokens_per_block, "exact": options.exact,
            "fp8_activations": options.fp8_activations, "dummy_weights": options.dummy_weights}


def _check_space(jobs: list[_Job]) -> None:
    """Packed weights are about as large as the checkpoint's: refuse before hours of work, not after."""
    needed = sum((job.checkpoint_dir / f"rank{job.rank}.safetensors").stat().st_size for job in jobs
                 if not job.dummy_weights)
    free = shutil.disk_usage(jobs[0].output.parent).free if jobs else 0
    if needed > free:
        raise BuildError(f"the engine needs about {needed / 1e9:.1f} GB, {jobs[0].output.parent} has "
                         f"{free / 1e9:.1f} GB free", mend="give an --output_dir with more room")


def _dry_run(options: BuildOptions, config: CheckpointConfig, target: Target, limits: Limits,
             notes: list[str]) -> BuildReport:
    from tensorwright.builder.plan import choose

    for rank in range(config.tp_size):
        program = program_of(config, options.tokens_per_block, rank, exact=options.exact,
                             fp8_activations=options.fp8_activations, target=target)
        choose(program, target, backend_of(target.architecture).kernels)
    return BuildReport(limits=limits, notes=tuple(notes))
