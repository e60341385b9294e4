"""The binary interface of a CPU engine's shared object, in ctypes: `native/abi.h` line by line.

The builder runs kernels through it to time them, the runtime to use them. It knows no engine and no program.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

ABI_VERSION = 1

_ints = ctypes.c_void_p


class Run(ctypes.Structure):
    """tw_run: one forward step."""

    _fields_ = [
        ("num_tokens", ctypes.c_int32), ("num_sequences", ctypes.c_int32), ("num_outputs", ctypes.c_int32),
        ("table_width", ctypes.c_int32), ("token_ids", _ints), ("positions", _ints), ("slots", _ints),
        ("query_starts", _ints), ("query_lengths", _ints), ("kv_lengths", _ints), ("block_tables", _ints),
        ("output_rows", _ints), ("scratch", ctypes.c_void_p), ("comm", ctypes.c_void_p)]


class Step(ctypes.Structure):
    """tw_step: one op of the plan."""

    _fields_ = [("kernel", ctypes.c_void_p), ("buffers", ctypes.c_void_p), ("weights", ctypes.c_void_p),
                ("rows", ctypes.c_int32), ("reserved", ctypes.c_int32)]


class Sampling(ctypes.Structure):
    """tw_sampling: how one row of logits becomes a token."""

    _fields_ = [
        ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32), ("repetition_penalty", ctypes.c_float), ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float), ("uniform", ctypes.c_float), ("num_seen", ctypes.c_int32),
        ("num_biased", ctypes.c_int32), ("seen", _ints), ("counts", _ints), ("biased", _ints), ("biases", _ints)]


def aligned(num_bytes: int, alignment: int = 64) -> NDArray[np.uint8]:
    """Zeroed bytes at an aligned address. Pages are taken from the system when they are first written."""
    raw = np.zeros(num_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start:start + num_bytes]


def addresses(pointers: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    """A C array of pointers, 0 being null; at least one element long."""
    return (ctypes.c_void_p * max(1, len(pointers)))(*(pointer or None for pointer in pointers))
