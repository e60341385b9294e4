"""Rotary settings in both styles of config.json: rope_theta and rope_scaling, or rope_parameters. It knows no families.

A key of `rope_scaling` or `rope_parameters` wins over the same key beside it, as in transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from tensorwright.errors import ModelError
from tensorwright.models.config import Rope, RopeKind

_REQUIRED = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
             "yarn": ("factor",)}
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
_SEE_CONFIG = "python3 -m json.tool MODEL_DIR/config.json"


def read_rope(fields: Mapping[str, Any]) -> Rope:
    """Theta, kind and that kind's numbers. Raises ModelError for kinds that are not supported."""
    values = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
        raise ModelError("config.json gives rotary settings per kind of layer, expected one set for all layers",
                         mend=_SEE_CONFIG)
    kind: RopeKind = values.get("rope_type") or values.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise ModelError(f"rotary scaling of kind {kind!r} is not supported, expected one of "
                         f"{', '.join(get_args(RopeKind))}", mend=_SEE_CONFIG)
    share = values.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise ModelError(f"config.json rotates a share of {share} of each head, expected the whole head",
                         mend=_SEE_CONFIG)
    theta = values.get("rope_theta") or fields.get("rope_theta") or 10000.0
    return Rope(_number("rope_theta", theta), kind, scaling=_scaling(kind, values, fields))


def _scaling(kind: str, values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, float]:
    scaling = {name: float(values[name]) for name in _OPTIONAL.get(kind, ()) if values.get(name) is not None}
    if kind in ("llama3", "yarn"):
        context = (fields.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
                   or fields["max_position_embeddings"])
        scaling["original_max_position_embeddings"] = _number("original_max_position_embeddings", context)
        if kind == "yarn" and values.get("factor") is None:
            values = {**values, "factor": fields["max_position_embeddings"] / context}
    for name in _REQUIRED[kind]:
        scaling[name] = _number(name, values.get(name))
    return scaling


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"the rotary settings in config.json have {name} = {value!r}, expected a number above 0",
                         mend=_SEE_CONFIG)
    return float(value)
