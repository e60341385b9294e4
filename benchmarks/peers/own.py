"""Figures of our engine alone: int8 weights, long contexts, a 12 B model, building and converting.

Every figure comes from a verb of the command line in a fresh process; `bench` measures the machine's limits in the same
run. It knows shapes, options and what is asked of each, and no peer.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import convert
from cpu import ALGORITHMS, command
from peers.bars import OURS, Bar
from peers.comparison import model_config

Result = tuple[dict[str, Any], list[Bar]]
SHORT, ANSWER = 512, 64  # tokens of prompts and answers, as in the comparison


@dataclass(frozen=True)
class Workshop:
    """Makes checkpoints and engines, each once until it is cleared, and measures engines."""

    folder: Path
    threads: int
    made: set[Path] = field(default_factory=set)

    def checkpoint(self, shape: str, algorithm: str = "int4", *options: str) -> Path:
        """A checkpoint folder with random weights."""
        output = self.folder / "-".join([shape, algorithm, *(option.strip("-") for option in options), "checkpoint"])
        if output not in self.made:
            model = self.folder / f"{shape}-config"
            model.mkdir(parents=True, exist_ok=True)
            (model / "config.json").write_text(json.dumps(model_config(shape)))
            command("convert", "--model_dir", model, "--output_dir", output, "--dummy_weights", "--dtype", "float16",
                    *ALGORITHMS[algorithm], *options)
            self.made.add(output)
        return output

    def engine(self, checkpoint: Path, max_batch_size: int, max_seq_len: int) -> Path:
        """An engine folder with these limits."""
        output = checkpoint.with_name(f"{checkpoint.name.removesuffix('checkpoint')}{max_batch_size}x{max_seq_len}")
        if output not in self.made:
            command("build", "--checkpoint_dir", checkpoint, "--output_dir", output, "--max_batch_size", max_batch_size,
                    "--max_seq_len", max_seq_len)
            self.made.add(output)
        return output

    def bench(self, engine: Path, batch_sizes: str, input_len: int, output_len: int) -> dict[str, Any]:
        """One run of `bench`, each figure taken once."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "bench.json"
            command("bench", "--engine_dir", engine, "--batch_sizes", batch_sizes, "--input_len", input_len,
                    "--output_len", output_len, "--threads", self.threads, "--repeats", 1, "--json", file)
            result: dict[str, Any] = json.loads(file.read_text())
        return {**result, "engine_dir": engine.name}

    def clear(self) -> None:
        """Remove everything: models of several gigabytes are made again in seconds."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.made.clear()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the same disk that is removed afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(folder)


def int8(shop: Workshop, repeats: int) -> Result:
    """Model S with int8 weights and 16-bit activations at the interfaces (W8A16), and int4's share beside it."""
    engines = [shop.engine(shop.checkpoint("S", name), 1, SHORT + 2 * ANSWER) for name in ("int8", "int4")]
    both = [[shop.bench(engine, "1", SHORT, ANSWER) for engine in engines] for _ in range(repeats)]
    runs, int4_runs = ([pair[index] for pair in both] for index in (0, 1))
    return {"runs": runs, "int4_runs": int4_runs}, [
        Bar("S, int4, decode, batch 1", "of the bandwidth", {OURS: _decode(int4_runs, "share_of_bandwidth")}, aim=0.95),
        Bar("S, W8A16, decode, batch 1", "of the bandwidth", {OURS: _decode(runs, "share_of_bandwidth")}, 0.9),
        Bar("S, W8A16, decode, batch 1", "tok/s", {OURS: _decode(runs, "tok_s")}),
        Bar("S, W8A16, prefill", "tok/s", {OURS: _prefill(runs, "tok_s")})]


def long_decode(shop: Workshop, repeats: int, length: int) -> Result:
    """Model S after a long prompt, with a 16-bit and an int8 KV cache; their bytes count."""
    engines = {name: shop.engine(shop.checkpoint("S", "int4", *options), 1, 2 * length + 2 * ANSWER)
               for name, options in (("16-bit KV", ()), ("int8 KV", ("--int8_kv_cache",)))}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            runs[name].append(shop.bench(engine, "1", length, ANSWER))
    bars = []
    for name, found in runs.items():
        title = f"S, decode after {length} tokens, {name}"
        bars += [Bar(title, "of the bandwidth", {OURS: _decode(found, "share_of_bandwidth")}, 0.85),
                 Bar(title, "tok/s", {OURS: _decode(found, "tok_s")})]
    return {"runs": runs}, bars


def long_prefill(shop: Workshop, repeats: int, length: int) -> Result:
    """Prefill of a long prompt against that of 512 tokens, taken in turn."""
    bars, runs = [], {}
    for shape, must in (("S", 0.6), ("T", 0.75)):
        engine = shop.engine(shop.checkpoint(shape), 1, length + 2 * ANSWER)
        short, long = [], []
        for _ in range(repeats):
            short.append(shop.bench(engine, "1", SHORT, 2))
            long.append(shop.bench(engine, "1", length, 2))
        runs[shape] = {SHORT: short, length: long}
        rates = [_prefill(found, "tok_s") for found in (short, long)]
        title = f"{shape}, prefill of {length} tokens"
        bars += [Bar(title, f"of the rate of {SHORT}", {OURS: rates[1] / rates[0]}, must),
                 Bar(title, "tok/s", {OURS: rates[1]})]
    return {"runs": runs}, bars


def nemo(shop: Workshop) -> Result:
    """The shape of Mistral-Nemo-12B in int4: whether it fits, and how fast it answers. Its files are removed."""
    with shop.scratch() as folder:
        own = Workshop(folder, shop.threads)
        checkpoint = own.checkpoint("nemo")
        engine = own.engine(checkpoint, 8, 512)
        shutil.rmtree(checkpoint)
        size = sum(file.stat().st_size for file in engine.iterdir())
        run = own.bench(engine, "1,8", 128, 32)
    one, eight = run["decode"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"runs": [run], "engine_bytes": size}, [
        Bar("Nemo 12 B, int4, peak memory, batch 8", "GB", {OURS: run["peak_rss_bytes"] / 1e9}, memory / 1e9,
            high_is_good=False),
        Bar("Nemo 12 B, prefill of 128 tokens", "tok/s", {OURS: run["prefill"]["tok_s"]}),
        Bar("Nemo 12 B, decode, batch 1", "tok/s", {OURS: one["tok_s"]}),
        Bar("Nemo 12 B, decode, batch 1", "of the limit", {OURS: one["share_of_limit"]}),
        Bar("Nemo 12 B, decode, batch 8", "tok/s", {OURS: eight["tok_s"]}),
        Bar("Nemo 12 B, decode, batch 8", "of the limit", {OURS: eight["share_of_limit"]})]


def build(shop: Workshop) -> Result:
    """Building S: nothing in the caches, the same again elsewhere, and with other limits only."""
    checkpoint = shop.checkpoint("S")
    with shop.scratch() as folder:
        caches = {"XDG_CACHE_HOME": str(folder / "caches")}

        def built(output: str, batch: int) -> float:
            return command("build", "--checkpoint_dir", checkpoint, "--output_dir", folder / output, "--max_batch_size",
                           batch, "--max_seq_len", SHORT + 2 * ANSWER, variables=caches)

        cold_s = built("first", 32)
        shutil.rmtree(folder / "first")  # else its file would be linked instead of built
        warm_s, limits_s = built("second", 32), built("second", 16)
    return {"seconds": {"cold": cold_s, "warm": warm_s, "limits": limits_s}}, [
        Bar("building S, caches empty", "s", {OURS: cold_s}, 20.0, high_is_good=False),
        Bar("building S, kernels and timings cached", "s", {OURS: warm_s}, 20.0, high_is_good=False),
        Bar("building S, other limits only", "s", {OURS: limits_s}, 3.0, high_is_good=False)]


def conversion(shop: Workshop, repeats: int) -> Result:
    """Converting 16-bit weights to int4: two layers of Nemo and its vocabulary, from the page cache and from disk."""
    options = ["--dtype", "float16", "--use_weight_only", "--weight_only_precision", "int4"]
    bars, runs = [], {}
    for name, is_warm, must in (("files cached", True, 400.0), ("files on disk", False, None)):
        with shop.scratch() as folder:
            run = convert.measure(folder / "model", 2, options, warm=is_warm, repeats=repeats)
        runs[name] = vars(run)
        bars.append(Bar(f"converting to int4, {name}", "MB/s", {OURS: run.num_bytes / run.seconds / 1e6}, must))
    return {"runs": runs}, bars


def _decode(runs: list[dict[str, Any]], figure: str) -> float:
    """The median of the first batch size."""
    return statistics.median(float(run["decode"][0][figure]) for run in runs)


def _prefill(runs: list[dict[str, Any]], figure: str) -> float:
    return statistics.median(float(run["prefill"][figure]) for run in runs)
