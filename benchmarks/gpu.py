"""Fills the table of bars of NVIDIA GPUs: an engine of Mistral-Nemo's shape, by itself, beside vLLM's own figures.

    python benchmarks/gpu.py                                  # everything, in minutes; nothing else may use the GPU
    python benchmarks/gpu.py --sections int4,start            # these anew; the file keeps the other sections
    python benchmarks/gpu.py --sections none                  # print the table of the file

Weights are random, prompts random token ids that were never seen before, end ids ignored; everything goes through
`LLM.generate` in a fresh process for each engine (gpu_table/worker.py says what each figure is). Medians of --repeats
after a warm-up. The limit of a decode step is its bytes (weights without the embedding table, keys and values at the
mean context) at the rate of a streaming read that is measured in the same process.

    int4      the headline: build, then all figures of an int4 engine
    start     fresh processes, from their start to the first token of that engine
    schemes   other weights, lm_heads and KV caches
    convert   a float16 model's files written first, then convert to int4 and build
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import convert
from cpu import command
from gpu_table import goals, processes, schemes
from gpu_table.conditions import gpu_conditions
from gpu_table.schemes import HEADLINE, SCHEMES
from peers import picture
from peers.bars import OURS, Bar, markdown
from peers.conditions import ROOT, conditions
from peers.results import read_results, write, write_results
from tensorwright.cli.machine import free_disk_bytes

SECTIONS = ("int4", "start", "schemes", "convert")
TITLES = {"int4": "int4 engine", "start": "Start to first token", "schemes": "Other schemes",
          "convert": "Converting and building"}
SCHEME_FIGURES = ("limits", "memory", "tpot:1:128", "tpot:16:128", "tpot:64:128", "prefill:16:1024")
NEMO_LAYERS = 40
ENGINE_LIMIT_S, SCHEME_LIMIT_S = 150, 60

Found = tuple[dict[str, Any], list[Bar]]


def main() -> int:
    """Measure the sections, write each as it is done, and print all of the file. The status tells of failures."""
    options = parse()
    results = read_results(options.json, SECTIONS)
    is_whole = True
    with tempfile.TemporaryDirectory(dir=options.work, prefix="tensorwright-gpu-") as folder:
        engines = processes.Engines(Path(folder), options.layers, options.target)
        measures: dict[str, Callable[[], Iterator[Found]]] = {
            "int4": lambda: int4(engines, options), "start": lambda: start(engines),
            "schemes": lambda: other_schemes(engines, options), "convert": lambda: convert_and_build(engines)}
        for name in options.sections:
            started = time.monotonic()
            before = {"title": TITLES[name], **conditions(options.work), **gpu_conditions()}
            before["versions"]["commit"] = options.commit or before["versions"]["commit"]
            try:
                for found, bars in measures[name]():
                    results[name] = {**before, "layers": options.layers, "seconds": time.monotonic() - started,
                                     "bars": [bar.to_json() for bar in bars], **found}
                    write_results(options.json, SECTIONS, results)
            except (subprocess.CalledProcessError, OSError) as error:  # a verb has failed, and said why
                print(f"section {name} failed: {error}", file=sys.stderr)
                is_whole = False
            is_whole &= "failure" not in str(results.get(name))
    if options.picture and "int4" in results:
        write(options.picture, picture.draw(_picture_title(results["int4"]), speeds(results)))
    print(tables(results))
    return 0 if is_whole else 1


def int4(engines: processes.Engines, options: argparse.Namespace) -> Iterator[Found]:
    """The headline engine, alone on the machine."""
    engines.build([HEADLINE])
    built = engines.made[HEADLINE]
    figures = processes.measure(built, ["limits", "memory", *(goal.figure for goal in goals.GOALS)],
                                new_tokens=options.new_tokens, repeats=options.repeats, limit_s=ENGINE_LIMIT_S)
    bars = [goal.bar(goals.value_of(goal, figures)) for goal in goals.GOALS]
    yield {"build_s": built.seconds, "figures": figures, "limits": schemes.shares(figures)}, bars


def start(engines: processes.Engines) -> Iterator[Found]:
    """What a user waits for."""
    engines.build([HEADLINE])
    found = processes.first_tokens(engines.made[HEADLINE].folder)
    yield found, [goals.FIRST_TOKEN.bar(found["whole_s"])]


def other_schemes(engines: processes.Engines, options: argparse.Namespace) -> Iterator[Found]:
    """Each engine's figures, as soon as they are known. Engines are built side by side while the disk has room."""
    engines.remove(HEADLINE)
    found: dict[str, Any] = {}
    names = [name for name in SCHEMES if name != HEADLINE and name in options.schemes]
    for group in groups(names, free_disk_bytes(engines.folder) // 10**9 - 4):
        engines.build(group)
        for name in group:
            built = engines.made[name]
            figures = processes.measure(built, SCHEME_FIGURES, new_tokens=options.new_tokens,
                                        repeats=options.repeats, limit_s=SCHEME_LIMIT_S)
            engines.remove(name)
            found[name] = {"title": SCHEMES[name].title, "build_s": built.seconds, "figures": figures,
                           "limits": schemes.shares(figures)}
            fp8 = [goals.FP8_PREFILL.bar(goals.value_of(goals.FP8_PREFILL, found["fp8"]["figures"]))
                   ] if "fp8" in found else []
            yield {"schemes": dict(found)}, fp8


def groups(names: Sequence[str], gigabytes: int) -> list[list[str]]:
    """In order, as many at a time as fit; each group has one at least."""
    found: list[list[str]] = []
    for name in names:
        if found and sum(SCHEMES[each].gigabytes for each in (*found[-1], name)) <= gigabytes:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def convert_and_build(engines: processes.Engines) -> Iterator[Found]:
    """The files of a float16 model are written first, and lie in the page cache if they fit there."""
    for name in list(engines.made):
        engines.remove(name)
    model, checkpoint, engine = (engines.folder / part for part in ("model", "checkpoint", "engine"))
    started = time.monotonic()
    num_bytes = convert.write_model(model, engines.layers)
    found: dict[str, Any] = {"model_bytes": num_bytes, "write_model_s": time.monotonic() - started}
    found["convert_s"] = command("convert", "--model_dir", model, "--output_dir", checkpoint, "--dtype", "float16",
                                 *SCHEMES[HEADLINE].convert)
    shutil.rmtree(model)
    found["build_s"] = command("build", "--checkpoint_dir", checkpoint, "--output_dir", engine, "--target",
                               engines.target, *schemes.LIMITS)
    yield found, [goals.CONVERT_BUILD.bar(found["convert_s"] + found["build_s"])]


def tables(results: Mapping[str, Any]) -> str:
    """The bars, then the schemes with their shares of the limit."""
    parts = []
    bars = [Bar.from_json(bar) for section in results.values() for bar in section["bars"]]
    taken = sorted({f"{s['date'][:10]}, {s['gpu']['name']}, {s['versions']['commit']}"
                    + (f", a trial of {s['layers']} layers" if s["layers"] < NEMO_LAYERS else "")
                    for s in results.values()})
    if bars:
        parts.append(f"**Mistral-Nemo's shape, int4** ({'; '.join(taken)})\n\n{markdown(bars)}")
    engines = {HEADLINE: {**results["int4"], "title": SCHEMES[HEADLINE].title}} if "int4" in results else {}
    engines |= results.get("schemes", {}).get("schemes", {})
    if engines:
        parts.append(scheme_table(engines))
    return "\n\n".join(parts) or "nothing was measured yet"


def scheme_table(engines: Mapping[str, Any]) -> str:
    """A line for each engine: ms a step and the share of the limit, prefill's tokens per second."""
    steps = [figure for figure in SCHEME_FIGURES if figure.startswith("tpot")]
    batches = [f"batch {figure.split(':')[1]}" for figure in steps]
    header = ["ms a step (share of its limit)", *batches, "prefill, tok/s"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for engine in engines.values():
        figures, limits = engine["figures"], engine["limits"]
        cells = [f"{1e3 * figures[step]['tpot_s']:.2f} ({limits[step]['share']:.0%})" if step in limits else "failed"
                 for step in steps]
        prefill = figures.get("prefill:16:1024", {}).get("tokens_s")
        lines.append(f"| {' | '.join([engine['title'], *cells, f'{prefill:.0f}' if prefill else 'failed'])} |")
    return "\n".join(lines)


def speeds(results: Mapping[str, Any]) -> list[Bar]:
    """The int4 section's bars as tokens per second, for the picture."""
    found = []
    for bar in map(Bar.from_json, results["int4"]["bars"]):
        batch = int(bar.title.split("batch ")[1].split(",")[0]) if bar.unit == "ms" else 0
        values = {name: 1e3 * batch / value if batch else value for name, value in bar.values.items()}
        found.append(Bar(bar.title.partition(", 512")[0].replace("TPOT, ", ""), "tok/s", values))
    return [bar for bar in found if OURS in bar.values]


def _picture_title(section: Mapping[str, Any]) -> str:
    return f"Tokens per second, Mistral-Nemo's shape (12 B), {section['gpu']['name']}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="all", help=f"what to measure: {', '.join(SECTIONS)}, all or none")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="engines of that section (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=NEMO_LAYERS, help="fewer than 40 for a trial")
    parser.add_argument("--new_tokens", type=int, default=256, help="decode steps of a sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--target", default="native")
    parser.add_argument("--work", type=Path, help="folder for models and engines, 45 GB (default: the system's own)")
    parser.add_argument("--commit", help="to note where there is no git")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json",
                        help="file of all sections (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="draw the speeds of section int4 as SVG here")
    options = parser.parse_args()
    names = {"all": SECTIONS, "none": ()}.get(options.sections, tuple(options.sections.split(",")))
    options.schemes = options.schemes.split(",")
    if unknown := {*names} - {*SECTIONS} | {*options.schemes} - {*SCHEMES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; sections are {', '.join(SECTIONS)}, schemes "
                     f"{', '.join(SCHEMES)}")
    options.sections = [name for name in SECTIONS if name in names]
    return options


if __name__ == "__main__":
    sys.exit(main())
