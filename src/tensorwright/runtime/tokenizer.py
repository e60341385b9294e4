"""Text to token ids and back, from the tokenizer files of a Hugging Face or engine folder.

Knows tokenizer.json and the small JSON files beside it: which tokens begin, end and pad, and the chat template's text.
Does not know how a template is rendered (chat_template.py) nor how text is streamed (detokenizer.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from tensorwright.errors import LimitError, UsageError

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PREFIX_CHARACTERS_PER_TOKEN = 8  # how much text is tried first when a prompt may be over the limit
DEFAULT_TEMPLATE = "default"


@dataclass(frozen=True)
class TokenizerFiles:
    """What stands beside tokenizer.json."""

    special_tokens: dict[str, str] = field(default_factory=dict)  # role, e.g. "bos_token", to the token's text
    end_ids: tuple[int, ...] = ()  # of generation_config.json
    config_end_ids: tuple[int, ...] = ()  # of config.json
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; the usual one is "default"

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Read what is there; every file is optional.

        Raises:
            UsageError: a file that is not JSON.
        """
        settings = _read_json(directory / "tokenizer_config.json")
        roles = {**_read_json(directory / "special_tokens_map.json"), **settings}
        return cls(
            special_tokens={role: text for role in ROLES if (text := _token_text(roles.get(role)))},
            end_ids=_ids(_read_json(directory / "generation_config.json").get("eos_token_id")),
            config_end_ids=_ids(_read_json(directory / "config.json").get("eos_token_id")),
            chat_templates=_chat_templates(directory, settings),
        )


class Tokenizer:
    """One tokenizer. Safe to share between threads: nothing changes after construction."""

    def __init__(
        self, backend: tokenizers.Tokenizer, files: TokenizerFiles | None = None, *, end_ids: tuple[int, ...] = ()
    ) -> None:
        files = files or TokenizerFiles()
        backend.no_truncation()  # saved settings of training; here they would cut or lengthen prompts silently
        backend.no_padding()
        self._backend = backend
        self.special_tokens: Mapping[str, str] = files.special_tokens
        self.chat_templates: Mapping[str, str] = files.chat_templates
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = self._role_id("bos_token")
        eos_id = self._role_id("eos_token")
        own = (eos_id,) if eos_id is not None else ()
        self.end_ids: tuple[int, ...] = files.end_ids or own or files.config_end_ids or end_ids
        pad_id = self._role_id("pad_token")
        self.pad_id: int | None = pad_id if pad_id is not None else next(iter(self.end_ids), None)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_ids = _byte_ids(backend)

    @classmethod
    def load(cls, directory: Path, *, end_ids: tuple[int, ...] = ()) -> Tokenizer:
        """Read a folder's tokenizer; `end_ids` serve when no file of it names an end token.

        Raises:
            UsageError: no tokenizer.json, or one that cannot be read.
        """
        path = Path(directory) / "tokenizer.json"
        if not Path(directory).is_dir():
            raise UsageError(f"the tokenizer's folder {directory} does not exist; names of a hub are not looked up")
        if not path.is_file():
            raise UsageError(f"{directory} has no tokenizer.json.", mend=_missing_mend(Path(directory)))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            mend = "copy tokenizer.json from the model's Hugging Face folder again"
            raise UsageError(f"{path} cannot be read: {error}", mend=mend) from error
        return cls(backend, TokenizerFiles.read(Path(directory)), end_ids=end_ids)

    def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids with the special tokens that tokenizer.json adds: BOS once, even when the text begins with it.

        Args:
            text: the prompt.
            max_tokens: a text that is surely longer is refused early, before all of it is tokenised.

        Raises:
            UsageError: text that is not Unicode, such as undecodable bytes of a command line.
            LimitError: surely more than `max_tokens` tokens.
        """
        ids = self._encode(text, special=True, max_tokens=max_tokens)
        doubled = self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]
        return ids[1:] if doubled else ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of the text alone; special tokens written in it are recognised, none are added."""
        return self._encode(text, special=False, max_tokens=None)

    def encode_chat(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a rendered chat: the template has written every special token, so none are added."""
        return self._encode(text, special=False, max_tokens=max_tokens)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the tokens. Ids outside the vocabulary have no text; bytes that are no character become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, token_id: int) -> str | None:
        """The token as tokenizer.json writes it, or None when the id is outside the vocabulary."""
        text: str | None = self._backend.id_to_token(token_id)
        return text

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` shows this token when it skips special tokens."""
        return token_id not in self._special_ids and self.token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether this is a byte-fallback token such as <0xE2>, whose text depends on its neighbours."""
        return token_id in self._byte_ids

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        token_id: int | None = None if text is None else self._backend.token_to_id(text)
        return token_id

    def _encode(self, text: str, *, special: bool, max_tokens: int | None) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"the text is not valid Unicode at character {error.start}: {error.reason}."
            raise UsageError(message, mend="pass UTF-8 text, or token ids in a .csv or .npy file") from error
        if max_tokens is not None:
            self._refuse_longer(text, max_tokens)
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def _refuse_longer(self, text: str, max_tokens: int) -> None:
        """A beginning of the text may end inside a token, so it has to be over the limit by a margin."""
        length = max(1024, max_tokens * PREFIX_CHARACTERS_PER_TOKEN)
        surely_over = max_tokens + max_tokens // 8 + 64
        while length < len(text):
            num_tokens = len(self._backend.encode(text[:length], add_special_tokens=False).ids)
            if num_tokens > surely_over:
                raise LimitError(
                    f"the prompt is too long: {len(text)} characters, and the first {length} of them are already "
                    f"{num_tokens} tokens; at most {max_tokens} fit",
                    mend="a shorter prompt, or rebuild with a larger --max_seq_len",
                )
            length *= 4


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _token_text(value: object) -> str | None:
    """A token is written as its text, or as an object with the text in "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(item for item in value if isinstance(item, int)) if isinstance(value, list) else ()


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Of tokenizer_config.json (one text, or a list of named ones), then of the .jinja files, which win."""
    value = settings.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates[DEFAULT_TEMPLATE] = value
    elif isinstance(value, list):
        templates.update({str(item["name"]): str(item["template"]) for item in value if isinstance(item, dict)})
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    path = directory / "chat_template.jinja"
    if path.is_file():
        templates[DEFAULT_TEMPLATE] = path.read_text(encoding="utf-8")
    return templates


def _byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)


def _missing_mend(directory: Path) -> str:
    if (directory / "tokenizer.model").is_file():
        load = f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')"
        return (
            f'python3 -c "from transformers import AutoTokenizer; {load}"   '
            "(writes tokenizer.json; needs transformers and sentencepiece)"
        )
    return "--tokenizer_dir with the model's Hugging Face folder, where tokenizer.json lies"
