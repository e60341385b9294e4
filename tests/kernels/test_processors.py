"""Threads by default: physical cores, inside the quota of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorwright.kernels.cpu.processors import usable_cores
from tensorwright.runtime import executor


def machine(folder: Path, siblings: dict[int, str], **cgroup: str) -> Path:
    for processor, told in siblings.items():
        topology = folder / f"devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(told + "\n")
    (folder / "fs/cgroup/cpu").mkdir(parents=True)
    for name, value in cgroup.items():
        (folder / "fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")).write_text(value + "\n")
    return folder


HYPERTHREADS = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}


@pytest.mark.parametrize(("usable", "cgroup", "cores"), [
    ({0, 1, 4, 5}, {}, 2),
    ({0, 4}, {}, 1),
    ({0, 1, 4, 5}, {"cpu_dot_max": "max 100000"}, 2),
    ({0, 1, 4, 5}, {"cpu_dot_max": "100000 100000"}, 1),
    ({0, 1, 4, 5}, {"cpu_dot_max": "150000 100000"}, 2),
    ({0, 1, 4, 5}, {"cpu_dot_max": "10000 100000"}, 1),
    ({0, 1, 4, 5}, {"cpu__cpu_dot_cfs_quota_us": "-1", "cpu__cpu_dot_cfs_period_us": "100000"}, 2),
    ({0, 1, 4, 5}, {"cpu__cpu_dot_cfs_quota_us": "100000", "cpu__cpu_dot_cfs_period_us": "100000"}, 1),
    ({7, 8, 9}, {}, 3),
], ids=["two cores of two threads", "one core", "no quota", "one processor", "one and a half", "a tenth",
        "version 1, none", "version 1, one", "topology not told"])
def test_cores_within_affinity_and_quota(usable: set[int], cgroup: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert usable_cores(usable, machine(tmp_path, HYPERTHREADS, **cgroup)) == cores


@pytest.mark.parametrize(("own", "launcher", "threads"), [(8, 8, 4), (4, 8, 4), (1, 8, 1), (2, 64, 2), (1, 1, 1)], ids=[
    "free to run anywhere", "bound to a half each", "bound to a core each", "bound to less", "one core for both"])
def test_ranks_of_a_host_share_its_cores_once(own: int, launcher: int, threads: int,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor.os, "environ", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0",
                                                 "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    monkeypatch.setattr(executor.os, "sched_getaffinity", lambda process: set(range(launcher if process else own)))
    monkeypatch.setattr(executor, "usable_cores", lambda usable=None: own if usable is None else len(usable))
    assert executor.default_threads() == threads
