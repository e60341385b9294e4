"""config.json of an engine folder: what people and other tools read, and the limits. It knows no engine file.

The field names are the ones that upstream's engine folders have (`pretrained_config`, `build_config`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from tensorwright.engine.limits import Limits
from tensorwright.errors import EngineError

CONFIG = "config.json"
_MEND_LIMITS = "tensorwright build --checkpoint_dir C --output_dir E, which only writes config.json anew"


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json aside, then put it in place."""
    aside = directory / f".{CONFIG}.{os.getpid()}.part"
    try:
        aside.write_text(json.dumps(config, indent=2) + "\n")
        aside.replace(directory / CONFIG)
    finally:
        aside.unlink(missing_ok=True)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of an engine folder, or EngineError that says what the folder is instead."""
    path = directory / CONFIG
    rebuild = f"tensorwright build --checkpoint_dir C --output_dir {directory}"
    if not path.is_file():
        raise EngineError(f"{directory} is no engine folder: it has no {CONFIG}", mend=rebuild)
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not JSON: {error}", mend=rebuild) from None
    if not isinstance(config, dict) or "build_config" not in config or "pretrained_config" not in config:
        kind, mend = _other_folder(config, directory)
        raise EngineError(f"{path} is not an engine's: expected build_config and pretrained_config; this looks like "
                          f"{kind}", mend=mend or rebuild)
    return config


def limits_of(config: Mapping[str, Any]) -> Limits:
    """The limits in build_config; a missing or senseless one is an EngineError that names it."""
    build = config["build_config"]
    kinds = get_type_hints(Limits)
    for name, kind in kinds.items():
        value: Any = build.get(name) if isinstance(build, dict) else None
        if type(value) is not kind or (kind is int and value < 1):
            expected = "1 or more" if kind is int else f"a {kind.__name__}"
            raise EngineError(f"config.json: build_config.{name} is {value!r}, expected {expected}", mend=_MEND_LIMITS)
    return Limits(**{name: build[name] for name in kinds})


def _other_folder(config: Any, directory: Path) -> tuple[str, str | None]:
    """What a config.json without a build is of, and the command that leads on from there."""
    if isinstance(config, dict) and "quantization" in config:
        return "a checkpoint folder", f"tensorwright build --checkpoint_dir {directory} --output_dir E"
    if isinstance(config, dict) and ("architectures" in config or "model_type" in config):
        return "a model folder", f"tensorwright convert --model_dir {directory} --output_dir C"
    return "something else", None
