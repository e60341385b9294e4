"""The engines and steps that GPU kernels are tested with, on a GPU and in the simulator. Nothing is built here."""

from __future__ import annotations

from tensorwright.checkpoint.config import Algorithm
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
