"""Config reading: every family in both styles, against transformers' own classes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tensorwright.errors import ModelError
from tensorwright.models import from_huggingface
from tensorwright.models.families import known_architectures
from tensorwright.models.weight_names import weights
from tensorwright.testing import tiny

ARCHITECTURES = known_architectures()
SMALL = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 256}
NEMO = {"architectures": ["MistralForCausalLM"], "vocab_size": 131072, "hidden_size": 5120, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "max_position_embeddings": 1024000, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        "torch_dtype": "bfloat16"}


def config(architecture: str = "LlamaForCausalLM", **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SMALL, **fields}


def test_nemo_takes_its_head_size_from_the_config() -> None:
    model = from_huggingface(NEMO)
    assert (model.head_size, model.num_kv_heads, model.sliding_window) == (128, 8, 0)
    assert (model.rope.theta, model.dtype, model.max_position_embeddings) == (1e6, "bfloat16", 1024000)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_both_config_styles_mean_the_same(family: tiny.Family, scaling: dict[str, Any]) -> None:
    old, new = (from_huggingface(tiny.config(tiny.TinyModel(
        family=family, rope_theta=5e5, rope_scaling=scaling, dtype="bfloat16", config_style=style)))
        for style in (4, 5))
    assert old == new
    assert old.rope.theta == 5e5


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_expected_weights_are_the_ones_in_the_folder(family: tiny.Family, tied: bool) -> None:
    model = tiny.TinyModel(family=family, tied_embeddings=tied, attention_bias=True, mlp_bias=True, head_size=48)
    specs = weights(from_huggingface(tiny.config(model)), write_lm_head=not tied)
    expected = {source.name: source.shape for spec in specs for source in spec.sources}
    assert expected == {name: array.shape for name, array in tiny.tensors(model).items()}


TRANSFORMERS_CASES: list[dict[str, Any]] = [
    {}, {"head_dim": 48}, {"rms_norm_eps": 1e-5}, {"sliding_window": 16}, {"sliding_window": None},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 16, "use_sliding_window": True},
    {"sliding_window": 16, "use_sliding_window": True,
     "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 2e5, "factor": 4.0}, "rope_theta": 7.0},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    {"tie_word_embeddings": True, "attention_bias": True},
]


@pytest.mark.parametrize(("architecture", "fields"), [
    (architecture, fields) for architecture in ARCHITECTURES for fields in TRANSFORMERS_CASES
    if architecture.startswith("Qwen") or "layer_types" not in fields])
def test_fields_mean_what_transformers_takes_them_for(architecture: str, fields: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    ours = from_huggingface(config(architecture, **fields))
    values: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()}
    make: Any = CONFIG_MAPPING[architecture.removesuffix("ForCausalLM").lower()]
    theirs = make(architectures=[architecture], **SMALL, **values)
    rope = theirs.rope_parameters
    assert (ours.rope.theta, ours.rope.kind) == (rope["rope_theta"], rope["rope_type"])
    assert ours.rope.scaling.get("original_max_position_embeddings") == rope.get("original_max_position_embeddings")
    assert ours.rope.scaling.get("factor") == rope.get("factor")
    assert ours.head_size == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert [ours.window(layer) for layer in range(4)] == [their_window(theirs, layer) for layer in range(4)]


def their_window(theirs: Any, layer: int) -> int:
    if theirs.model_type == "llama":  # its attention reads no window, whatever the file says
        return 0
    kinds = getattr(theirs, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return 0
    return getattr(theirs, "sliding_window", None) or 0


@pytest.mark.parametrize(("fields", "words"), [
    ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", *ARCHITECTURES)),
    ({"architectures": [], "model_type": "bert"}, ("bert", "MistralForCausalLM")),
    ({"hidden_size": "128"}, ("hidden_size", "'128'")),
    ({"num_hidden_layers": 0}, ("num_hidden_layers", "above 0")),
    ({"vocab_size": None}, ("vocab_size", "None")),
    ({"num_key_value_heads": 3}, ("4 attention heads", "3 key")),
    ({"head_dim": 33}, ("33", "even")),
    ({"hidden_size": 130}, ("head_dim", "130")),
    ({"hidden_act": "relu6"}, ("relu6", "silu")),
    ({"dtype": "int8"}, ("int8", "bfloat16")),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic", "linear", "llama3", "yarn")),
    ({"rope_scaling": {"rope_type": "longrope"}}, ("longrope", "yarn")),
    ({"rope_scaling": {"rope_type": "linear"}}, ("factor", "None")),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("low_freq_factor",)),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("per kind of layer",)),
    ({"partial_rotary_factor": 0.5}, ("0.5", "whole head")),
    ({"rms_norm_eps": "small"}, ("rms_norm_eps",)),
    ({"quantization_config": {"quant_method": "awq"}}, ("awq", "already quantised")),
])
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        from_huggingface({**config(), **fields})
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.mend


def test_window_without_a_size_is_refused() -> None:
    fields = {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False}
    with pytest.raises(ModelError, match="sliding_window"):
        from_huggingface(config("Qwen2ForCausalLM", **fields))


def test_model_type_stands_in_for_missing_architectures() -> None:
    assert from_huggingface({**SMALL, "model_type": "qwen3"}).qk_norm
