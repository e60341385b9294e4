"""Tiny engines for tests: a recipe goes through the real convert and build. Compiled kernels are cached by content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorwright.builder.build import build
from tensorwright.builder.options import BuildOptions
from tensorwright.checkpoint.config import Algorithm, KvCache, Quantization
from tensorwright.checkpoint.convert import ConvertOptions, DType, convert
from tensorwright.cli.main import main
from tensorwright.testing.tiny import TinyModel, config, write_model

INT4 = ("--use_weight_only", "--weight_only_precision", "int4")


@dataclass(frozen=True)
class Recipe:
    """A tiny model and how it is converted and built."""

    model: TinyModel = field(default_factory=TinyModel)
    dtype: DType = "float32"
    algorithm: Algorithm | None = None
    group_size: int = 32
    int8_kv_cache: bool = False
    fp8_kv_cache: bool = False
    quantize_lm_head: bool = False
    tp_size: int = 1
    build: dict[str, Any] = field(default_factory=dict)


def convert_tiny(recipe: Recipe, folder: Path) -> Path:
    """Write the model, unless the folder holds one, and convert it; gives the checkpoint folder."""
    model = folder / "model"
    if not model.exists():
        write_model(model, recipe.model)
    kv_cache: KvCache | None = "FP8" if recipe.fp8_kv_cache else "INT8" if recipe.int8_kv_cache else None
    quantization = Quantization(recipe.algorithm, recipe.group_size, kv_cache, recipe.quantize_lm_head)
    options = ConvertOptions(dtype=recipe.dtype, quantization=quantization, tp_size=recipe.tp_size)
    convert(model, folder / "checkpoint", options, _quiet)
    return folder / "checkpoint"


def build_engine(recipe: Recipe, folder: Path) -> Path:
    """The engine folder of a recipe; the model's and checkpoint's folders lie beside it."""
    checkpoint = convert_tiny(recipe, folder)
    limits = {"target": "cpu", "max_seq_len": 64, "max_batch_size": 4, "tokens_per_block": 16, "no_tune": True,
              **recipe.build}
    build(BuildOptions(checkpoint_dir=checkpoint, output_dir=folder / "engine", **limits), _quiet)
    return folder / "engine"


def build_dummy(model: TinyModel, folder: Path, dtype: DType, flags: Sequence[str] = INT4, **options: Any) -> Path:
    """An engine of the model's shape with random weights, int4 by default: nothing but its config.json is converted."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(config(model)))
    main(["convert", "--model_dir", str(folder / "model"), "--output_dir", str(folder / "checkpoint"), "--dtype", dtype,
          "--save_config_only", *flags])
    build(BuildOptions(checkpoint_dir=folder / "checkpoint", output_dir=folder / "engine", dummy_weights=True,
                       no_tune=True, **options), _quiet)
    return folder / "engine"


def _quiet(size: int, what: str) -> None:
    """Nobody watches a test's progress."""
