"""Writing a model repository: one folder per model, whole or not at all. It knows files, and starts nothing.

    R/<model_name>/config.pbtxt
    R/<model_name>/1/model.py          what Triton imports (entry.py of this package)
    R/<model_name>/1/tensorwright/     the runtime part of this package, of the version that deployed
    R/<model_name>/1/engine/           the engine folder; its large files are hard links where that is possible
    R/<model_name>/1/tokenizer/        only with a tokenizer folder of its own

The runtime travels with the engine, so that a server needs only its Python dependencies, and cannot meet an engine
with the runtime of another version.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import tensorwright
from tensorwright.engine.config import limits_of, read_config
from tensorwright.errors import ServeError, UsageError
from tensorwright.serve.triton.config_pbtxt import MARK, config_text
from tensorwright.serve.triton.options import DeployOptions
from tensorwright.serve.triton.settings import ServeSettings

RUNTIME_PARTS = ("__init__.py", "errors.py", "program", "kernels", "engine", "runtime", "serve")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                   "chat_template.jinja")
VERSION = "1"


def write_model(options: DeployOptions, settings: ServeSettings) -> Path:
    """Write the model's folder aside, then put it in the place of an earlier one. Returns the folder.

    Raises:
        ServeError: a folder that is not ours, several ranks, no tokenizer, or a place that cannot be written.
        EngineError: `engine_dir` is no engine folder.
    """
    _check_name(options.model_name)
    text = _config(options, settings)
    place = options.model_repository / options.model_name
    _refuse_foreign(place, options)
    aside = options.model_repository / f".{options.model_name}.{os.getpid()}.part"
    try:
        _remove_leftovers(place)
        (aside / VERSION).mkdir(parents=True)
        (aside / "config.pbtxt").write_text(text)
        _fill_version(aside / VERSION, options)
        _swap(aside, place)
    except OSError as error:
        raise ServeError(f"the model repository cannot be written: {error}",
                         mend="choose a folder you may write with --model_repository") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return place


def _config(options: DeployOptions, settings: ServeSettings) -> str:
    limits = limits_of(read_config(options.engine_dir))
    num_ranks = len(list(options.engine_dir.glob("rank*.engine")))
    if num_ranks != 1:
        raise ServeError(f"{options.engine_dir} has {num_ranks} ranks; a deployed model has exactly 1",
                         mend="tensorwright convert --tp_size 1, then build again")
    tokenizer_dir = options.tokenizer_dir or options.engine_dir
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise ServeError(f"{tokenizer_dir} has no tokenizer.json, which a text model needs",
                         mend="tensorwright deploy ... --tokenizer_dir <the model's Hugging Face folder>")
    parameters = {"tensorwright_version": tensorwright.__version__, "engine_dir": "engine",
                  "tokenizer_dir": "tokenizer" if options.tokenizer_dir else ""}
    return config_text(options.model_name, max_batch_size=limits.max_batch_size, logits_dtype=limits.logits_dtype,
                       settings=settings, parameters=parameters)


def _fill_version(version: Path, options: DeployOptions) -> None:
    package = Path(tensorwright.__file__).parent
    shutil.copyfile(Path(__file__).with_name("entry.py"), version / "model.py")
    for part in RUNTIME_PARTS:
        _copy_sources(package / part, version / "tensorwright" / part)
    (version / "engine").mkdir()
    for file in sorted(options.engine_dir.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            _link_or_copy(file, version / "engine" / file.name)
    if options.tokenizer_dir is not None:
        (version / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            if (options.tokenizer_dir / name).is_file():
                shutil.copyfile(options.tokenizer_dir / name, version / "tokenizer" / name)


def _copy_sources(source: Path, destination: Path) -> None:
    """Python files only: the C++ sources of the kernels are the builder's, the engine holds them compiled."""
    files = [source] if source.is_file() else sorted(source.rglob("*.py"))
    for file in files:
        copy = destination / file.relative_to(source) if file != source else destination
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _link_or_copy(source: Path, destination: Path) -> None:
    """Engine files are never changed in place, so a link is as good as a copy; small files may be edited by people."""
    if source.suffix == ".engine":
        try:
            os.link(source.resolve(), destination)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, destination)


def _swap(aside: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    if place.exists():
        place.replace(old)
    aside.replace(place)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """What a killed deploy left beside the model. Triton would take it for a model, and not start."""
    for folder in place.parent.glob(f".{place.name}.*"):
        found = re.fullmatch(r"\.(\d+)\.(part|old)", folder.name.removeprefix(f".{place.name}"))
        if found and not Path("/proc", found[1]).exists():
            shutil.rmtree(folder)


def _refuse_foreign(place: Path, options: DeployOptions) -> None:
    config = place / "config.pbtxt"
    ours = config.is_file() and config.read_text(errors="replace").startswith(MARK)
    if place.exists() and not ours and not options.force:
        raise ServeError(f"{place} exists and was not written by tensorwright deploy",
                         mend="choose another --model_name, or --force to replace it")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError(f"a model name has letters, digits, '_', '-' and '.'; got {name!r}")
