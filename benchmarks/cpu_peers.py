"""Fills the table of bars: Tensorwright beside llama.cpp and OpenVINO GenAI on this machine, and by itself.

    python benchmarks/cpu_peers.py                                   # everything; the machine must have nothing to do
    python benchmarks/cpu_peers.py --sections peers_S,own            # these anew; the file keeps the other sections
    python benchmarks/cpu_peers.py --sections none                   # print the table of the file

The first run sets the peers up in environments of their own (minutes: llama.cpp is compiled for this processor) and
makes the model for each, with random weights; later runs reuse both. pip's own variables say where packages come from
(for torch without CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu).

Protocol of peers_*. Every measurement is a fresh process that opens one engine for one batch size, with its files in
the page cache: the time from opening to the first token of a 16-token prompt; a warm-up; then a batch of prompts of
random tokens that were never seen before, answered greedily with --output_len tokens each, prompts in steps of at most
512 tokens. Prefill speed is the prompt's length over the time to the first token, at the smallest batch; decode speed
counts only the time in which all sequences decode; memory is the most that the process had resident, Python and mapped
files included. Engines take turns (A B C A B C ...), memory bandwidth is probed between all samples, figures are
medians. Nothing else may run meanwhile: a thread that waits for a lost core spins, and some engines then collapse.

What differs. int4 weights: symmetric in groups of 128 (Tensorwright, OpenVINO), Q4_0 with groups of 32 (llama.cpp);
lm_head: 8 bits by row (Q8_0 for llama.cpp). KV cache, by each engine's default: 16 bits, OpenVINO 8. Activations meet
the weights as int8 in all three (OpenVINO by DYNAMIC_QUANTIZATION_GROUP_SIZE=128, elsewhere bfloat16). llama.cpp is
driven through its C API by a short Python loop that picks the likeliest token; the others have their own schedulers,
which mix prompts into decode steps: those steps do not count. Only OpenVINO loads a tokenizer, of 259 tokens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import comparison, environments, own, picture
from peers.bars import Bar, markdown
from peers.conditions import ROOT, conditions
from peers.results import read_results, write, write_results
from tensorwright.cli.machine import num_processors, processor_name

ENGINES = tuple(environments.PROGRAMS)
# Title, shape, threads (None: as --threads says) and repeats: a comparison takes minutes for each repeat.
COMPARISONS: dict[str, tuple[str, str, int | None, int]] = {
    "peers_S": ("Model S (Llama, 1.1 B)", "S", None, 5),
    "peers_T": ("Model T (four layers of Mistral-Nemo)", "T", None, 3),
    "peers_S_1": ("Model S, one thread", "S", 1, 3),
    "peers_T_1": ("Model T, one thread", "T", 1, 2),
}
OWN = {"int8": "int8 weights", "long_decode": "Decode after long prompts", "long_prefill": "Long prompts",
       "nemo": "A 12 B model", "build": "Building", "convert": "Converting"}
OWN_REPEATS = 3
SECTIONS = (*COMPARISONS, *OWN)
ALIASES = {"all": SECTIONS, "peers": tuple(COMPARISONS), "own": tuple(OWN), "none": ()}


def main() -> int:
    """Measure the sections, write each as it is done, and print all of the file. The status tells of failures."""
    options = parse()
    shop = own.Workshop(options.work / "own", options.threads)
    results = read_results(options.json, SECTIONS)
    is_whole = True
    for name in options.sections:
        print(f"section {name}", file=sys.stderr, flush=True)
        before, started = conditions(options.work), time.monotonic()
        try:
            found, bars = measure_section(name, options, shop)
        except (subprocess.CalledProcessError, SystemExit) as error:  # a verb of ours has failed; it said why
            print(f"section {name} failed, and is kept as it was: {error}", file=sys.stderr)
            is_whole = False
            continue
        is_whole &= not found.get("failures")
        if options.setup_only:
            continue
        results[name] = {"title": title_of(name, options), **before, "seconds": time.monotonic() - started,
                         "bars": [bar.to_json() for bar in bars], **found}
        write_results(options.json, SECTIONS, results)
    if options.setup_only:
        return 0 if is_whole else 1
    if options.picture and "peers_S" in results:
        title = f"Tokens per second, {results['peers_S']['title']}, int4, {processor_name()}"
        write(options.picture, picture.draw(title, bars_of(results["peers_S"])))
    print(tables(results))
    return 0 if is_whole else 1


def measure_section(name: str, options: argparse.Namespace, shop: own.Workshop) -> tuple[dict[str, Any], list[Bar]]:
    """What a section found, and its bars; with --setup-only nothing, after a comparison's preparations."""
    if name in COMPARISONS:
        _, model, threads, repeats = COMPARISONS[name]
        settings = comparison.Settings(model, threads or options.threads, options.repeats or repeats,
                                       options.batch_sizes, options.input_len, options.output_len, options.peers,
                                       options.work)
        places, failures = comparison.set_up(settings)
        if options.setup_only:
            return {"failures": failures}, []
        return comparison.compare(settings, places, failures)
    repeats = options.repeats or OWN_REPEATS
    measures: dict[str, Callable[[], own.Result]] = {
        "int8": lambda: own.int8(shop, repeats),
        "long_decode": lambda: own.long_decode(shop, repeats, options.long_len // 2),
        "long_prefill": lambda: own.long_prefill(shop, repeats, options.long_len),
        "nemo": lambda: own.nemo(shop), "build": lambda: own.build(shop),
        "convert": lambda: own.conversion(shop, repeats)}
    if options.setup_only:
        return {}, []
    try:
        return measures[name]()
    finally:
        shop.clear()


def title_of(name: str, options: argparse.Namespace) -> str:
    """The heading of a section's table."""
    if name in OWN:
        return f"{OWN[name]}, {options.threads} threads"
    title, _, threads, _ = COMPARISONS[name]
    return title if threads else f"{title}, {options.threads} threads"


def bars_of(section: dict[str, Any]) -> list[Bar]:
    """The bars of a section of the file."""
    return [Bar.from_json(bar) for bar in section["bars"]]


def tables(results: dict[str, Any]) -> str:
    """The bars of every section, and when they were taken: a table for each comparison, one for the rest."""
    parts = [f"**{section['title']}** ({section['date'][:10]}, {section['versions']['commit']})\n\n"
             f"{markdown(bars_of(section))}" for name, section in results.items() if name in COMPARISONS]
    rest = [section for name, section in results.items() if name in OWN]
    if rest:
        taken = sorted({f"{section['date'][:10]}, {section['versions']['commit']}" for section in rest})
        bars = [bar for section in rest for bar in bars_of(section)]
        parts.append(f"**Tensorwright alone** ({'; '.join(taken)})\n\n{markdown(bars)}")
    return "\n\n".join(parts) or "nothing was measured yet"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="all",
                        help=f"what to measure: {', '.join(SECTIONS)}, or {', '.join(ALIASES)} (default: all)")
    parser.add_argument("--threads", type=int, default=num_processors(), help="where a section does not say one thread")
    parser.add_argument("--repeats", type=int, help="of every section (default: 5 for peers_S, 3 or 2 for the others)")
    parser.add_argument("--batch_sizes", default="1,8,16", type=lambda words: tuple(sorted(map(int, words.split(",")))))
    parser.add_argument("--input_len", type=int, default=512, help="tokens of each prompt of a comparison")
    parser.add_argument("--output_len", type=int, default=64, help="new tokens of each sequence of a comparison")
    parser.add_argument("--long_len", type=int, default=8192,
                        help="tokens of the longest prompt; decode is measured after half as many")
    parser.add_argument("--peers", default=ENGINES, type=lambda words: tuple(words.split(",")),
                        help=f"engines to compare (default: {','.join(ENGINES)})")
    parser.add_argument("--work", type=lambda word: Path(word).expanduser().resolve(),
                        default="~/.cache/tensorwright/peers", help="folder of environments and models (default: "
                        "%(default)s)")
    parser.add_argument("--setup-only", action="store_true", help="make environments and models, measure nothing")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_peers.json",
                        help="file of all sections (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="draw the speeds of peers_S as SVG here")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(ENGINES):
        parser.error(f"--peers has {', '.join(sorted(unknown))}; known are {', '.join(ENGINES)}")
    names = [name for word in options.sections.split(",") for name in ALIASES.get(word, (word,))]
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--sections has {', '.join(sorted(unknown))}; known are {', '.join((*SECTIONS, *ALIASES))}")
    options.sections = [name for name in SECTIONS if name in names]
    return options


if __name__ == "__main__":
    sys.exit(main())
