"""Ranks on GPUs: two processes give the logits of one, each the same bits; a rank that dies is noticed.

With one GPU both ranks share it, which the runtime refuses and these tests allow; what needs NCCL waits for two.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import tensorwright
from tensorwright.checkpoint.convert import DType
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.tiny import TinyModel

MODEL = TinyModel("mistral", hidden_size=512, num_heads=8, num_kv_heads=4, head_size=128, intermediate_size=1024,
                  vocab_size=1024)
BOUNDS = {"float16": 4e-3, "bfloat16": 3e-2}
LENGTHS = ((20, 13, 9), (5,), (3, 30), (1, 2, 3, 4))  # of the sequences of each batch, new token included

WORKER = textwrap.dedent("""
    import sys
    import numpy as np
    import torch
    from tensorwright.engine.engine import Engine
    from tensorwright.runtime.communicator import Communicator
    from tensorwright.runtime.cuda.executor import CudaExecutor
    from tensorwright.runtime.cuda.ranks import use_own_gpu
    from tensorwright.testing.native_ops import make_batch

    engine_dir, into, lengths, what = sys.argv[1], sys.argv[2], eval(sys.argv[3]), sys.argv[4]
    communicator = Communicator.from_environment(timeout_s=20)
    use_own_gpu(communicator, shared=True)
    rank = communicator.rank if communicator else 0
    executor = CudaExecutor(Engine.open(engine_dir, rank), num_blocks=64, communicator=communicator,
                            stretches=what != "plain", graphs=what != "plain")
    if what == "dead" and rank == 1:
        sys.exit()
    found = {}
    for index, each in enumerate(lengths):
        prompt = make_batch([(n, n) for n in each], 16, num_outputs=3)[0]
        found[f"{index} prompt"] = np.asarray(executor.execute(prompt))
        step = make_batch([(1, n) for n in each], 16)[0]
        step = type(step)(**{**vars(step), "output_rows": np.arange(len(each), dtype=np.int32)})
        for turn in range(4):  # launched, recorded, replayed
            found[f"{index} step {turn}"] = np.asarray(executor.execute(step))
    np.savez(f"{into}/{what}{rank}.npz", **found)
    print(communicator.transport if communicator else "one rank")
""")


def run_ranks(engine_dir: Path, size: int, into: Path, what: str, lengths: object = LENGTHS) -> list[str]:
    """Outputs of so many processes, which must all have ended well, but for what is dead."""
    environment = {**os.environ, "PYTHONPATH": str(Path(tensorwright.__file__).parents[1]), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{os.getpid()}{what}"}
    command = [sys.executable, "-c", WORKER, str(engine_dir), str(into), repr(lengths), what]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  env={**environment, "RANK": str(rank)}) for rank in range(size)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * size or what == "dead", "\n".join(outputs)
    return outputs


def logits(into: Path, what: str, rank: int = 0) -> dict[str, np.ndarray]:
    with np.load(into / f"{what}{rank}.npz") as found:
        return dict(found)


def engine(folder: Path, dtype: DType, tp_size: int) -> Path:
    build = {"target": "native", "max_batch_size": 16, "max_num_tokens": 256}
    return build_engine(Recipe(MODEL, dtype, tp_size=tp_size, build=build), folder / f"{tp_size} ranks")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_ranks_give_the_logits_of_one(dtype: DType, tmp_path: Path) -> None:
    engines = {size: engine(tmp_path, dtype, size) for size in (1, 2)}
    run_ranks(engines[1], 1, tmp_path, "one")
    for what in ("fused", "plain"):
        print(run_ranks(engines[2], 2, tmp_path, what)[0])
        first, second, alone = logits(tmp_path, what), logits(tmp_path, what, 1), logits(tmp_path, "one")
        for name, wanted in alone.items():
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"{what} {name}")
            assert np.abs(first[name] - wanted).max() < BOUNDS[dtype] * np.abs(wanted).max(), (what, name)


def test_long_prompts_go_through_nccl(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    lengths = ((200, 40), (90,))
    run_ranks(engine(tmp_path, "float16", 1), 1, tmp_path, "one", lengths)
    run_ranks(engine(tmp_path, "float16", 2), 2, tmp_path, "fused", lengths)
    first, second, alone = logits(tmp_path, "fused"), logits(tmp_path, "fused", 1), logits(tmp_path, "one")
    for name, wanted in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        assert np.abs(first[name] - wanted).max() < BOUNDS["float16"] * np.abs(wanted).max(), name


def test_mpirun_gives_the_text_of_one_rank(tmp_path: Path) -> None:
    """The commands that users type; and a line says how sums travel."""
    torch = pytest.importorskip("torch")
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if torch.cuda.device_count() < 2 or mpirun is None:
        pytest.skip("needs two GPUs and mpirun (pip install 'tensorwright[mpi]')")
    environment = {**os.environ, "PYTHONPATH": str(Path(tensorwright.__file__).parents[1])}
    texts = []
    for size in (1, 2):
        launcher = [mpirun, "-n", str(size), "--allow-run-as-root", "--oversubscribe"] if size > 1 else []
        command = [*launcher, sys.executable, "-m", "tensorwright", "run", "--engine_dir",
                   str(engine(tmp_path, "float16", size)), "--input_text", "hi how are you?", "--max_output_len", "12"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
        assert done.returncode == 0, done.stderr
        texts.append(re.findall(r"^Output .*", done.stdout, flags=re.MULTILINE))
        assert ("Ranks: 2, sums travel by " in done.stdout) == (size == 2)
    assert texts[0] == texts[1] and len(texts[0]) == 1


def test_a_dead_rank_ends_the_others(tmp_path: Path) -> None:
    outputs = run_ranks(engine(tmp_path, "float16", 2), 2, tmp_path, "dead")
    assert "RanksError" in outputs[0] and "did not answer in time" in outputs[0], outputs[0]
