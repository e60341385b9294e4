"""Tokenizer folders as the hub has them: every form of their small files, and nothing cut silently."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tensorwright.errors import LimitError, UsageError
from tensorwright.runtime.tokenizer import Tokenizer
from tensorwright.testing.text import BOS_ID, END_ID, byte_level_tokenizer, metaspace_tokenizer, write_tokenizer


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_one_bos_even_when_the_text_has_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    ids = tokenizer.encode("hi how")
    assert ids[0] == BOS_ID and ids.count(BOS_ID) == 1
    assert tokenizer.encode("<s>hi how") == ids
    assert tokenizer.encode_plain("hi how") == ids[1:]
    assert tokenizer.encode_chat("<s>hi how") == ids


def test_text_comes_back(tmp_path: Path) -> None:
    backends = (byte_level_tokenizer(), metaspace_tokenizer(), metaspace_tokenizer(legacy=False))
    for number, backend in enumerate(backends):
        tokenizer = Tokenizer.load(write_tokenizer(tmp_path / str(number), backend))
        ids = tokenizer.encode("hi 你好 🦄\nyou")
        assert tokenizer.decode(ids) == "hi 你好 🦄\nyou"
        assert tokenizer.decode(ids, skip_special=False).startswith("<s>")
        assert tokenizer.decode([10**6]) == ""


def test_saved_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=512)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend))
    assert len(tokenizer.encode("hi how are you? " * 50)) > 100
    assert len(tokenizer.encode("hi")) < 4


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [4, 2]}, "config.json": {"eos_token_id": 9}}, (4, 2)),
        ({"generation_config.json": {"eos_token_id": 4}}, (4,)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 9}}, (END_ID,)),
        ({"tokenizer_config.json": {}, "config.json": {"eos_token_id": [9, 8]}}, (9, 8)),
        ({"tokenizer_config.json": {}}, (77,)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, (4,)),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|im_end|>"}}, (4,)),
    ],
)
def test_where_end_ids_come_from(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    write_tokenizer(tmp_path)
    for name, content in files.items():
        write_json(tmp_path / name, content)
    assert Tokenizer.load(tmp_path, end_ids=(77,)).end_ids == expected


def test_pad_id_is_the_end_id_without_a_pad_token(tmp_path: Path) -> None:
    assert Tokenizer.load(write_tokenizer(tmp_path)).pad_id == END_ID
    assert Tokenizer.load(write_tokenizer(tmp_path, pad_token="<unk>")).pad_id == 0


def test_chat_templates_in_every_form(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    assert Tokenizer.load(write_tokenizer(tmp_path, chat_template="C")).chat_templates == {"default": "C"}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=named))
    assert tokenizer.chat_templates == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("D", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_templates == {"default": "D", "tool_use": "B"}
    assert Tokenizer.load(write_tokenizer(tmp_path / "none", chat_template=None)).chat_templates == {}


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "--tokenizer_dir" in str(caught.value.mend)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        Tokenizer.load(tmp_path)
    assert "save_pretrained" in str(caught.value.mend)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text('{"broken', encoding="utf-8")
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    with pytest.raises(UsageError, match="not valid Unicode at character 2"):
        tokenizer.encode(b"hi\xff".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("text", ["a", "hi how ", "\U0001f984"])
def test_ten_megabytes_are_refused_quickly(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    started = time.monotonic()
    with pytest.raises(LimitError, match="at most 200 fit"):
        tokenizer.encode(text * (10 * 2**20 // len(text.encode())), max_tokens=200)
    assert time.monotonic() - started < 2


def test_a_prompt_at_the_limit_is_not_refused_early(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    text = "🦄x" * 1000
    length = len(tokenizer.encode(text))
    assert len(tokenizer.encode(text, max_tokens=length)) == length
