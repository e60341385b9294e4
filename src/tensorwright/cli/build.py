"""`tensorwright build` and `trtllm-build`: from options of any version to a build, and its result as tables.

It knows what the flags mean here; limits are derived by `builder.limits`, and the work is done by `builder.build`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwright.builder.options import BuildOptions
from tensorwright.cli.options import Parser, add_fields, add_switch, from_arguments, note
from tensorwright.cli.upstream_flags import add_upstream_flags
from tensorwright.errors import UsageError

if TYPE_CHECKING:
    from tensorwright.builder.report import BuildReport

LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug")
QUIET_LEVELS = ("internal_error", "error")
OLD_MAX_INPUT_LEN = 1024  # the default of the versions that had --max_output_len
KV_FRACTION = 0.9  # of the memory that is left, as the runtime takes it
FOR_EVERY_BUILD = ("checkpoint_dir", "output_dir", "workers", "rebuild_kernels", "dry_run")


def configure(parser: Parser) -> None:
    """All flags of `trtllm-build`, and our own."""
    add_fields(parser, BuildOptions)
    add_switch(parser, "--gather_all_token_logits", default=False,
               help="the same as --gather_context_logits --gather_generation_logits")
    parser.add_argument("--kv_cache_type", choices=("continuous", "paged", "disabled"), type=str.lower,
                        help="always paged; continuous is read as paged")
    add_switch(parser, "--paged_kv_cache", help="always enabled: the older way to say --kv_cache_type paged")
    for name in ("remove_input_padding", "context_fmha"):
        add_switch(parser, f"--{name}", default=True, help="always so; with disable, max_input_len is held to")
    parser.add_argument("--max_output_len", type=int,
                        help="the older way to say max_seq_len: max_input_len and this together")
    parser.add_argument("--build_config", type=Path, metavar="FILE",
                        help="JSON with limits; they replace those of the command line")
    parser.add_argument("--timing_cache", type=Path, metavar="FILE",
                        help="the same FILE for --input_timing_cache and --output_timing_cache")
    parser.add_argument("--log_level", choices=LOG_LEVELS, type=str.lower, default="info", help="error hides notes")
    add_upstream_flags(parser)


def main(arguments: argparse.Namespace) -> int:
    """Build, and say what came out."""
    options = make_options(arguments)
    say = _silence if arguments.log_level in QUIET_LEVELS else print
    for field in fields(options):
        value = getattr(options, field.name)
        if value is not None and field.name not in FOR_EVERY_BUILD:
            say(f"Set {field.name} to {value}.")
    said = _announce_limits(options, say)
    started = time.monotonic()
    report = _build(options)
    for text in report.notes:
        if text not in said:
            say(text)
    _print_result(options, report, time.monotonic() - started)
    return 0


def make_options(arguments: argparse.Namespace) -> BuildOptions:
    """The build that a parsed command line means. UsageError where it contradicts itself."""
    chosen = dict(vars(arguments))
    if arguments.build_config is not None:
        from tensorwright.cli.build_config import read_build_config

        replaced, num_left = read_build_config(arguments.build_config)
        chosen.update(replaced)
        if num_left:
            note(f"{num_left} other settings of {arguments.build_config} have no effect here")
    _check_kv_cache(chosen["kv_cache_type"], chosen["paged_kv_cache"])
    if chosen["gather_all_token_logits"]:
        chosen["gather_context_logits"] = chosen["gather_generation_logits"] = True
    if arguments.max_output_len is not None:
        chosen["max_seq_len"] = _old_max_seq_len(chosen)
    _check_source(chosen)
    if arguments.timing_cache is not None:
        _take_timing_cache(chosen, arguments.timing_cache)
    return from_arguments(BuildOptions, argparse.Namespace(**chosen))


def _check_kv_cache(kind: str | None, paged: bool | None) -> None:
    if kind == "disabled":
        raise UsageError("--kv_cache_type disabled is not supported: every engine here generates from a KV cache",
                         mend="--kv_cache_type paged")
    if kind is not None and paged is not None and paged != (kind == "paged"):
        raise UsageError(f"--paged_kv_cache {'enable' if paged else 'disable'} contradicts --kv_cache_type {kind}",
                         mend="give --kv_cache_type paged alone")
    if kind == "continuous" or paged is False:
        note("the KV cache is always paged, which serves the same requests with less memory")


def _old_max_seq_len(chosen: dict[str, Any]) -> int:
    total: int = (chosen["max_input_len"] or OLD_MAX_INPUT_LEN) + chosen["max_output_len"]
    if chosen["max_seq_len"] not in (None, total):
        raise UsageError(f"--max_seq_len {chosen['max_seq_len']} contradicts --max_output_len "
                         f"{chosen['max_output_len']}, which makes it {total}", mend="give --max_seq_len alone")
    return total


def _check_source(chosen: dict[str, Any]) -> None:
    """Exactly one of a checkpoint and an engine to rebuild."""
    checkpoint, engine = chosen["checkpoint_dir"], chosen["rebuild_kernels"]
    if checkpoint is None and engine is None:
        raise UsageError("--checkpoint_dir is missing", mend="--checkpoint_dir C, made by tensorwright convert")
    if checkpoint is not None and engine is not None:
        raise UsageError("--checkpoint_dir and --rebuild_kernels exclude each other: "
                         "the second takes the weights from an engine")
    if engine is not None and chosen["output_dir"] == BuildOptions.output_dir:
        chosen["output_dir"] = engine


def _take_timing_cache(chosen: dict[str, Any], file: Path) -> None:
    for name in ("input_timing_cache", "output_timing_cache"):
        if chosen[name] not in (None, file):
            raise UsageError(f"--timing_cache {file} contradicts --{name} {chosen[name]}",
                             mend="give --input_timing_cache and --output_timing_cache alone")
        chosen[name] = file


def _announce_limits(options: BuildOptions, say: Callable[[str], None]) -> list[str]:
    """Derive the limits once before the work, so that their notes come first; the lines that were said."""
    if options.checkpoint_dir is None:
        return []
    from tensorwright.builder.limits import derive, rope_factor
    from tensorwright.checkpoint.config import read_config

    model = read_config(options.checkpoint_dir).model
    _, notes = derive(options, max_position_embeddings=model.max_position_embeddings,
                      rope_factor=rope_factor(model.rope.kind, model.rope.scaling))
    for text in notes:
        say(text)
    return notes


def _build(options: BuildOptions) -> BuildReport:
    from tensorwright.builder.build import build
    from tensorwright.cli.progress import Progress

    source = options.checkpoint_dir or options.rebuild_kernels or Path()
    pattern = "rank*.safetensors" if options.checkpoint_dir else "rank*.engine"
    with Progress("build", sum(path.stat().st_size for path in source.glob(pattern))) as progress:
        return build(options, progress.advance)


def _print_result(options: BuildOptions, report: BuildReport, total_s: float) -> None:
    from tensorwright.cli.tables import format_bytes, format_clock
    from tensorwright.cli.tactics import print_tactics

    limits = report.limits
    if not options.dry_run:
        if not report.reused:
            print_tactics(report.tuning, every_bucket=False)
        _print_memory(report)
    print(f"Longest prompt: {limits.max_input_len} tokens, in chunks of up to {limits.max_num_tokens} per step; "
          f"prompt and new tokens together at most {limits.max_seq_len}.")
    if report.reused:
        print("Kernels and weights were there already; only the limits are new.")
    print(f"Total time of building all engines: {format_clock(total_s)}")
    if options.dry_run:
        print("Dry run: nothing was written.")
    else:
        print(f"Engine: {options.output_dir} ({format_bytes(report.engine_bytes)} for each rank)")


def _print_memory(report: BuildReport) -> None:
    from tensorwright.cli.machine import available_bytes, free_gpu_bytes
    from tensorwright.cli.tables import format_bytes, print_table

    limits = report.limits
    available = free_gpu_bytes() if report.architecture == "cuda" else available_bytes()
    rows: list[tuple[str, ...]] = [
        ("weights", format_bytes(report.weight_bytes)),
        ("activations", format_bytes(report.activation_bytes), f"steps of {limits.max_num_tokens} tokens"),
        ("KV cache, one token", format_bytes(report.kv_bytes_per_token)),
        ("KV cache, longest sequence", format_bytes(report.kv_bytes_per_token * limits.max_seq_len),
         f"{limits.max_seq_len} tokens")]
    if available is None:  # built for a GPU, on a machine without one
        print_table("Memory of one rank", rows)
        return
    room = KV_FRACTION * (available - report.weight_bytes - report.activation_bytes)
    fit = max(0, int(room // max(1, report.kv_bytes_per_token)))
    print_table("Memory of one rank", [*rows, (
        "KV tokens that fit", str(fit),
        f"in {KV_FRACTION:.0%} of what the rest leaves of the {format_bytes(available)} free here now")])
    if fit < limits.max_seq_len:
        note(f"a sequence of {limits.max_seq_len} tokens needs more memory than is free here now")


def _silence(text: str) -> None:
    """Say nothing."""
