"""Prompts of a command line or a file, as token ids. It knows the forms of input; limits and tokenizer are handed in.

Nothing is cut: a prompt that is too long is an error with the numbers.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tensorwright.errors import LimitError, UsageError

if TYPE_CHECKING:
    from tensorwright.runtime.tokenizer import Tokenizer

TABLES = (".csv", ".npy")  # hold token ids
ENDINGS = (".txt", *TABLES)
EXAMPLE = '--input_text "hi how are you?"'
_SHORTER = "a shorter prompt, or rebuild with larger limits"
_SAVE = "numpy.save(path, rows.astype('int32')), with rows padded to one length"
NO_TOKENIZER = "--tokenizer_dir with the model's Hugging Face folder, where tokenizer.json lies"


@dataclass(frozen=True)
class Source:
    """Where prompts come from: texts of the command line, or a file of one of `ENDINGS`."""

    texts: tuple[str, ...] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Tokenization:
    """How texts become token ids. max_tokens: longer prompts are refused."""

    tokenizer: Tokenizer | None
    max_tokens: int
    limit_name: str = "the engine's max_input_len"
    other_numbers: str = ""  # said beside the limit in an error
    add_special_tokens: bool = True
    chat: bool = False
    system: str | None = None  # the chat's system message
    pad_id: int | None = None  # dropped from .npy rows


def read_prompts(source: Source, how: Tokenization) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        UsageError: no prompt, an empty one, a file of another kind, or one that is not what its ending says.
        LimitError: a prompt longer than `how.max_tokens`.
    """
    prompts = list(_table(source.file, how) if source.file and source.file.suffix.lower() in TABLES
                   else _tokenized(_texts(source), how))
    if not prompts:
        raise UsageError("there is no prompt", mend=EXAMPLE)
    for number, ids in enumerate(prompts):
        if not ids:
            raise UsageError(f"prompt {number} is empty; a prompt needs at least one token", mend=EXAMPLE)
        if len(ids) > how.max_tokens:
            raise LimitError(
                f"prompt {number} has {len(ids)} tokens, {len(ids) - how.max_tokens} more than {how.limit_name} "
                f"({how.max_tokens}){how.other_numbers}; nothing is cut",
                mend=_SHORTER,
            )
    return prompts


def _texts(source: Source) -> list[str]:
    if source.file is None:
        return list(source.texts)
    if source.file.suffix.lower() not in ENDINGS:
        raise UsageError(f"{source.file}: the ending is {source.file.suffix or 'missing'}, expected one of "
                         f"{', '.join(ENDINGS)}", mend="--input_file prompts.txt, with a prompt on each line")
    _check_exists(source.file)
    try:
        lines = source.file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source.file} is not UTF-8 at byte {error.start}",
                         mend=f"iconv -f latin1 -t utf-8 {source.file} > utf8.txt (if it is latin1)") from error
    return lines[:-1] if lines[-1] == "" else lines


def _tokenized(texts: list[str], how: Tokenization) -> Iterator[list[int]]:
    if how.tokenizer is None:
        raise UsageError("prompts of text need a tokenizer, and the engine folder has no tokenizer.json",
                         mend=NO_TOKENIZER)
    encode = _encoder(how.tokenizer, how)
    for number, text in enumerate(texts):
        if text == "":
            raise UsageError(f"prompt {number} is empty", mend=EXAMPLE)
        try:
            yield encode(text)
        except UsageError as error:
            numbers = how.other_numbers if isinstance(error, LimitError) else ""
            raise type(error)(f"prompt {number}: {error.message}{numbers}", mend=error.mend) from error


def _encoder(tokenizer: Tokenizer, how: Tokenization) -> Callable[[str], list[int]]:
    if not how.chat:
        encode = tokenizer.encode if how.add_special_tokens else tokenizer.encode_chat
        return lambda text: encode(text, max_tokens=how.max_tokens)
    from tensorwright.runtime.chat_template import ChatTemplate

    template = ChatTemplate.of(tokenizer)
    head = [{"role": "system", "content": how.system}] if how.system else []

    def encode_chat(text: str) -> list[int]:
        rendered = template.render([*head, {"role": "user", "content": text}])
        return tokenizer.encode_chat(rendered, max_tokens=how.max_tokens)

    return encode_chat


def _table(path: Path, how: Tokenization) -> Iterator[list[int]]:
    if how.chat:
        raise UsageError(f"--chat needs text, and {path} holds token ids", mend="give the prompts as --input_text")
    _check_exists(path)
    return _csv_rows(path) if path.suffix.lower() == ".csv" else _npy_rows(path, how.pad_id)


def _csv_rows(path: Path) -> Iterator[list[int]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if row:
                    yield [int(cell) for cell in row if cell.strip()]
        except (ValueError, csv.Error) as error:
            raise UsageError(f"{path}, line {reader.line_num}: expected token ids with commas between: {error}",
                             mend="1,423,77 on a line, or a .txt file with texts") from error


def _npy_rows(path: Path, pad_id: int | None) -> Iterator[list[int]]:
    import numpy as np

    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path} is no .npy file of numbers: {error}", mend=_SAVE) from error
    if isinstance(table, Mapping) or table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
        form = "several arrays" if isinstance(table, Mapping) else f"{table.dtype} of shape {list(table.shape)}"
        raise UsageError(f"{path} holds {form}; expected token ids: integers of shape [prompts, longest prompt]",
                         mend=_SAVE)
    for row in table.tolist():
        yield [token_id for token_id in row if token_id != pad_id]


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path} does not exist", mend=f"ls {path.parent}")
