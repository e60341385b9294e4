"""Time and memory of `convert` on a model of Mistral-Nemo's shape with as many layers as asked.

Two models are converted, with one layer and with N, each time in a process of its own, from files that were put out of
the page cache (unless --warm); just before, the same files are read and nothing else, in the same state. 40 layers and
both vocabulary matrices are extrapolated in two ways, from the difference of the runs and from the larger run's rate,
and the slower counts: disks are noisy. Where converting is about as fast as reading alone, reading was the limit; where
wall time is about processor time / processors, the processors were; else writing.

    python3 benchmarks/convert.py --layers 4 --folder /tmp/convert-benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tensorwright.checkpoint.tensor_file import TensorFileWriter
from tensorwright.models import from_huggingface
from tensorwright.models.weight_names import weights

NEMO = {"architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "vocab_size": 131072, "hidden_size": 5120,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": None, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
NEMO_LAYERS = 40
GOAL_BYTES_PER_S, GOAL_PEAK_BYTES = 400e6, 256 << 20  # on 2 processors


@dataclass(frozen=True)
class Measured:
    """One conversion: layers, bytes of 16-bit weights, wall and processor time, peak memory of the process.

    `read_s` is the time of reading the same files and doing nothing with them, on one thread.
    """

    layers: int
    num_bytes: int
    seconds: float
    processor_s: float
    peak_bytes: int
    read_s: float


def main() -> int:
    """Measures, prints a table, and fails when a goal of the design is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the larger model, 2 or more")
    parser.add_argument("--folder", type=Path, default=Path("build/convert-benchmark"), help="scratch space, removed")
    parser.add_argument("--repeats", type=int, default=3, help="conversions of each model; the median counts")
    parser.add_argument("--warm", action="store_true", help="leave the model in the page cache")
    parser.add_argument("options", nargs="*", help="for convert, after --",
                        default=["--dtype", "float16", "--use_weight_only", "--weight_only_precision", "int4"])
    arguments = parser.parse_args()
    if arguments.layers < 2:
        parser.error("--layers must be 2 or more: one layer alone does not tell a layer's time")
    try:
        runs = [measure(arguments.folder, layers, arguments.options, warm=arguments.warm,
                        repeats=arguments.repeats)
                for layers in (1, arguments.layers)]
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    return show(*runs)


def measure(folder: Path, layers: int, options: list[str], *, warm: bool, repeats: int) -> Measured:
    """Writes a model, converts it `repeats` times, removes both, and gives the run of median time."""
    num_bytes = write_model(folder / "model", layers)
    runs = [convert(folder, layers, num_bytes, options, warm=warm) for _ in range(repeats)]
    shutil.rmtree(folder)
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def convert(folder: Path, layers: int, num_bytes: int, options: list[str], *, warm: bool) -> Measured:
    """Reads the model, then converts it, and removes the checkpoint."""
    model, output = folder / "model", folder / "checkpoint"
    path = model / "model.safetensors"
    if not warm:
        put_out_of_cache(path)
    read_s = read(path)
    if not warm:
        put_out_of_cache(path)
    command = [sys.executable, "-c", "import sys; from tensorwright.cli.main import main; sys.exit(main(sys.argv[1:]))",
               "convert", "--model_dir", str(model), "--output_dir", str(output), *options]
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"convert failed with status {os.waitstatus_to_exitcode(status)}")
    shutil.rmtree(output)
    return Measured(layers, num_bytes, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, read_s)


def put_out_of_cache(path: Path) -> None:
    """Makes the system forget a file, so that the next reader waits for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read(path: Path) -> float:
    """Seconds that reading a file takes, 8 MiB at a time."""
    buffer = bytearray(8 << 20)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def write_model(folder: Path, layers: int) -> int:
    """A folder with normally distributed bfloat16 weights, on the disk; gives the size of the weights."""
    folder.mkdir(parents=True)
    config = {**NEMO, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', encoding="utf-8")
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    shapes = {source.name: (bfloat16, source.shape) for spec in weights(from_huggingface(config), write_lm_head=True)
              for source in spec.sources}
    # Small, because a new process starts with the peak memory of the one that made it.
    tile = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)).astype(bfloat16)
    data = tile.view(np.uint8)
    path = folder / "model.safetensors"
    with TensorFileWriter(path, shapes, {"format": "pt"}) as writer:
        for name, entry in writer.entries.items():
            for offset in range(0, entry.num_bytes, len(data)):
                writer.write_bytes(name, offset, data[:entry.num_bytes - offset])
        writer.commit()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sum(entry.num_bytes for entry in writer.entries.values())


def show(small: Measured, large: Measured) -> int:
    """Prints both runs and the extrapolation; gives 1 when a goal is missed."""
    for run in (small, large):
        print(f"{run.layers} layer(s) and both vocabulary matrices: {run.num_bytes / 1e9:.2f} GB in "
              f"{run.seconds:.1f} s (processor {run.processor_s:.1f} s), {run.num_bytes / 1e6 / run.seconds:.0f} MB/s; "
              f"reading alone {run.num_bytes / 1e6 / run.read_s:.0f} MB/s, peak memory "
              f"{run.peak_bytes / 2**20:.0f} MiB")
    more, added = large.layers - small.layers, NEMO_LAYERS - large.layers
    layer_bytes = (large.num_bytes - small.num_bytes) / more
    total_bytes = large.num_bytes + added * layer_bytes
    by_difference = large.seconds + added * (large.seconds - small.seconds) / more
    by_rate = total_bytes * large.seconds / large.num_bytes
    processor_s = large.processor_s + added * (large.processor_s - small.processor_s) / more
    total_s = max(by_difference, by_rate)
    print(f"extrapolated to {NEMO_LAYERS} layers, {total_bytes / 1e9:.1f} GB: {by_difference:.0f} s by the difference "
          f"of the runs, {by_rate:.0f} s by the larger one's rate, processor {processor_s:.0f} s")
    rate = total_bytes / total_s
    print(f"so {total_s:.0f} s, {rate / 1e6:.0f} MB/s (goal {GOAL_BYTES_PER_S / 1e6:.0f}); memory does not grow with "
          f"layers: {large.peak_bytes / 2**20:.0f} MiB (goal {GOAL_PEAK_BYTES / 2**20:.0f} MiB)")
    return int(rate < GOAL_BYTES_PER_S or large.peak_bytes > GOAL_PEAK_BYTES)


if __name__ == "__main__":
    sys.exit(main())
