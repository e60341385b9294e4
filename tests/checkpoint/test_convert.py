"""Whole conversions: the numbers that come out, the ranks, and folders that must be refused without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.checkpoint import convert as convert_module
from tensorwright.checkpoint.config import Quantization
from tensorwright.checkpoint.convert import ConvertOptions, ConvertReport, DType, convert
from tensorwright.checkpoint.reader import Checkpoint
from tensorwright.checkpoint.tensor_file import TensorFile, write_tensors
from tensorwright.errors import CheckpointError, ModelError, UsageError
from tensorwright.quantization.scheme import dequantize
from tensorwright.testing import tiny

Weights = dict[str, NDArray[Any]]


def quiet(num_bytes: int, what: str) -> None:
    """Nobody watches."""


def run(model: Path, output: Path, **options: Any) -> ConvertReport:
    return convert(model, output, ConvertOptions(**{"dtype": "float32", **options}), quiet)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model")


def rewrite(model: Path, change: Callable[[Weights], None], description: tiny.TinyModel | None = None) -> None:
    """The model's weights after a change."""
    weights = tiny.tensors(description or tiny.TinyModel())
    change(weights)
    tiny.write_weights(model, weights)


def change_config(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")


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
    (Quantization("W4A16", 32), 0.09), (Quantization("W4A16", -1), 0.12)])
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


def test_int8_kv_cache_writes_scales_of_one(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", quantization=Quantization(kv_cache="INT8"))
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


def _set(name: str, value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].reshape(-1)[-1] = value
    return change


def _replace(name: str, array: NDArray[Any]) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: array})


UP, NORM, TABLE = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(("change", "words"), [
    (_set(UP, np.nan), (UP, "NaN")), (_set(TABLE, np.inf), (TABLE, "infinity")), (_set(NORM, np.nan), (NORM, "NaN")),
    (_replace(UP, np.ones((256, 64), np.float32)), (UP, "[256, 64]", "[256, 128]")),
    (_replace(UP, np.ones((256, 128), np.int8)), (UP, "I8", "F16")),
    (lambda w: w.pop(UP), (UP, "lacks")),
    (_replace("model.layers.2.mlp.up_proj.weight", np.ones((2, 2), np.float32)), ("model.layers.2.mlp", "holds")),
])
@pytest.mark.parametrize("algorithm", [None, "W4A16"])
def test_bad_weights_are_named_and_nothing_is_left(model: Path, tmp_path: Path, change: Callable[[Weights], None],
                                                   words: tuple[str, ...], algorithm: Any) -> None:
    rewrite(model, change)
    with pytest.raises(ModelError) as caught:
        run(model, tmp_path / "out", quantization=Quantization(algorithm, 32))
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.mend
    assert not list((tmp_path / "out").glob("*")) + list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("name", [TABLE, UP])
@pytest.mark.parametrize("algorithm", [None, "W8A16"])
def test_numbers_beyond_float16_name_their_tensor(tmp_path: Path, name: str, algorithm: Any) -> None:
    described = tiny.TinyModel(dtype="bfloat16")
    model = tiny.write_model(tmp_path / "model", described)
    rewrite(model, _set(name, 1e9), described)
    options = {"quantization": Quantization(algorithm)}
    with pytest.raises(ModelError, match="65504") as caught:
        run(model, tmp_path / "out", dtype="float16", **options)
    assert name in caught.value.message
    assert "bfloat16" in (caught.value.mend or "")
    run(model, tmp_path / "out", dtype="bfloat16", **options)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


@pytest.mark.parametrize(("damage", "words"), [
    (lambda m: (m / "config.json").unlink(), ("config.json",)),
    (lambda m: (m / "config.json").write_text("{"), ("config.json", "JSON")),
    (lambda m: (m / "config.json").write_text("[]"), ("config.json", "object")),
    (lambda m: (m / "generation_config.json").write_text("?"), ("generation_config.json",)),
    (lambda m: _truncate(m / "model.safetensors"), ("model.safetensors", "cut short")),
    (_pickle_only, ("pytorch_model.bin", "pickle", "safetensors")),
    (lambda m: (m / "model.safetensors").rename(m / "consolidated.safetensors"), ("only consolidated.safetensors",)),
    (lambda m: (m / "model.safetensors").unlink(), ("no weights",)),
    (lambda m: (m / "tokenizer.json").unlink(), ("tokenizer.json",)),
    (lambda m: change_config(m, architectures=["BertModel"]), ("BertModel", "MistralForCausalLM")),
    (lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'), ("gone",)),
    (lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
     ("says that a is in",)),
    (lambda m: (m / "model.safetensors.index.json").write_text("{}"), ("weight_map",)),
])
def test_bad_folders_are_refused(model: Path, tmp_path: Path, damage: Callable[[Path], None],
                                 words: tuple[str, ...]) -> None:
    damage(model)
    with pytest.raises(ModelError) as caught:
        run(model, tmp_path / "out")
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.mend
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        run(tmp_path / "none", tmp_path / "out")


def test_the_model_folder_is_never_the_output(model: Path) -> None:
    before = (model / "config.json").read_bytes()
    with pytest.raises(UsageError, match="model folder"):
        run(model, model)
    assert (model / "config.json").read_bytes() == before


def test_a_full_disk_is_seen_before_anything_is_written(model: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.06 GiB .* has 0\.00 GiB free") as caught:
        run(model, tmp_path / "out")
    assert "df -h" in (caught.value.mend or "")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_place_is_an_error_of_the_tree(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(model, tmp_path / "file" / "out")


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tensorwright.checkpoint.convert import ConvertOptions, convert
from tensorwright.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions("float32"), lambda size, what: None)
except CheckpointError as error:
    sys.exit(str(error))
"""


def test_a_write_that_fails_midway_leaves_nothing(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(model), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    assert "cannot be written" in result.stderr
    assert "File too large" in result.stderr
    assert not (tmp_path / "out").exists()


def _environment() -> dict[str, str]:
    source = str(Path(convert_module.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": source}


KILLED = """
import sys, time
from pathlib import Path
from tensorwright.checkpoint.convert import ConvertOptions, convert
def report(size, what):
    print(what, flush=True)
    time.sleep(60)
convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions("float32"), report)
"""


def test_a_killed_run_leaves_an_earlier_checkpoint_whole_and_the_next_run_cleans_up(model: Path,
                                                                                    tmp_path: Path) -> None:
    output = _converted(model, tmp_path / "out", tp_size=2)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    command = [sys.executable, "-c", KILLED, str(model), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    left = {path.name: path.read_bytes() for path in output.iterdir()}
    assert {name for name in left if name not in before} == {".rank0.safetensors.partial"}
    assert before.items() <= left.items()
    run(model, output)
    assert [path.name for path in output.iterdir() if path.name.startswith((".", "rank"))] == ["rank0.safetensors"]
    assert Checkpoint(output).config.tp_size == 1


def test_a_folder_without_its_config_is_no_checkpoint(model: Path, tmp_path: Path) -> None:
    output = _converted(model, tmp_path / "out")
    (output / "config.json").unlink()
    with pytest.raises(CheckpointError, match="written last"):
        Checkpoint(output)


def test_a_checkpoint_without_a_rank_is_refused(model: Path, tmp_path: Path) -> None:
    output = _converted(model, tmp_path / "out", tp_size=2)
    (output / "rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank1\.safetensors"):
        Checkpoint(output)
    with pytest.raises(CheckpointError, match="no tensor"):
        Checkpoint(_converted(model, tmp_path / "out")).tensor(0, "transformer.layers.9.mlp.fc")


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


def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    described = tiny.TinyModel(dtype="bfloat16", vocab_size=8192, hidden_size=1024, num_heads=8, head_size=128)
    weights = tiny.tensors(replace(described, num_layers=1, vocab_size=320))
    weights |= {name: np.zeros((65536, 1024), ml_dtypes.bfloat16) for name in (TABLE, "lm_head.weight")}
    model = tiny.write_model(tmp_path / "model", replace(described, num_layers=1, vocab_size=320))
    change_config(model, vocab_size=65536)
    write_tensors(model / "model.safetensors", weights)
    script = ("import resource, sys\nfrom pathlib import Path\n"
              "from tensorwright.checkpoint.convert import ConvertOptions, convert\n"
              "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "options = ConvertOptions('float16', num_threads=2)\n"
              "convert(Path(sys.argv[1]), Path(sys.argv[2]), options, lambda size, what: None)\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)")
    result = subprocess.run([sys.executable, "-c", script, str(model), str(tmp_path / "out")], capture_output=True,
                            text=True, check=True, env=_environment())
    assert int(result.stdout) * 1024 < 150 << 20, f"grew by {result.stdout} KiB"
