"""The families: what each architecture's config.json means, as data. It knows no weights and no files.

Where a field is absent, the family's own default counts, as in transformers' configuration classes: Mistral's window is
4096 unless the file says null, Qwen3's head size is 128. Both styles of config are read: rope_theta, rope_scaling and
torch_dtype of transformers 4, and rope_parameters and dtype of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from tensorwright.errors import ModelError
from tensorwright.models.config import Activation, ModelConfig
from tensorwright.models.rope_config import read_rope


@dataclass(frozen=True)
class Family:
    """One architecture. A bias is True, False, or the config field that decides.

    windows: "none"; "all": `sliding_window` is for every layer; "some": only where `layer_types` says so, or from layer
    `max_window_layers` on, and only with `use_sliding_window`.
    """

    architecture: str
    model_type: str
    qkv_bias: bool | str = False
    dense_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Literal["none", "all", "some"] = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = (
    Family("LlamaForCausalLM", "llama", "attention_bias", "attention_bias", "mlp_bias",
           defaults={"max_position_embeddings": 2048}),
    Family("MistralForCausalLM", "mistral", windows="all",
           defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, windows="some",
           defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32}),
    Family("Qwen3ForCausalLM", "qwen3", "attention_bias", "attention_bias", qk_norm=True, windows="some",
           defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, "head_dim": 128}),
)
_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 32768}
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
                                       "gelu_pytorch_tanh": "gelu_tanh"}
_DTYPES = ("float32", "float16", "bfloat16")
_SEE_CONFIG = "python3 -m json.tool MODEL_DIR/config.json"


def from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """One decoder's facts from the contents of its config.json. Raises ModelError, with what was expected."""
    family = _family(config)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"the weights are already quantised (quant_method {method!r}), expected float32, float16 or "
                         "bfloat16 weights", mend="fetch the unquantised upload of this model and convert that")
    fields = {**_DEFAULTS, **family.defaults, **config}
    hidden, layers, heads = (_count(fields, name) for name in ("hidden_size", "num_hidden_layers",
                                                               "num_attention_heads"))
    kv_heads = heads if fields.get("num_key_value_heads") is None else _count(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads cannot share {kv_heads} key and value heads evenly",
                         mend=_SEE_CONFIG)
    window, windowed_layers = _windows(family, fields, layers)
    return ModelConfig(
        architecture=family.architecture, dtype=cast(Literal["float32"], _dtype(fields)),
        vocab_size=_count(fields, "vocab_size"), hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_size=_head_size(fields, hidden, heads),
        intermediate_size=_count(fields, "intermediate_size"),
        max_position_embeddings=_count(fields, "max_position_embeddings"),
        norm_epsilon=_positive(fields, "rms_norm_eps"), activation=_activation(fields), rope=read_rope(fields),
        qkv_bias=_flag(family.qkv_bias, fields), dense_bias=_flag(family.dense_bias, fields),
        mlp_bias=_flag(family.mlp_bias, fields), qk_norm=family.qk_norm, sliding_window=window,
        windowed_layers=windowed_layers, tied_embeddings=bool(fields.get("tie_word_embeddings")))


def known_architectures() -> tuple[str, ...]:
    """The names that `architectures` in config.json may hold."""
    return tuple(family.architecture for family in FAMILIES)


def _family(config: Mapping[str, Any]) -> Family:
    """By `architectures`, or by `model_type` where that is absent."""
    architectures = config.get("architectures") or [None]
    for family in FAMILIES:
        if architectures[0] == family.architecture or (
                architectures[0] is None and config.get("model_type") == family.model_type):
            return family
    name = architectures[0] or config.get("model_type") or "none named"
    raise ModelError(f"the architecture ({name}) is not known, expected one of {', '.join(known_architectures())}",
                     mend=_SEE_CONFIG)


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json has {name} = {value!r}, expected a whole number above 0", mend=_SEE_CONFIG)
    return value


def _positive(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"config.json has {name} = {value!r}, expected a number above 0", mend=_SEE_CONFIG)
    return float(value)


def _flag(rule: bool | str, fields: Mapping[str, Any]) -> bool:
    return bool(fields.get(rule)) if isinstance(rule, str) else rule


def _dtype(fields: Mapping[str, Any]) -> str:
    """The dtype that the file declares; float32 where it declares none, as transformers takes it."""
    name = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"config.json declares dtype {name}, expected one of {', '.join(_DTYPES)}", mend=_SEE_CONFIG)
    return name


def _activation(fields: Mapping[str, Any]) -> Activation:
    name = fields["hidden_act"]
    if name not in _ACTIVATIONS:
        raise ModelError(f"config.json has hidden_act = {name!r}, expected one of {', '.join(_ACTIVATIONS)}",
                         mend=_SEE_CONFIG)
    return _ACTIVATIONS[name]


def _head_size(fields: Mapping[str, Any], hidden: int, heads: int) -> int:
    """head_dim wherever the file has it: Mistral-Nemo's is 128, not 5120 / 32."""
    if fields.get("head_dim") is None and hidden % heads:
        raise ModelError(f"config.json has no head_dim, and hidden_size {hidden} is not a multiple of "
                         f"num_attention_heads {heads}", mend=_SEE_CONFIG)
    size = hidden // heads if fields.get("head_dim") is None else _count(fields, "head_dim")
    if size % 2:
        raise ModelError(f"heads of {size} numbers cannot be rotated in pairs, expected an even head_dim",
                         mend=_SEE_CONFIG)
    return size


def _windows(family: Family, fields: Mapping[str, Any], layers: int) -> tuple[int, tuple[int, ...] | None]:
    """Window in tokens (0: none) and the layers that have it (None: all of them)."""
    enabled = family.windows == "all" or (family.windows == "some" and fields.get("use_sliding_window"))
    window = _count(fields, "sliding_window") if enabled and fields.get("sliding_window") is not None else 0
    if family.windows != "some":
        return window, None
    kinds = fields.get("layer_types")
    if kinds is None:
        windowed = tuple(range(min(int(fields["max_window_layers"]), layers), layers)) if window else ()
    elif len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ModelError(f"config.json lists {len(kinds)} layer_types of kinds {', '.join(sorted(set(kinds)))}, "
                         f"expected {layers} of full_attention and sliding_attention", mend=_SEE_CONFIG)
    else:
        windowed = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if windowed and not window:
        raise ModelError(f"config.json gives layer {windowed[0]} sliding_attention, but no sliding_window with "
                         "use_sliding_window", mend=_SEE_CONFIG)
    if not windowed:
        return 0, None
    return window, None if len(windowed) == layers else windowed
