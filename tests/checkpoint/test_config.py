"""config.json of a checkpoint goes both ways, in upstream's fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorwright.checkpoint.config import CheckpointConfig, Quantization, from_json, read_config, to_json
from tensorwright.errors import CheckpointError
from tensorwright.models import from_huggingface
from tensorwright.models.config import ModelConfig
from tensorwright.testing import tiny


def model(**fields: Any) -> ModelConfig:
    return from_huggingface(tiny.config(tiny.TinyModel(**fields)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("quantization", [
    Quantization(), Quantization("W8A16"), Quantization("W4A16", 64), Quantization("W4A16", -1, "INT8", True),
    Quantization("FP8_PER_CHANNEL_PER_TOKEN", -1, "FP8", True)])
def test_both_ways(family: tiny.Family, quantization: Quantization) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    facts = model(family=family, rope_scaling=scaling, sliding_window=16, max_window_layers=1, attention_bias=True,
                  tied_embeddings=True, head_size=48)
    config = CheckpointConfig(facts, quantization, 2, (2, 5))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_fields_are_upstreams() -> None:
    values = to_json(CheckpointConfig(model(), Quantization("W4A16", 128, "INT8"), 2, (2,)))
    assert values["architecture"] == "MistralForCausalLM"
    assert values["quantization"]["quant_algo"] == "W4A16"
    assert values["quantization"]["kv_cache_quant_algo"] == "INT8"
    assert values["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1, "gpus_per_node": 8}
    assert (values["head_size"], values["rotary_base"], values["rotary_scaling"]) == (32, 10000.0, None)


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_size": None, "__drop__": "hidden_size"}, "hidden_size"), ({"dtype": "float8"}, "float8"),
    ({"quantization": {"quant_algo": "FP8"}}, "FP8"), ({"quantization": {"kv_cache_quant_algo": "INT4"}}, "INT4"),
    ({"quantization": {"quant_algo": "W4A16", "group_size": 48}}, "48"), ({"__drop__": "quantization"}, "quantization"),
])
def test_what_is_not_understood_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values = to_json(CheckpointConfig(model()))
    values.update({key: value for key, value in change.items() if key != "__drop__"})
    values.pop(change.get("__drop__", ""), None)
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=words) as caught:
        read_config(tmp_path)
    assert caught.value.mend


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\x00"])
def test_no_or_broken_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert caught.value.mend
