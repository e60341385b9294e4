"""`--build_config X.json`: the settings of upstream's JSON form as options of this builder.

It knows the field names that upstream writes, also inside an engine's config.json, and no command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorwright.errors import UsageError

NUMBERS = ("max_input_len", "max_seq_len", "max_batch_size", "max_beam_width", "max_num_tokens", "opt_num_tokens")
SWITCHES = ("exact", "fp8_activations", "gather_context_logits", "gather_generation_logits")
PLUGIN_SWITCHES = ("remove_input_padding", "context_fmha", "paged_kv_cache")
VERBOSITIES = ("layer_names_only", "detailed", "none")

UNSUPPORTED = {  # setting: values that leave it off
    "speculative_decoding_mode": (None, 0, 1, "none", "NONE"), "max_draft_len": (None, 0),
    "max_prompt_embedding_table_size": (None, 0), "use_strip_plan": (None, False),
    "lora_plugin": (None, False, "disable"), "streamingllm": (None, False, "disable"),
}


def read_build_config(path: Path) -> tuple[dict[str, Any], int]:
    """Options by name, and how many other settings were left aside. UsageError when it cannot be read or meant."""
    settings = _settings(path)
    plugins = settings.get("plugin_config") or {}
    for name, off in UNSUPPORTED.items():
        value = {**settings, **plugins}.get(name)
        if value not in off:
            raise UsageError(f"{path}: {name} {value!r} is not supported")
    options: dict[str, Any] = {name: _number(path, settings, name) for name in NUMBERS}
    options["tokens_per_block"] = _number(path, plugins, "tokens_per_block")
    for names, source in ((SWITCHES, settings), (PLUGIN_SWITCHES, plugins)):
        options.update({name: _switch(path, source, name) for name in names})
    options["kv_cache_type"] = _word(path, settings, "kv_cache_type", ("continuous", "paged", "disabled"))
    options["profiling_verbosity"] = _word(path, settings, "profiling_verbosity", VERBOSITIES)
    left_aside = (set(settings) | set(plugins)) - set(options) - set(UNSUPPORTED) - {"plugin_config"}
    return {name: value for name, value in options.items() if value is not None}, len(left_aside)


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--build_config {path} cannot be read: {error}") from error
    if isinstance(content, dict):
        content = content.get("build_config", content)
    if not isinstance(content, dict) or not isinstance(content.get("plugin_config") or {}, dict):
        raise UsageError(f"--build_config {path}: expected an object of settings")
    return content


def _number(path: Path, settings: Mapping[str, Any], name: str) -> int | None:
    value = settings.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UsageError(f"{path}: {name} must be a whole number; got {value!r}")
    return value


def _switch(path: Path, settings: Mapping[str, Any], name: str) -> bool | None:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{path}: {name} must be true or false; got {value!r}")
    return value


def _word(path: Path, settings: Mapping[str, Any], name: str, words: tuple[str, ...]) -> str | None:
    value = settings.get(name)
    if value is not None and str(value).lower() not in words:
        raise UsageError(f"{path}: {name} must be one of {', '.join(words)}; got {value!r}")
    return None if value is None else str(value).lower()
