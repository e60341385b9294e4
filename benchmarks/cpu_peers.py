"""Compares Tensorwright with llama.cpp and OpenVINO GenAI on this machine: same shape, threads, prompts and lengths.

    python benchmarks/cpu_peers.py --model S --threads 2 --repeats 5 --json benchmarks/results/cpu_peers.json

The first run sets the peers up in environments of their own (minutes: llama.cpp is compiled for this processor) and
makes the model for each, with random weights; later runs reuse both. pip's own variables say where packages come from
(for torch without CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu).

Protocol. Every measurement is a fresh process that opens one engine for one batch size, with its files in the page
cache: the time from opening to the first token of a 16-token prompt; a warm-up; then a batch of prompts of random
tokens that were never seen before, answered greedily with --output_len tokens each, prompts in steps of at most 512
tokens. Prefill speed is the prompt's length over the time to the first token, at the smallest batch; decode speed
counts only the time in which all sequences decode; memory is the most that the process had resident, Python and mapped
files included. Engines take turns (A B C A B C ...), memory bandwidth is probed before and after each, figures are
medians. Nothing else may run meanwhile: a thread that waits for a lost core spins, and some engines then collapse.

What differs. int4 weights: symmetric in groups of 128 (Tensorwright, OpenVINO), Q4_0 with groups of 32 (llama.cpp);
lm_head: 8 bits by row (Q8_0 for llama.cpp). KV cache, by each engine's default: 16 bits, OpenVINO 8. Activations meet
the weights as int8 in all three (OpenVINO by DYNAMIC_QUANTIZATION_GROUP_SIZE=128, elsewhere bfloat16). llama.cpp is
driven through its C API by a short Python loop that picks the likeliest token; the others have their own schedulers,
which mix prompts into decode steps: those steps do not count. Only OpenVINO loads a tokenizer, of 259 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tensorwright
from cpu import COMMON, SHAPES
from peers import environments, figures, picture
from peers.protocol import SHORT_PROMPT, STEP_TOKENS
from tensorwright.cli.bandwidth import read_bandwidth
from tensorwright.cli.bench import time_per_token
from tensorwright.cli.machine import num_processors, processor_name, total_bytes
from tensorwright.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
ENGINES = tuple(environments.PROGRAMS)
MODEL_TYPES = {"S": ("LlamaForCausalLM", "llama"), "T": ("MistralForCausalLM", "mistral")}
PACKAGE_NAMES = {name: (*(package.split("==")[0] for package in packages), "openvino", "numpy")
                 for name, packages in environments.PACKAGES.items()}
SPARE_TOKENS = 64  # a KV block more for each sequence, which the scheduler keeps free before it admits another
LIMIT_S = 1800  # a measurement that takes longer has failed


def model_config(name: str) -> dict[str, Any]:
    """The Hugging Face config of a shape."""
    architecture, model_type = MODEL_TYPES[name]
    config = {**COMMON, **SHAPES[name], "architectures": [architecture], "model_type": model_type}
    return {**config, "sliding_window": None} if model_type == "mistral" else config


def set_up(options: argparse.Namespace) -> tuple[dict[str, environments.Place], dict[str, str]]:
    """The engines that are ready, and why the others are not."""
    work = options.work.expanduser().resolve()
    folder = work / "models" / options.model
    folder.mkdir(parents=True, exist_ok=True)
    length = max(options.input_len, SHORT_PROMPT) + options.output_len + SPARE_TOKENS
    limits = ("--max_batch_size", str(max(options.batch_sizes)), "--max_seq_len", str(length),
              "--max_num_tokens", str(STEP_TOKENS))
    places, failures = {}, {}
    for name in options.peers:
        place = environments.place(name, work, model_config(options.model), folder, limits)
        try:
            place.set_up(work / "setup.log")
        except (environments.SetupError, OSError, subprocess.SubprocessError) as error:
            failures[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            places[name] = place
    return places, failures


def measure_all(places: dict[str, environments.Place], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every sample, in the order of time."""
    samples = []
    for repeat in range(options.repeats):
        for batch in options.batch_sizes:
            for name, place in places.items():
                sample = {"engine": name, "batch": batch, "repeat": repeat, **sample_of(name, place, batch, options)}
                samples.append(sample)
                print(describe(sample), file=sys.stderr, flush=True)
    return samples


def sample_of(name: str, place: environments.Place, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement between two probes of bandwidth; of one that fails, the reason."""
    fill_page_cache(place.model)
    busy = busy_processors()
    before = read_bandwidth(options.threads)
    started = time.monotonic()
    try:
        result = subprocess.run(measure_command(place, batch, options), capture_output=True, text=True, check=False,
                                timeout=LIMIT_S, env=variables(name))
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LIMIT_S} s"}
    if result.returncode != 0:
        return {"error": f"exit status {result.returncode}: {' / '.join(result.stderr.splitlines()[-5:])}"}
    wall_s = time.monotonic() - started
    bandwidth = before, read_bandwidth(options.threads)
    raw = json.loads(result.stdout.splitlines()[-1])
    try:
        reduced = reduce(name, raw, batch, sum(bandwidth) / 2, options)
    except UsageError as error:  # the sequences never decoded together
        return {"error": str(error)}
    return {"wall_s": wall_s, "busy_before": busy, "bandwidth_before": before,
            "bandwidth_after": bandwidth[1], **reduced}


def reduce(name: str, raw: dict[str, Any], batch: int, bandwidth: float, options: argparse.Namespace) -> dict[str, Any]:
    """From the moments of all tokens to the figures of a sample."""
    events = raw.pop("events")
    last_first = max(next(moment for owner, moment, _ in events if owner == sequence) for sequence in range(batch))
    step_s = time_per_token(events)
    kv_tokens = batch * (options.input_len + options.output_len / 2)
    num_bytes = figures.step_bytes(SHAPES[options.model], figures.FORMATS[name], kv_tokens)
    return {**raw, "prefill_s": last_first, "prefill_tok_s": batch * options.input_len / last_first,
            "decode_step_s": step_s, "decode_tok_s": batch / step_s, "decode_step_bytes": num_bytes,
            "limit_share": num_bytes / step_s / bandwidth}


def measure_command(place: environments.Place, batch: int, options: argparse.Namespace) -> list[str]:
    """The fresh process: equal but for the program and the model; the seed is, too, so prompts are equal."""
    numbers = {"threads": options.threads, "batch": batch, "input_len": options.input_len,
               "output_len": options.output_len, "vocab_size": SHAPES[options.model]["vocab_size"], "seed": batch}
    return [str(place.python), str(place.program), "--model", str(place.model),
            *(word for key, value in numbers.items() for word in (f"--{key}", str(value)))]


def variables(name: str) -> dict[str, str]:
    """The environment of a measurement; what Python finds here is not for the peers."""
    return {key: value for key, value in os.environ.items() if name == "tensorwright" or key != "PYTHONPATH"}


def fill_page_cache(model: Path) -> None:
    """Read the model's files once, so that no measurement waits for the disk."""
    for file in [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def describe(sample: dict[str, Any]) -> str:
    """One line about a sample, as it comes."""
    words: str = f"{sample['engine']}, batch {sample['batch']}, repeat {sample['repeat']}: "
    if "error" in sample:
        return f"{words}{sample['error']}"
    return words + (f"open to first token {sample['open_to_first_token_s']:.2f} s, prefill "
                    f"{sample['prefill_tok_s']:.0f} tok/s, decode {sample['decode_tok_s']:.1f} tok/s "
                    f"({sample['limit_share']:.2f} of the limit), peak {sample['peak_memory_bytes'] / 1e9:.2f} GB, "
                    f"bandwidth {sample['bandwidth_before'] / 1e9:.0f} and {sample['bandwidth_after'] / 1e9:.0f} GB/s, "
                    f"others kept {sample['busy_before']:.2f} processors busy")


def busy_processors(seconds: float = 0.5) -> float:
    """How many processors others keep busy while this program waits; more than a few hundredths spoil a sample."""
    def idle_s() -> float:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for the disk

    before, started = idle_s(), time.monotonic()
    time.sleep(seconds)
    return max(0.0, (os.cpu_count() or 1) - (idle_s() - before) / (time.monotonic() - started))


def machine() -> dict[str, Any]:
    """What the figures hold for, and how busy it was before."""
    return {"processor": processor_name(), "processors": num_processors(), "memory_bytes": total_bytes(),
            "kernel": platform.release(), "load_average_before": os.getloadavg()}


def plain(command: str, options: argparse.Namespace) -> str:
    """A command for others to read: without the folders of this machine."""
    work = str(options.work.expanduser().resolve())
    for path, name in ((sys.executable, "python"), (work, "WORK"), (f"{ROOT}/", "")):
        command = command.replace(path, name)
    return command


def report(places: dict[str, environments.Place], failures: dict[str, str], samples: list[dict[str, Any]],
           options: argparse.Namespace) -> tuple[dict[str, Any], list[figures.Bar]]:
    """All that the JSON file holds, and the bars."""
    found = figures.medians(samples)
    engine = places.get("tensorwright")
    weights = sum(file.stat().st_size for file in engine.model.glob("rank*.engine")) if engine else 0
    table = list(figures.bars(found, SHAPES[options.model], is_small=options.model == "S",
                              length=options.input_len + options.output_len, weight_bytes=weights))
    first = options.batch_sizes[0]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": plain(shlex.join(["python", *sys.argv]), options),
        "settings": {key: value for key, value in vars(options).items()
                     if key in ("model", "threads", "repeats", "batch_sizes", "input_len", "output_len")},
        "config": model_config(options.model),
        "versions": {"tensorwright": tensorwright.__version__,
                     **{name: place.versions(PACKAGE_NAMES[name]) for name, place in places.items()
                        if name in PACKAGE_NAMES}},
        "setup": {name: [plain(str(step), options) for step in place.steps] for name, place in places.items()},
        "measure": {name: plain(shlex.join(measure_command(place, first, options)), options)
                    for name, place in places.items()},
        "failures": {name: plain(why, options) for name, why in failures.items()},
        "samples": samples, "medians": found,
        "bars": [{"title": bar.title, "unit": bar.unit, **bar.values, "ratio": bar.ratio, "must": bar.must,
                  "aim": bar.aim, "reached": bar.result} for bar in table],
    }, table


def write(path: Path, text: str) -> None:
    """The file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODEL_TYPES), default="S",
                        help="S: a Llama of 1.1 B parameters; T: four layers of Mistral-Nemo")
    parser.add_argument("--threads", type=int, default=num_processors())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_sizes", default="1,8,16", type=lambda words: sorted(map(int, words.split(","))))
    parser.add_argument("--input_len", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--output_len", type=int, default=64, help="new tokens of each sequence")
    parser.add_argument("--peers", default=ENGINES, type=lambda words: tuple(words.split(",")),
                        help=f"engines to measure (default: {','.join(ENGINES)})")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/tensorwright/peers"),
                        help="folder of environments and models (default: %(default)s)")
    parser.add_argument("--setup-only", action="store_true", help="make environments and models, measure nothing")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--picture", type=Path, help="draw the speeds as SVG here")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(ENGINES):
        parser.error(f"--peers has {', '.join(sorted(unknown))}; known are {', '.join(ENGINES)}")
    return options


def main() -> int:
    """Set up, measure, write, and print the table. The status tells whether every engine was measured."""
    options = parse()
    places, failures = set_up(options)
    if options.setup_only:
        return 1 if failures else 0
    before = machine()
    samples = measure_all(places, options)
    everything, table = report(places, failures, samples, options)
    if options.json:
        write(options.json, json.dumps({"machine": before, **everything}, indent=1) + "\n")
    if options.picture:
        title = f"Tokens per second, model {options.model}, int4, {options.threads} threads, {processor_name()}"
        write(options.picture, picture.draw(title, table))
    print(figures.markdown(table))
    return 1 if failures or any("error" in sample for sample in samples) else 0


if __name__ == "__main__":
    sys.exit(main())
