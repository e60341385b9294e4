"""Ranks: launchers' environments, and real processes that meet, sum, gather, broadcast and lose each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tensorwright
from tensorwright.errors import RanksError
from tensorwright.runtime.communicator import Communicator, Launch, check_ranks, read_launch

SOURCE = str(Path(tensorwright.__file__).parents[1])
COLUMNS = 100_000  # with 7 rows: more than one part of shared memory

COLLECTIVES = textwrap.dedent("""
    import sys
    import numpy as np
    from tensorwright.kernels.cpu.targets import resolve_target
    from tensorwright.program.program import Buffer
    from tensorwright.runtime.communicator import Communicator
    from tensorwright.testing.native_ops import NativeOps, make_batch, one_op

    columns, across_hosts = int(sys.argv[1]), {"mpi": True, "shared": False, "auto": None}[sys.argv[2]]
    comm = Communicator.from_environment(across_hosts=across_hosts, timeout_s=30)
    assert (comm is None) == (len(sys.argv) > 3)
    if across_hosts is not True:
        assert "mpi4py" not in sys.modules
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    buffers = {"x": Buffer("x", ("tokens", columns), "float32"), "y": Buffer("y", ("tokens", columns), "float32")}
    wide = {**buffers, "y": Buffer("y", ("tokens", columns * size), "float32")}
    ops = NativeOps([one_op("all_reduce", buffers), one_op("all_gather", wide)], resolve_target("portable"))
    batch, _ = make_batch([(7, 7)], 8)
    parts = [np.random.default_rng(r).standard_normal((7, columns)).astype(np.float32) for r in range(size)]
    for repeat in range(3):
        x, y = parts[rank].copy(), np.full((7, columns), np.nan, np.float32)
        address = comm.native() if comm else None
        ops.run(0, {"x": x, "y": y}, {}, batch, workers=2, comm=address)
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        np.testing.assert_array_equal(y, total)
        ops.run(0, {"x": x, "y": x}, {}, batch, workers=1, comm=address)
        np.testing.assert_array_equal(x, total)
        y = np.full((7, columns * size), np.nan, np.float32)
        ops.run(1, {"x": parts[rank], "y": y}, {}, batch, workers=2, comm=address)
        np.testing.assert_array_equal(y, np.concatenate(parts, axis=1))
    if comm:
        comm.check()
        assert comm.broadcast(b"from 0" * 1000 if rank == 0 else b"") == b"from 0" * 1000
        for size_of_rank in (0, 1000):
            wanted = [b"%d" % r * size_of_rank for r in range(size)]
            assert comm.gather(wanted[rank]) == wanted
        comm.barrier()
        comm.close()
    print("good", rank)
""")

DEAD_RANK = textwrap.dedent("""
    import os, sys
    import numpy as np
    from tensorwright.errors import RanksError
    from tensorwright.kernels.cpu.targets import resolve_target
    from tensorwright.program.program import Buffer
    from tensorwright.runtime.communicator import Communicator
    from tensorwright.testing.native_ops import NativeOps, make_batch, one_op

    comm = Communicator.from_environment(timeout_s=0.3)
    assert comm.timeout_s == 0.3 and not comm.has_lost()
    comm.barrier()
    if comm.rank == 1:
        os._exit(0)
    while not comm.has_lost():  # the test's own time limit ends this
        pass
    buffers = {name: Buffer(name, ("tokens", 8), "float32") for name in "xy"}
    ops = NativeOps([one_op("all_reduce", buffers)], resolve_target("portable"))
    arrays = {name: np.zeros((3, 8), np.float32) for name in "xy"}
    ops.run(0, arrays, {}, make_batch([(3, 3)], 8)[0], workers=2, comm=comm.native())
    for action in (comm.check, comm.barrier):
        try:
            action()
        except RanksError as error:
            print("good", error.message)
""")


def torchrun_environment(rank: int, size: int, port: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SOURCE, "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1"}


def run_ranks(script: str, size: int, arguments: list[str], port: str) -> list[str]:
    processes = [subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True, env=torchrun_environment(rank, size, port))
                 for rank in range(size)]
    return [process.communicate(timeout=60)[0] for process in processes]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_on_one_host_get_the_same_bits(size: int) -> None:
    outputs = run_ranks(COLLECTIVES, size, [str(COLUMNS), "auto"], f"{os.getpid()}{size}")
    assert [output.strip() for output in outputs] == [f"good {rank}" for rank in range(size)]


def test_one_rank_copies_and_needs_nobody() -> None:
    assert run_ranks(COLLECTIVES, 1, ["64", "auto", "alone"], "1") == ["good 0\n"]


def test_a_dead_rank_is_noticed() -> None:
    first, _ = run_ranks(DEAD_RANK, 2, [], f"{os.getpid()}dead")
    assert first.count("good") == 2, first


@pytest.mark.parametrize("transport", ["shared", "mpi"])
def test_ranks_under_mpirun(transport: str) -> None:
    mpirun = Path(sys.executable).parent / "mpirun"
    found = str(mpirun) if mpirun.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("needs mpirun (pip install 'tensorwright[mpi]')")
    pytest.importorskip("mpi4py")
    result = subprocess.run(
        [found, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", COLLECTIVES, "1000",
         transport], capture_output=True, text=True, timeout=90, check=False, env={**os.environ, "PYTHONPATH": SOURCE})
    assert sorted(result.stdout.split("\n"))[1:] == ["good 0", "good 1"], result.stdout + result.stderr


def test_launchers_are_read() -> None:
    assert read_launch({}).size == 1
    assert read_launch({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).size == 1  # an sbatch script without srun
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
           "PMIX_NAMESPACE": "job"}
    assert read_launch(mpi) == Launch(1, 4, 2, "job", True)
    assert read_launch({**mpi, "OMPI_COMM_WORLD_LOCAL_RANK": "1"}).local_rank == 1
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert read_launch(srun) == Launch(1, 2, 2, "7.0", True)
    assert read_launch({"PMI_RANK": "0", "PMI_SIZE": "1"}).size == 1
    assert read_launch({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}).local_size == 1
    assert [read_launch({"RANK": "3", "WORLD_SIZE": "4", **local}).local_rank for local in ({}, {"LOCAL_RANK": "1"})] \
        == [3, 1]
    with pytest.raises(RanksError, match="RANK='x'"):
        read_launch({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(RanksError, match="rank 2 of 2"):
        read_launch({"RANK": "2", "WORLD_SIZE": "2"})


def test_one_rank_has_no_communicator() -> None:
    assert Communicator.from_environment({}) is None
    assert Communicator.from_environment({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None


def test_several_hosts_need_mpi() -> None:
    with pytest.raises(RanksError, match="through MPI"):
        Communicator.from_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "1"})


def test_a_wrong_number_of_ranks_names_both_and_the_command() -> None:
    check_ranks(1, None)
    with pytest.raises(RanksError) as caught:
        check_ranks(2, None)
    assert "built for 2 ranks; 1 rank running" in caught.value.message
    assert caught.value.mend is not None
    assert caught.value.mend.startswith("mpirun -n 2 ")
