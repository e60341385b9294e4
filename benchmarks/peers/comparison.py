"""Measures engines side by side: set up, take turns, every sample between two probes of the memory's bandwidth.

It knows the protocol's settings and the order of samples; engines and models are `environments.py`'s matter, what is
made of the samples that of `figures.py`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu import COMMON, SHAPES
from peers import environments, figures
from peers.bars import OURS, Bar
from peers.conditions import busy_processors, fill_page_cache, plain
from peers.protocol import SHORT_PROMPT, STEP_TOKENS
from tensorwright.cli.bandwidth import read_bandwidth
from tensorwright.cli.bench import time_per_token
from tensorwright.errors import UsageError

MODEL_TYPES = {"S": ("LlamaForCausalLM", "llama"), "T": ("MistralForCausalLM", "mistral"),
               "nemo": ("MistralForCausalLM", "mistral")}
PACKAGE_NAMES = {name: (*(package.split("==")[0] for package in packages), "openvino", "numpy")
                 for name, packages in environments.PACKAGES.items()}
SPARE_TOKENS = 64  # a KV block more for each sequence, which the scheduler keeps free before it admits another
LIMIT_S = 1800  # a measurement that takes longer has failed


@dataclass(frozen=True)
class Settings:
    """One comparison: a model, its threads and lengths, and who takes part."""

    model: str
    threads: int
    repeats: int
    batch_sizes: tuple[int, ...]
    input_len: int
    output_len: int
    peers: tuple[str, ...]
    work: Path


def compare(settings: Settings, places: Mapping[str, environments.Place],
            failures: Mapping[str, str]) -> tuple[dict[str, Any], list[Bar]]:
    """All that the JSON file holds of it, and the bars."""
    samples = measure_all(places, settings)
    found = figures.medians(samples)
    table = list(figures.speed_bars(found))
    if settings.threads > 1 and OURS in places:  # what one thread needs of memory is the same
        weights = sum(file.stat().st_size for file in places[OURS].model.glob("rank*.engine"))
        table += figures.memory_bars(found, SHAPES[settings.model], is_small=settings.model == "S",
                                     length=settings.input_len + settings.output_len, weight_bytes=weights)
    first, work = settings.batch_sizes[0], settings.work
    return {
        "settings": {name: getattr(settings, name) for name in ("model", "threads", "repeats", "batch_sizes",
                                                                "input_len", "output_len")},
        "config": model_config(settings.model),
        "packages": {name: place.versions(PACKAGE_NAMES[name]) for name, place in places.items()
                     if name in PACKAGE_NAMES},
        "setup": {name: [plain(str(step), work) for step in place.steps] for name, place in places.items()},
        "measure": {name: plain(shlex.join(measure_command(place, first, settings)), work)
                    for name, place in places.items()},
        "failures": {**{name: plain(why, work) for name, why in failures.items()},
                     **{f"{sample['engine']}, batch {sample['batch']}": sample["error"] for sample in samples
                        if "error" in sample}},
        "samples": samples, "medians": found}, table


def set_up(settings: Settings) -> tuple[dict[str, environments.Place], dict[str, str]]:
    """The engines that are ready, and why the others are not."""
    folder = settings.work / "models" / settings.model
    folder.mkdir(parents=True, exist_ok=True)
    length = max(settings.input_len, SHORT_PROMPT) + settings.output_len + SPARE_TOKENS
    limits = ("--max_batch_size", str(max(settings.batch_sizes)), "--max_seq_len", str(length),
              "--max_num_tokens", str(STEP_TOKENS))
    places, failures = {}, {}
    for name in settings.peers:
        place = environments.place(name, settings.work, model_config(settings.model), folder, limits)
        try:
            place.set_up(settings.work / "setup.log")
        except (environments.SetupError, OSError, subprocess.SubprocessError) as error:
            failures[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            places[name] = place
    return places, failures


def model_config(name: str) -> dict[str, Any]:
    """The Hugging Face config of a shape."""
    architecture, model_type = MODEL_TYPES[name]
    config = {**COMMON, **SHAPES[name], "architectures": [architecture], "model_type": model_type}
    return {**config, "sliding_window": None} if model_type == "mistral" else config


def measure_all(places: Mapping[str, environments.Place], settings: Settings) -> list[dict[str, Any]]:
    """Every sample, in the order of time."""
    samples: list[dict[str, Any]] = []
    bandwidth = read_bandwidth(settings.threads)
    for repeat in range(settings.repeats):
        for batch in settings.batch_sizes:
            for name, place in places.items():
                figures_of_it = sample_of(name, place, batch, settings, bandwidth)
                bandwidth = figures_of_it["bandwidth_after"]
                samples.append({"engine": name, "batch": batch, "repeat": repeat, **figures_of_it})
                print(describe(samples[-1]), file=sys.stderr, flush=True)
    return samples


def sample_of(name: str, place: environments.Place, batch: int, settings: Settings, before: float) -> dict[str, Any]:
    """One measurement; `before`: the bandwidth after the one before it. Of one that fails, the reason."""
    fill_page_cache(place.model)
    busy, started = busy_processors(), time.monotonic()
    error, output = "", ""
    try:
        result = subprocess.run(measure_command(place, batch, settings), capture_output=True, text=True, check=False,
                                timeout=LIMIT_S, env=variables(name))
    except subprocess.TimeoutExpired:
        error = f"not done after {LIMIT_S} s"
    else:
        output = result.stdout
        if result.returncode != 0:
            error = f"exit status {result.returncode}: {' / '.join(result.stderr.splitlines()[-5:])}"
    wall_s = time.monotonic() - started
    after = read_bandwidth(settings.threads)
    around = {"wall_s": wall_s, "busy_before": busy, "bandwidth_before": before, "bandwidth_after": after}
    if error:
        return {"error": error, **around}
    try:
        return {**around, **reduce(name, json.loads(output.splitlines()[-1]), batch, (before + after) / 2, settings)}
    except UsageError as problem:  # the sequences never decoded together
        return {"error": str(problem), **around}


def reduce(name: str, raw: dict[str, Any], batch: int, bandwidth: float, settings: Settings) -> dict[str, Any]:
    """From the moments of all tokens to the figures of a sample."""
    events = raw.pop("events")
    last_first = max(next(moment for owner, moment, _ in events if owner == sequence) for sequence in range(batch))
    step_s = time_per_token(events)
    kv_tokens = batch * (settings.input_len + settings.output_len / 2)
    num_bytes = figures.step_bytes(SHAPES[settings.model], figures.FORMATS[name], kv_tokens)
    return {**raw, "prefill_s": last_first, "prefill_tok_s": batch * settings.input_len / last_first,
            "decode_step_s": step_s, "decode_tok_s": batch / step_s, "decode_step_bytes": num_bytes,
            "limit_share": num_bytes / step_s / bandwidth}


def measure_command(place: environments.Place, batch: int, settings: Settings) -> list[str]:
    """The fresh process: equal but for the program and the model; the seed is, too, so prompts are equal."""
    numbers = {"threads": settings.threads, "batch": batch, "input_len": settings.input_len,
               "output_len": settings.output_len, "vocab_size": SHAPES[settings.model]["vocab_size"], "seed": batch}
    return [str(place.python), str(place.program), "--model", str(place.model),
            *(word for key, value in numbers.items() for word in (f"--{key}", str(value)))]


def variables(name: str) -> dict[str, str]:
    """The environment of a measurement; what Python finds here is not for the peers."""
    return {key: value for key, value in os.environ.items() if name == OURS or key != "PYTHONPATH"}


def describe(sample: Mapping[str, Any]) -> str:
    """One line about a sample, as it comes."""
    words = f"{sample['engine']}, batch {sample['batch']}, repeat {sample['repeat']}: "
    if "error" in sample:
        return f"{words}{sample['error']}"
    return words + (f"open to first token {sample['open_to_first_token_s']:.2f} s, prefill "
                    f"{sample['prefill_tok_s']:.0f} tok/s, decode {sample['decode_tok_s']:.1f} tok/s "
                    f"({sample['limit_share']:.2f} of the limit), peak {sample['peak_memory_bytes'] / 1e9:.2f} GB, "
                    f"bandwidth {sample['bandwidth_before'] / 1e9:.0f} and {sample['bandwidth_after'] / 1e9:.0f} GB/s, "
                    f"others kept {sample['busy_before']:.2f} processors busy")
