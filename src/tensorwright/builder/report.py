"""What a build tells afterwards, and the config.json it leaves. It knows engines only as files that were written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tensorwright
from tensorwright.builder.limits import opt_num_tokens
from tensorwright.builder.options import BuildOptions
from tensorwright.engine.config import read_config
from tensorwright.engine.engine import Engine
from tensorwright.engine.format import Reader
from tensorwright.engine.limits import Limits


@dataclass(frozen=True)
class BuildReport:
    """Sizes are of rank 0, in bytes; activations are for a step of max_num_tokens, scratch memory not counted."""

    limits: Limits
    notes: tuple[str, ...] = ()
    engine_bytes: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    kv_bytes_per_token: int = 0
    build_s: float = 0.0
    reused: bool = False
    architecture: str = ""
    tuning: Mapping[str, Any] = field(default_factory=dict)  # `tuning_facts`, of rank 0


def report_on(folder: Path, limits: Limits, notes: list[str], build_s: float, *, reused: bool) -> BuildReport:
    """Read what was built, which checks its manifest, and measure it. It may be for another machine than this."""
    engine = Engine(Reader(folder / "rank0.engine"), read_config(folder), folder)
    rows = {"tokens": limits.max_num_tokens, "outputs": limits.max_batch_size * limits.max_beam_width}
    activations = sum(rows[symbol] * columns * 4 for symbol, columns in engine.manifest["memory"]["slots"])
    return BuildReport(limits, tuple(notes), engine.reader.path.stat().st_size, engine.weight_bytes, activations,
                       engine.kv_bytes_per_token, build_s, reused, engine.metadata["architecture"],
                       engine.manifest.get("tuning", {}))


def engine_config(options: BuildOptions, limits: Limits, checkpoint_config: Mapping[str, Any],
                  key: str) -> dict[str, Any]:
    """config.json in upstream's form: version, pretrained_config, build_config."""
    dtype = checkpoint_config.get("dtype", "float16")
    plugins = {
        "dtype": dtype, "gpt_attention_plugin": dtype, "gemm_plugin": None, "nccl_plugin": None, "context_fmha": True,
        "paged_kv_cache": True, "remove_input_padding": True, "use_paged_context_fmha": True, "enable_xqa": True,
        "tokens_per_block": options.tokens_per_block, "use_fused_mlp": True, "paged_state": False}
    return {
        "version": tensorwright.__version__,
        "build_key": key,
        "pretrained_config": {**checkpoint_config, "logits_dtype": limits.logits_dtype},
        "build_config": {
            **asdict(limits), "opt_batch_size": limits.max_batch_size,
            "opt_num_tokens": opt_num_tokens(options, limits), "kv_cache_type": "PAGED",
            "tokens_per_block": options.tokens_per_block, "exact": options.exact,
            "fp8_activations": options.fp8_activations,
            "profiling_verbosity": options.profiling_verbosity,
            "max_prompt_embedding_table_size": 0, "max_draft_len": 0, "speculative_decoding_mode": 1,
            "strongly_typed": True, "plugin_config": plugins},
    }
