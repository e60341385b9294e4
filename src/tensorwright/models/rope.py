"""Inverse frequencies of rotary embeddings for the scaling kinds that decoders use. It knows no tensors.

Sources: Su et al. 2021 (RoPE); linear scaling by Chen et al. 2023; YaRN by Peng et al. 2023; llama3 as the
`rope_scaling` fields of Meta's Llama 3.1 config.json define it.
"""

from __future__ import annotations

import math

from tensorwright.models.config import Rope


def inverse_frequencies(rope: Rope, head_size: int) -> tuple[float, ...]:
    """Radians per position for each rotated pair; half as many as rotated columns."""
    size = rope.rotary_size or head_size
    plain = [rope.theta ** (-2 * i / size) for i in range(size // 2)]
    if rope.kind == "linear":
        return tuple(f / rope.scaling["factor"] for f in plain)
    if rope.kind == "llama3":
        return tuple(_llama3(f, rope.scaling) for f in plain)
    if rope.kind == "yarn":
        return _yarn(plain, rope, size)
    return tuple(plain)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by: 1, except for YaRN."""
    if rope.kind != "yarn":
        return 1.0
    scaling = rope.scaling
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    factor = scaling["factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _magnitude(factor, scaling["mscale"]) / _magnitude(factor, scaling["mscale_all_dim"])
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequency: float, scaling: dict[str, float]) -> float:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(plain: list[float], rope: Rope, size: int) -> tuple[float, ...]:
    """Pairs that turn more than beta_fast times over the original context are kept, slow ones are interpolated."""
    scaling = rope.scaling
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.get("beta_fast", 32.0)), pair_of(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = max(high - low, 0.001)
    slowed = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    return tuple(f / factor * s + f * (1 - s) for f, s in zip(plain, slowed, strict=True))
