"""What a build is asked to do. It knows no command line (that is made from these fields) and derives nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Verbosity = Literal["layer_names_only", "detailed", "none"]


def _option(default: Any, help: str, *flags: str) -> Any:  # noqa: A002 - argparse's own name
    return field(default=default, metadata={"help": help, "flags": flags})


@dataclass(frozen=True)
class BuildOptions:
    """None means: derived, as `builder.limits` tells. Counts are of tokens unless named otherwise."""

    checkpoint_dir: Path | None = _option(None, "checkpoint folder: config.json and rank*.safetensors")
    output_dir: Path = _option(Path("engine_outputs"), "engine folder; created, and files in it replaced when whole")
    target: str = _option("native", "machine to build for: native (its GPU, if it has one), cpu, x86-64-v3, x86-64-v4, "
                                      "aarch64, portable, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120")
    dummy_weights: bool = _option(
        False, "random weights, for benchmarks: the checkpoint needs a config.json only (convert --save_config_only)")
    exact: bool = _option(False, "activations stay float32 in linears with quantised weights; slower")
    fp8_activations: bool = _option(
        False, "int4 weights times float8 activations, both in float8, in steps of many tokens: faster prompts (sm_90)")
    workers: int = _option(1, "ranks built at the same time")
    rebuild_kernels: Path | None = _option(
        None, "an engine folder whose kernels are compiled again, without its checkpoint")

    no_tune: bool = _option(False, "measure nothing: kernels' tactics by known times and rules")
    input_timing_cache: Path | None = _option(
        None, "file with times measured earlier, here or on the target machine (default: in the cache folder)")
    output_timing_cache: Path | None = _option(None, "file to add this build's times to (default: in the cache folder)")

    max_batch_size: int = _option(64, "sequences in one step")
    max_seq_len: int | None = _option(
        None, "prompt and new tokens of one sequence (default: what the model was made for)", "--max_decoder_seq_len")
    max_input_len: int | None = _option(None, "longest prompt; holds only without padding removal or context FMHA "
                                              "(default: one less than max_seq_len)")
    max_num_tokens: int | None = _option(
        None, "tokens in one step; longer prompts go in chunks (default: 2048, or less where limits are lower)")
    opt_num_tokens: int | None = _option(None, "kept in config.json; tactics are chosen for every size of step "
                                               "(default: batch x beams, at most max_num_tokens)")
    max_beam_width: int = _option(1, "beams of one request")
    tokens_per_block: int = _option(64, "tokens in one block of the KV cache: a power of two, 8 or more")

    gather_context_logits: bool = _option(False, "let requests ask for the logits of their prompt")
    gather_generation_logits: bool = _option(False, "let requests ask for the logits of their new tokens")
    logits_dtype: Literal["float16", "float32"] | None = _option(
        None, "dtype of logits given to users (default: float32)")
    profiling_verbosity: Verbosity = _option("layer_names_only", "what `bench --profile` can name")
    dry_run: bool = _option(False, "derive and check everything, compile and write nothing")

    remove_input_padding: bool = True  # these two are always so here; turned off, max_input_len is held to
    context_fmha: bool = True
