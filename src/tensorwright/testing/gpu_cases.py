"""The engines and steps that GPU kernels are tested with, on a GPU and in the simulator. Nothing is built here."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorwright.checkpoint.config import Algorithm
from tensorwright.runtime.batch import SamplingRow
from tensorwright.testing.engines import Recipe
from tensorwright.testing.tiny import TinyModel

LENGTHS = (20, 13, 30, 1, 47, 16, 17, 5, 33, 2)  # of sequences, in blocks of 16
STEPS = {"prompts": LENGTHS, "one token": (1,), "three": (1, 1, 1), "eight": (1,) * 8, "ten": (1,) * 10,
         "mixed": (20, 1, 7, 1, 33)}
FP8: Algorithm = "FP8_PER_CHANNEL_PER_TOKEN"
RECIPES = {
    "int4 float16, heads of 128": Recipe(TinyModel("mistral", head_size=128), "float16", "W4A16", 128),
    "int4 bfloat16, groups of 32, int8 cache": Recipe(
        TinyModel("llama", attention_bias=True, mlp_bias=True), "bfloat16", "W4A16", 32, int8_kv_cache=True,
        quantize_lm_head=True),
    "int8 bfloat16, window": Recipe(TinyModel("qwen2", sliding_window=9), "bfloat16", "W8A16"),
    "int8 float16, head norms, int8 cache": Recipe(TinyModel("qwen3", head_size=16), "float16", "W8A16",
                                                   int8_kv_cache=True),
    "float8 float16, heads of 128": Recipe(TinyModel("mistral", head_size=128), "float16", FP8, quantize_lm_head=True),
    "float8 bfloat16, float8 cache": Recipe(TinyModel("qwen2", sliding_window=9), "bfloat16", FP8, fp8_kv_cache=True),
    "bfloat16": Recipe(TinyModel("mistral", hidden_size=192, intermediate_size=320, vocab_size=331), "bfloat16"),
}
BOUNDS = {"float16": 4e-3, "bfloat16": 3e-2}  # some roundings of inputs and weights to the type, and sums of them

# Steps of many tokens: (tokens, tokens before them) of each sequence. Prompts, pieces of them, single tokens, mixtures.
MANY_TOKENS = {
    "nine": ((9, 0),), "a prompt": ((129, 0),), "prompts": ((20, 0), (13, 0), (30, 0), (1, 0), (47, 0)),
    "pieces": ((64, 70), (3, 200), (33, 16)), "mixed": ((1, 40), (77, 0), (1, 130), (5, 11), (1, 3)),
    "single tokens": tuple((1, n) for n in (5, 200, 17, 64, 1, 2, 3, 90, 33, 41))}
_SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 512}
MANY_TOKENS_RECIPES = {
    "int4 float16, heads of 128": Recipe(TinyModel("mistral", head_size=128, **_SIZES), "float16", "W4A16", 128),
    "int4 bfloat16, biases, int8 cache": Recipe(TinyModel("llama", attention_bias=True, mlp_bias=True, **_SIZES),
                                                "bfloat16", "W4A16", 32, int8_kv_cache=True),
    "int8 float16, head norms, int8 cache": Recipe(TinyModel("qwen3", head_size=64, **_SIZES), "float16", "W8A16",
                                                   int8_kv_cache=True),
    "float8 float16, float8 cache": Recipe(TinyModel("mistral", head_size=128, **_SIZES), "float16", FP8,
                                           fp8_kv_cache=True),
    "int4 bfloat16, multiplied in float8": Recipe(TinyModel("mistral", head_size=64, **_SIZES), "bfloat16", "W4A16", 64,
                                                  build={"fp8_activations": True}),
    "bfloat16, window": Recipe(TinyModel("qwen2", sliding_window=9, **_SIZES), "bfloat16"),
}
ROUNDED = 0.12  # float8: NumPy and the ops differ by half of that, and each of them by 0.1 from products of float32


def many_tokens_bound(recipe: Recipe) -> float:
    """What a step of many tokens may differ by, relative to the largest number: products are rounded to the type."""
    is_float8 = recipe.algorithm == FP8 or "fp8_activations" in recipe.build
    return ROUNDED if is_float8 else {"float16": 6e-3, "bfloat16": 5e-2}[recipe.dtype]


def cache_step(recipe: Recipe) -> float:
    """What a cache of 8-bit numbers may differ by where a rounding falls to the other side."""
    return 2.0 if recipe.int8_kv_cache else 0.5 if recipe.fp8_kv_cache else 0.0


def random_row(random: np.random.Generator, vocab_size: int) -> SamplingRow:
    """Any way to draw a token: temperatures, filters, penalties and biases, each on or off."""
    seen = random.choice(vocab_size, 9, replace=False).astype(np.int32) if random.random() < 0.3 else ()
    biased = (3, 4) if random.random() < 0.3 else ()
    return SamplingRow(
        temperature=float(random.choice([0.0, 0.5, 1.0, 2.0])), top_k=int(random.choice([0, 1, 7, 50])),
        top_p=float(random.choice([1.0, 0.9, 0.3])), min_p=float(random.choice([0.0, 0.05])),
        repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2,
        uniform=float(random.integers(0, 1 << 24)) * 2.0**-24, seen=seen,
        counts=random.integers(0, 3, 9).astype(np.int32) if len(seen) else (), biased=biased,
        biases=(float("-inf"), 1.5) if biased else ())
