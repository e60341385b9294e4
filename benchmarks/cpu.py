"""Times the whole path on dummy weights of well-known shapes: convert, build, load, first token, prefill, decode.

S is a Llama shape of 1.1 B parameters, T four layers of Mistral-Nemo, both int4 in groups of 128 with an int8 lm_head.
Usage: `make bench`, or `python benchmarks/cpu.py --models S --batch_sizes 1,8,16 --threads 2 --json out.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "rope_theta": 10000.0, "torch_dtype": "float16", "tie_word_embeddings": False, "bos_token_id": 1,
          "eos_token_id": 2, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "S": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
          "head_dim": 64, "intermediate_size": 8192, "vocab_size": 32000},
    "T": {"hidden_size": 5120, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
          "head_dim": 128, "intermediate_size": 14336, "vocab_size": 131072},
    "nemo": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 14336, "vocab_size": 131072},
}
ALGORITHMS = {"int4": ["--use_weight_only", "--weight_only_precision", "int4", "--quantize_lm_head"],
              "int8": ["--use_weight_only", "--weight_only_precision", "int8", "--quantize_lm_head"], "none": []}


def command(*words: object, variables: Mapping[str, str] | None = None) -> float:
    """Run a verb of tensorwright with these environment variables besides; seconds it took."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "tensorwright", *map(str, words)], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, **(variables or {})})
    return time.monotonic() - begin


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one shape."""
    model, checkpoint, engine, result = (folder / part for part in ("model", "checkpoint", "engine", "bench.json"))
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}))
    convert_s = command("convert", "--model_dir", model, "--output_dir", checkpoint, "--dummy_weights", "--dtype",
                        "float16", *ALGORITHMS[options.algorithm])
    limits = ("--max_batch_size", 32, "--max_seq_len", options.input_len + options.output_len + 64)
    build_s = command("build", "--checkpoint_dir", checkpoint, "--output_dir", engine, *limits)
    rebuild_s = command("build", "--checkpoint_dir", checkpoint, "--output_dir", engine, "--max_batch_size", 16,
                        "--max_seq_len", options.input_len + options.output_len + 64)
    threads = ("--threads", options.threads) if options.threads else ()
    command("bench", "--engine_dir", engine, "--batch_sizes", options.batch_sizes, "--input_len", options.input_len,
            "--output_len", options.output_len, *threads, "--json", result)
    return {"model": name, "algorithm": options.algorithm, "convert_dummy_s": convert_s, "build_s": build_s,
            "rebuild_limits_s": rebuild_s, "engine_bytes": (engine / "rank0.engine").stat().st_size,
            **json.loads(result.read_text())}


def main() -> None:
    """Print each shape's figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="S")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="int4")
    parser.add_argument("--batch_sizes", default="1,8,16")
    parser.add_argument("--input_len", type=int, default=512)
    parser.add_argument("--output_len", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(name, options, Path(folder)))
        print(json.dumps(results[-1], indent=2), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
