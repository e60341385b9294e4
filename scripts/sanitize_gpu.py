"""Steps of small engines for compute-sanitizer: every op alone, then the kernels that run several ops at once.

    python scripts/sanitize_gpu.py build FOLDER                                             # engines, on any machine
    compute-sanitizer --tool memcheck --error-exitcode 1 python scripts/sanitize_gpu.py run FOLDER
    compute-sanitizer --tool racecheck --error-exitcode 1 python scripts/sanitize_gpu.py run FOLDER

`make sanitize-gpu` does all three. Kernels run some 50 times slower there, so shapes are the smallest that have every
kernel. Results are compared by `make test-gpu`; here only accesses are watched.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tensorwright.checkpoint.convert import DType
from tensorwright.engine.engine import Engine
from tensorwright.testing.engines import INT4, build_dummy
from tensorwright.testing.native_ops import make_batch
from tensorwright.testing.tiny import TinyModel

LIMITS = {"max_seq_len": 512, "max_num_tokens": 512, "tokens_per_block": 16, "max_batch_size": 64}
FUSED = TinyModel("mistral", hidden_size=2560, num_heads=16, num_kv_heads=8, head_size=128, intermediate_size=7168,
                  vocab_size=2048)
SMALL = TinyModel("qwen3", head_size=32)
INT8 = ("--use_weight_only", "--weight_only_precision", "int8")
ENGINES: dict[str, tuple[TinyModel, DType, tuple[str, ...]]] = {
    "fused": (FUSED, "float16", INT4), "fused8": (FUSED, "bfloat16", INT8),
    "fused16": (FUSED, "bfloat16", ()), "small": (SMALL, "bfloat16", (*INT8, "--int8_kv_cache")),
    "float8": (SMALL, "float16", ("--use_fp8_rowwise", "--fp8_kv_cache"))}
BATCHES = ((140,), (300, 17), (5, 40, 1), (9,) * 8, (3,) * 16, (2,) * 33)  # tokens of each sequence


def main(verb: str, folder: Path, target: str = "native") -> None:
    """Build the engines, or run them."""
    for name, (model, dtype, flags) in ENGINES.items():
        if verb == "build":
            build_dummy(model, folder / name, dtype, flags, target=target, **LIMITS)
            continue
        engine = Engine.open(folder / name / "engine")
        for stretches in (True, False) if engine.manifest["kernels"]["stretches"] else (False,):
            run(engine, name, stretches)


def run(engine: Engine, name: str, stretches: bool) -> None:
    """A prompt and two decode steps of each batch, launched one by one: recorded steps are the same launches."""
    from tensorwright.runtime.cuda.executor import CudaExecutor

    executor: Any = CudaExecutor(engine, num_blocks=128, graphs=False, stretches=stretches)
    for lengths in BATCHES:
        started = time.monotonic()
        executor.execute(make_batch([(length, length) for length in lengths], 16, num_outputs=len(lengths))[0])
        step = make_batch([(1, length) for length in lengths], 16)[0]
        step = type(step)(**{**vars(step), "output_rows": np.arange(len(lengths), dtype=np.int32)})
        logits = [np.asarray(executor.execute(step)) for _ in range(2)]
        if not np.isfinite(logits).all():
            raise SystemExit(f"error: {name}, {len(lengths)} sequences: logits are not finite")
        print(f"{name}, {len(lengths)} sequences, {'stretches' if stretches else 'op by op'}: "
              f"{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
