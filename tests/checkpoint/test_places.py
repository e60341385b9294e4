"""What convert refuses before it writes: another folder's config.json, and a tokenizer that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorwright.checkpoint.convert import ConvertOptions, convert
from tensorwright.errors import ModelError, UsageError
from tensorwright.testing import tiny


def test_a_folder_with_another_config_is_not_overwritten(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    with pytest.raises(UsageError, match="no checkpoint's"):
        convert(model, other, ConvertOptions(), lambda size, what: None)
    assert [path.name for path in other.iterdir()] == ["config.json"]


def test_a_broken_tokenizer_is_found_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    (model / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ModelError, match="is no tokenizer"):
        convert(model, tmp_path / "checkpoint", ConvertOptions(), lambda size, what: None)
    assert not (tmp_path / "checkpoint").exists()
