"""The reference executor: runs any program, before or after any pass, in NumPy.

It is the meaning of `ops.OPS` in code: clear, float32, and slow. It knows no kernel and no layout; quantised weights
come as codes and scales, and are multiplied out. Activations are rounded to 8 bits where an op's attributes say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorwright.program.ops import OPS
from tensorwright.program.program import Op, Program

Array = NDArray[Any]
FLOAT8, LARGEST_FLOAT8 = ml_dtypes.float8_e4m3fn, np.float32(448)
SMALLEST = np.float32(2.0**-100)


class Communicator(NamedTuple):
    """Sums and gathers over ranks, for programs of several ranks."""

    all_reduce: Callable[[Array], Array]
    all_gather: Callable[[Array], Array]


def run(program: Program, buffers: dict[str, Array], weights: Mapping[str, Array],
        communicator: Communicator | None = None) -> dict[str, Array]:
    """Run all ops over `buffers` (batch inputs and caches, changed in place) and give every buffer back."""
    for op in program.ops:
        buffers.update(run_op(op, buffers, {role: weights[name] for role, name in op.weights.items()}, communicator))
    return buffers


def run_op(op: Op, buffers: Mapping[str, Array], weights: Mapping[str, Array],
           communicator: Communicator | None = None) -> dict[str, Array]:
    """Outputs of one op. `weights` by role, float32 and already multiplied out. Caches are changed in place."""
    spec = OPS[op.kind]
    inputs = {name.rstrip("?"): buffers[given] for name, given in zip(spec.inputs, op.inputs, strict=False)}
    if op.kind in ("all_reduce", "all_gather"):
        x = inputs["x"]
        if communicator is not None:
            x = communicator.all_reduce(x) if op.kind == "all_reduce" else communicator.all_gather(x)
        return {op.outputs[0]: x.copy()}
    result = _IMPLEMENTATIONS[op.kind](inputs, weights, op.attributes)
    results = result if isinstance(result, tuple) else (result,)
    return {name: value for name, value in zip(op.outputs, results, strict=False) if value is not None}


def dequantize(codes: Array, scales: Array, dtype: str) -> Array:
    """float32 [out, in] of neutral codes: int4 uint8 [out, in/2] (low nibble first, minus 8), or [out, in]."""
    if dtype == "int4":
        nibbles = np.stack((codes & 15, codes >> 4), axis=-1).reshape(codes.shape[0], -1)
        codes = nibbles.astype(np.int8) - np.int8(8)
    scales = scales.astype(np.float32).reshape(codes.shape[0], -1)
    grouped = codes.reshape(codes.shape[0], scales.shape[1], -1).astype(np.float32)
    return np.asarray((grouped * scales[:, :, None]).reshape(codes.shape))


def round_to_int8(x: Array, group: int) -> Array:
    """float32 [rows, K] after rounding each group of a row to int8 and back: scale max|x| / 127, ties to even."""
    out = np.empty_like(x)
    for start in range(0, x.shape[1], group):
        part = x[:, start:start + group]
        largest = np.abs(part).max(axis=1, keepdims=True).astype(np.float32)
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
        out[:, start:start + group] = np.rint(part * inverse) * (largest / np.float32(127))
    return out


def to_float8(x: Array) -> Array:
    """float8_e4m3 of float32: ties to even, and what is larger becomes ±448."""
    return np.asarray(np.clip(x, -LARGEST_FLOAT8, LARGEST_FLOAT8).astype(FLOAT8))


def round_to_float8(x: Array) -> Array:
    """float32 [rows, K] after rounding each row to float8_e4m3 and back, with the scale max|x| / 448.

    Rows whose numbers are all below `SMALLEST` become zeros: the scale's reciprocal would overflow.
    """
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float32)
    largest[largest < SMALLEST] = 0
    inverse = np.divide(LARGEST_FLOAT8, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.asarray(to_float8(x * inverse).astype(np.float32) * (largest / LARGEST_FLOAT8))


def round_to_bits(x: Array, bits: int) -> Array:
    """So many significant bits of each number, ties to even: 4 are float8_e4m3's, whatever power of two scales it."""
    mantissa, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.rint(mantissa * np.float32(2**bits)), exponent - bits), dtype=np.float32)


def activate(x: Array, function: str) -> Array:
    """silu, gelu by erf, or gelu by tanh."""
    if function == "silu":
        return np.asarray(x / (1 + np.exp(-np.clip(x, -80, None))))
    if function == "gelu":
        from math import erf

        return np.asarray(x * 0.5 * (1 + np.vectorize(erf, otypes=[np.float32])(x / np.float32(np.sqrt(2)))))
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), dtype=x.dtype)


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """Root mean square norm over the last axis (Zhang and Sennrich, 2019)."""
    mean = np.mean(np.square(x, dtype=np.float32), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean + np.float32(epsilon)) * weight, dtype=np.float32)


def rotate(x: Array, positions: Array, frequencies: Array, factor: float) -> Array:
    """Rotary embedding (Su et al., 2021) of x [T, heads, head_size]: pairs (i, i + F), F = len(frequencies)."""
    angles = positions[:, None].astype(np.float64) * frequencies.astype(np.float64)[None, :]
    cos, sin = ((f(angles) * factor).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    half = frequencies.shape[0]
    first, second = x[..., :half], x[..., half:2 * half]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, x[..., 2 * half:]), axis=-1)


def write_cache(x: Array, slots: Array, kv: Array, scales: Array | None, which: int) -> None:
    """Store x [T, kv_heads, head_size] as keys (0) or values (1)."""
    keep = slots >= 0
    block, offset = slots[keep] // kv.shape[3], slots[keep] % kv.shape[3]
    x = x[keep]
    if scales is not None:
        largest = np.abs(x).max(axis=-1).astype(np.float32)
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
        scales[block, which, :, offset] = largest / np.float32(127)
        x = np.rint(x * inverse[..., None])
    kv[block, which, :, offset] = to_float8(x) if kv.dtype == FLOAT8 else x.astype(kv.dtype)


def _rms_norm(i: Mapping[str, Array], w: Mapping[str, Array], a: Mapping[str, Any]) -> Array:
    x = i["x"]
    heads = x.reshape(x.shape[0], -1, a["head_size"] or x.shape[1])
    return rms_norm(heads, w["weight"], a["epsilon"]).reshape(x.shape)


def _linear(i: Mapping[str, Array], w: Mapping[str, Array], a: Mapping[str, Any]) -> Array:
    x = i["x"]
    if "norm" in w:
        x = rms_norm(x, w["norm"], a["norm_epsilon"])
    if a["gate"]:
        half = x.shape[1] // 2
        x = activate(x[:, :half], a["gate"]) * x[:, half:]
    if a["activation_group"] > 0:
        x = round_to_int8(np.asarray(x, dtype=np.float32), a["activation_group"])
    weight = w["weight"]
    if 0 < a["float8_rows"] <= x.shape[0]:
        x = round_to_float8(np.asarray(x, dtype=np.float32))
        weight = round_to_bits(weight, a["weight_bits"]) if a["weight_bits"] else weight
    y = x @ weight.T
    y = y + w["bias"] if "bias" in w else y
    return np.asarray(y + i["residual"] if "residual" in i else y, dtype=np.float32)


def _rope(i: Mapping[str, Array], w: Mapping[str, Array], a: Mapping[str, Any]) -> Array:
    x = i["x"].reshape(i["x"].shape[0], -1, a["head_size"])
    return rotate(x, i["positions"], w["inverse_frequencies"], a["attention_factor"]).reshape(i["x"].shape)


def _cache_write(i: Mapping[str, Array], w: Mapping[str, Array], a: Mapping[str, Any]) -> tuple[Array, Array | None]:
    for which, name in enumerate(("k", "v")):
        heads = i[name].reshape(-1, a["num_kv_heads"], a["head_size"])
        write_cache(heads, i["slots"], i["kv"], i.get("kv_scales"), which)
    return i["kv"], i.get("kv_scales")


def _rope_cache(i: Mapping[str, Array], w: Mapping[str, Array],
                a: Mapping[str, Any]) -> tuple[Array, Array, Array | None]:
    heads, kv_heads = a["num_heads"], a["num_kv_heads"]
    qkv = i["qkv"].reshape(i["qkv"].shape[0], heads + 2 * kv_heads, a["head_size"])
    q, k, v = qkv[:, :heads], qkv[:, heads:heads + kv_heads], qkv[:, heads + kv_heads:]
    if "q_norm" in w:
        q, k = rms_norm(q, w["q_norm"], a["norm_epsilon"]), rms_norm(k, w["k_norm"], a["norm_epsilon"])
    q, k = (rotate(x, i["positions"], w["inverse_frequencies"], a["attention_factor"]) for x in (q, k))
    write_cache(k, i["slots"], i["kv"], i.get("kv_scales"), 0)
    write_cache(v, i["slots"], i["kv"], i.get("kv_scales"), 1)
    return q.reshape(q.shape[0], -1), i["kv"], i.get("kv_scales")


def _attention(i: Mapping[str, Array], w: Mapping[str, Array], a: Mapping[str, Any]) -> Array:
    q, kv, scales = i["q"], i["kv"], i.get("kv_scales")
    block_size, group = kv.shape[3], a["num_heads"] // a["num_kv_heads"]
    y = np.zeros_like(q)
    for s in range(i["query_starts"].shape[0]):
        start, count, length = (int(i[n][s]) for n in ("query_starts", "query_lengths", "kv_lengths"))
        cached = np.arange(length)
        blocks, offsets = i["block_tables"][s, cached // block_size], cached % block_size
        kv_rows = kv[blocks, :, :, offsets].astype(np.float32)  # [length, 2, kv_heads, head_size]
        if scales is not None:
            kv_rows = kv_rows * scales[blocks, :, :, offsets][..., None]
        keys, values = (np.repeat(kv_rows[:, which], group, axis=1) for which in (0, 1))
        heads = q[start:start + count].reshape(count, a["num_heads"], a["head_size"])
        scores = np.einsum("qhd,khd->hqk", heads, keys) * np.float32(a["scale"])
        own = np.arange(length - count, length)[:, None]
        visible = cached[None, :] <= own
        if a["window"] > 0:
            visible &= cached[None, :] > own - a["window"]
        scores = np.where(visible[None], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y[start:start + count] = np.einsum("hqk,khd->qhd", weights, values).reshape(count, -1)
    return y


_IMPLEMENTATIONS: dict[str, Callable[[Mapping[str, Array], Mapping[str, Array], Mapping[str, Any]], Any]] = {
    "embedding": lambda i, w, a: w["table"][i["token_ids"]].astype(np.float32),
    "rms_norm": _rms_norm,
    "linear": _linear,
    "rope": _rope,
    "cache_write": _cache_write,
    "rope_cache": _rope_cache,
    "attention": _attention,
    "activation": lambda i, w, a: activate(i["x"], a["function"]),
    "multiply": lambda i, w, a: i["a"] * i["b"],
    "add": lambda i, w, a: i["a"] + i["b"],
    "slice": lambda i, w, a: i["x"][:, a["start"]:a["start"] + a["size"]].copy(),
    "gather_rows": lambda i, w, a: i["x"][i["output_rows"]],
}
