"""What passes may know besides the program: quantisation and ranks. It knows no machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """Quantisation of the checkpoint, and which rank of how many the program is for."""

    algorithm: str | None = None  # None, "W8A16", "W4A16" or "FP8_PER_CHANNEL_PER_TOKEN"
    group_size: int = -1  # of int4 weights; −1: one scale per output row
    quantize_lm_head: bool = False
    scale_dtype: str = "float16"
    activation_group: int = 128  # inputs that share a scale when activations are rounded to int8; 0: never rounded
    float8_rows: int = 0  # from so many rows on, activations of float8 weights are rounded to float8; 0: never
    int4_float8_rows: int = 0  # the same of int4 weights, which are rounded with them
    tp_size: int = 1
    rank: int = 0
    num_kv_heads: int = 0  # of the whole model
