"""Whole conversions: the numbers, dtypes, ranks and files that come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorwright.checkpoint.config import Quantization
from tensorwright.checkpoint.convert import DType
from tensorwright.checkpoint.reader import Checkpoint
from tensorwright.checkpoint.tensor_file import TensorFile
from tensorwright.errors import CheckpointError
from tensorwright.quantization.scheme import dequantize
from tensorwright.testing import tiny
from tensorwright.testing.converting import change_config, rewrite, run

TABLE = "model.embed_tokens.weight"
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_unquantised_weights_keep_their_bits(tmp_path: Path, family: tiny.Family, num_shards: int) -> None:
    described = tiny.TinyModel(family=family, num_shards=num_shards, attention_bias=True, dtype="bfloat16",
                               end_ids=(2, 9))
    report = run(tiny.write_model(tmp_path / "model", described), tmp_path / "out", dtype="auto")
    checkpoint, weights = Checkpoint(tmp_path / "out"), tiny.tensors(described)
    assert checkpoint.config == report.config
    assert checkpoint.config.end_ids == (2, 9)
    assert checkpoint.config.model.dtype == "bfloat16"
    layer = "model.layers.1"
    expected = {"lm_head": weights["lm_head.weight"], "transformer.ln_f": weights["model.norm.weight"],
                "transformer.layers.1.mlp.fc": weights[f"{layer}.mlp.gate_proj.weight"],
                "transformer.layers.1.mlp.gate": weights[f"{layer}.mlp.up_proj.weight"],
                "transformer.layers.1.attention.qkv": np.concatenate(
                    [weights[f"{layer}.self_attn.{name}.weight"] for name in QKV])}
    if family != "mistral":
        expected["transformer.layers.1.attention.qkv.bias"] = np.concatenate(
            [weights[f"{layer}.self_attn.{name}.bias"] for name in QKV])
    for name, array in expected.items():
        tensor = checkpoint.tensor(0, name)
        assert tensor.scales is None
        np.testing.assert_array_equal(tensor.values.view(np.uint16), array.view(np.uint16))


@pytest.mark.parametrize(("quantization", "limit"), [
    (Quantization("W8A16", quantize_lm_head=True), 0.01), (Quantization("W4A16", 128), 0.11),
    (Quantization("W4A16", 32), 0.09), (Quantization("W4A16", -1), 0.12),
    (Quantization("FP8_PER_CHANNEL_PER_TOKEN", quantize_lm_head=True), 0.03)])
def test_quantised_weights_are_near_and_the_report_says_how_near(model: Path, tmp_path: Path, limit: float,
                                                                 quantization: Quantization) -> None:
    report = run(model, tmp_path / "out", quantization=quantization)
    checkpoint, weights = Checkpoint(tmp_path / "out"), tiny.tensors(tiny.TinyModel())
    tensor = checkpoint.tensor(0, "transformer.layers.1.mlp.proj")
    assert tensor.scales is not None
    assert tensor.scales.shape == (128, 1 if quantization.group_size == -1 else 256 // quantization.group_size)
    exact = weights["model.layers.1.mlp.down_proj.weight"]
    relative = np.linalg.norm(exact - dequantize(tensor.values, tensor.scales)) / np.linalg.norm(exact)
    assert relative < limit
    assert report.distances["proj", 1].relative == pytest.approx(relative, rel=1e-4)
    assert ("lm_head", None) in report.distances or not quantization.quantize_lm_head
    names = set(TensorFile(tmp_path / "out" / "rank0.safetensors", CheckpointError).entries)
    grouped = "transformer.layers.0.attention.qkv.weights_scaling_factor" in names
    assert grouped == (quantization.algorithm == "W4A16" and quantization.group_size != -1)
    assert ("lm_head.per_channel_scale" in names) == quantization.quantize_lm_head


@pytest.mark.parametrize("algorithm", [None, "W4A16"])
def test_two_ranks_hold_the_halves(model: Path, tmp_path: Path, algorithm: Any) -> None:
    whole = Checkpoint(_converted(model, tmp_path / "one", quantization=Quantization(algorithm, 32)))
    halves = Checkpoint(_converted(model, tmp_path / "two", quantization=Quantization(algorithm, 32), tp_size=2))
    for name, axis in (("attention.dense", 1), ("mlp.proj", 1), ("mlp.fc", 0), ("mlp.gate", 0)):
        full = whole.tensor(0, f"transformer.layers.0.{name}")
        parts = [halves.tensor(rank, f"transformer.layers.0.{name}") for rank in (0, 1)]
        np.testing.assert_array_equal(np.concatenate([part.values for part in parts], axis), full.values)
    qkv = whole.tensor(0, "transformer.layers.0.attention.qkv").values
    second = halves.tensor(1, "transformer.layers.0.attention.qkv").values
    np.testing.assert_array_equal(second, np.concatenate([qkv[64:128], qkv[160:192], qkv[224:256]]))
    np.testing.assert_array_equal(halves.tensor(0, "transformer.vocab_embedding").values,
                                  halves.tensor(1, "transformer.vocab_embedding").values)


def _converted(model: Path, output: Path, **options: Any) -> Path:
    run(model, output, **options)
    return output


@pytest.mark.parametrize(("source", "asked", "stored"), [
    ("float32", "auto", "float16"), ("bfloat16", "auto", "bfloat16"), ("float16", "auto", "float16"),
    ("bfloat16", "float16", "float16"), ("float16", "bfloat16", "bfloat16"), ("float32", "float32", "float32")])
def test_dtypes(tmp_path: Path, source: Any, asked: DType, stored: str) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.TinyModel(dtype=source))
    run(model, tmp_path / "out", dtype=asked)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config.model.dtype == stored
    table = checkpoint.tensor(0, "transformer.vocab_embedding").values
    assert str(table.dtype) == stored
    exact = tiny.tensors(tiny.TinyModel(dtype=source))["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_allclose(table.astype(np.float32), exact, rtol=0.01, atol=1e-6)


def test_auto_follows_the_weights_where_the_config_names_no_dtype(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.TinyModel(dtype="bfloat16"))
    change_config(model, dtype=None)
    assert run(model, tmp_path / "out", dtype="auto").config.model.dtype == "bfloat16"


def test_tied_embeddings_need_no_lm_head(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.TinyModel(tied_embeddings=True))
    run(model, tmp_path / "out")
    assert "lm_head" not in Checkpoint(tmp_path / "out").names(0)
    run(model, tmp_path / "out", quantization=Quantization("W8A16", quantize_lm_head=True))
    assert Checkpoint(tmp_path / "out").tensor(0, "lm_head").values.dtype == np.int8


@pytest.mark.parametrize("same", [True, False])
def test_a_second_lm_head_of_a_tied_model_counts_where_it_differs(tmp_path: Path, same: bool) -> None:
    described = tiny.TinyModel(tied_embeddings=True)
    model = tiny.write_model(tmp_path / "model", described)
    rewrite(model, lambda w: w.update({"lm_head.weight": w[TABLE] * (1 if same else 2)}), described)
    assert run(model, tmp_path / "out").config.model.tied_embeddings == same


def test_float8_is_stored_as_such_in_every_matrix_of_the_layers(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", quantization=Quantization("FP8_PER_CHANNEL_PER_TOKEN"), dtype="bfloat16")
    entries = TensorFile(tmp_path / "out" / "rank0.safetensors", CheckpointError).entries
    for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
        assert entries[f"transformer.layers.0.{name}.weight"].dtype == "F8_E4M3"
        assert entries[f"transformer.layers.0.{name}.per_channel_scale"].dtype == "BF16"
    assert entries["lm_head.weight"].dtype == "BF16"


@pytest.mark.parametrize("kv_cache", ["INT8", "FP8"])
def test_a_quantised_kv_cache_writes_scales_of_one(model: Path, tmp_path: Path, kv_cache: Any) -> None:
    run(model, tmp_path / "out", quantization=Quantization(kv_cache=kv_cache))
    scale = Checkpoint(tmp_path / "out").tensor(0, "transformer.layers.1.attention.kv_cache_scaling_factor").values
    assert (str(scale.dtype), scale.tolist()) == ("float32", [1.0])


def test_end_ids_and_tokenizer_files_come_along(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7, 8]}', encoding="utf-8")
    (model / "consolidated.safetensors").write_bytes(b"not to be read")
    (model / "model.safetensors.index.json").unlink(missing_ok=True)
    assert run(model, tmp_path / "out").config.end_ids == (2, 7, 8)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    (model / "generation_config.json").unlink()
    change_config(model, eos_token_id=[3, 4])
    assert run(model, tmp_path / "out").config.end_ids == (3, 4)


def test_rotary_buffers_of_old_uploads_are_left_out(model: Path, tmp_path: Path) -> None:
    rewrite(model, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}))
    run(model, tmp_path / "out")


@pytest.mark.parametrize("algorithm", [None, "W8A16", "W4A16"])
def test_dummy_weights_need_only_a_config(tmp_path: Path, algorithm: Any) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(tiny.config(tiny.TinyModel())), encoding="utf-8")
    options: dict[str, Any] = {"quantization": Quantization(algorithm, 32), "dummy_weights": True, "dtype": "float16"}
    first, again = (Checkpoint(_converted(model, tmp_path / name, **options)) for name in ("a", "b"))
    options["dummy_weights"] = False
    real = Checkpoint(_converted(tiny.write_model(tmp_path / "real"), tmp_path / "c", **options))
    assert first.names(0) == real.names(0)
    assert first.config.end_ids
    for name in first.names(0):
        tensor = first.tensor(0, name)
        np.testing.assert_array_equal(tensor.values, again.tensor(0, name).values)
        assert tensor.values.shape == real.tensor(0, name).values.shape
        if name.endswith(("mlp.fc", "dense")):
            plain = (tensor.values.astype(np.float32) if tensor.scales is None
                     else dequantize(tensor.values, tensor.scales))
            assert plain.std() * plain.shape[1] ** 0.5 == pytest.approx(1, rel=0.1)
