"""Model folders and places that a conversion must refuse, without leaving a trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.checkpoint.config import Quantization
from tensorwright.errors import CheckpointError, ModelError, UsageError
from tensorwright.testing import tiny
from tensorwright.testing.converting import Weights, change_config, rewrite, run

UP, NORM, TABLE = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


def _set(name: str, value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].reshape(-1)[-1] = value
    return change


def _replace(name: str, array: NDArray[Any]) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: array})


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
