"""The engine folder as a place: made, kept apart from folders of other kinds, filled with whole files.

It knows names of files, not what is in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensorwright.engine.config import CONFIG, read_config
from tensorwright.errors import BuildError, EngineError, UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                   "special_tokens_map.json")


@contextmanager
def engine_folder(folder: Path) -> Iterator[None]:
    """The folder exists inside the `with`; when that fails and nothing was written, it is gone again.

    Raises:
        UsageError: it holds the config.json of something else, which would be lost.
        BuildError: it cannot be made.
    """
    _refuse_other_folders(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the engine folder {folder} cannot be made: {error.strerror}",
                         mend="give another --output_dir, or change its permissions") from None
    _remove_leftovers(folder)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # not empty: ranks that were finished are kept
                folder.rmdir()
        raise


def copy_tokenizer(source: Path, target: Path) -> None:
    """Bring the tokenizer's files along, each whole or not at all."""
    if source.resolve() == target.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            _copy_whole(source / name, target / name)


def _remove_leftovers(folder: Path) -> None:
    """Parts of engine files that killed builds left aside: `.rank0.engine.PID.part` of a process that is gone."""
    for part in folder.glob(".rank*.engine.*.part"):
        process = part.name.split(".")[-2]
        if process.isdigit() and not Path("/proc", process).exists():
            part.unlink(missing_ok=True)


def _refuse_other_folders(folder: Path) -> None:
    if not (folder / CONFIG).exists() or any(folder.glob("rank*.engine")):
        return
    try:
        read_config(folder)
    except EngineError:
        raise UsageError(f"{folder} holds a {CONFIG} that is not an engine's, and a build would replace it",
                         mend=f"--output_dir {folder}-engine") from None


def _copy_whole(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
