"""Loading libraries from memory, and the thread team: sharing, barriers, forks, oversubscription."""

from __future__ import annotations

import ctypes
import os
import threading
import time

import pytest

from tensorwright.errors import EngineError, IncompatibleEngineError
from tensorwright.kernels.cpu import load
from tensorwright.kernels.cpu.abi import Run, Step, addresses
from tensorwright.kernels.cpu.compile import compile_shared, engine_source
from tensorwright.kernels.cpu.load import ThreadPool, load_library, thread_pool
from tensorwright.kernels.cpu.targets import resolve_target

# Each worker adds to a shared total in turns that only barriers keep apart, and takes items from the counter.
COUNTING = """
namespace test {
inline void turns(const tw_step* step, const tw_run* run, const tw_worker* worker) {
  int64_t* totals = (int64_t*)step->buffers[0];
  for (int round = 0; round < run->num_tokens; ++round) {
    if (round % worker->size == worker->rank) totals[0] += 1;
    tw_barrier(worker);
  }
  for (int32_t item = tw_take(worker); item < 1000; item = tw_take(worker))
    __atomic_add_fetch(&totals[1], item, __ATOMIC_RELAXED);
}
}
extern "C" TW_EXPORT void turns(const tw_step* s, const tw_run* r, const tw_worker* w) { test::turns(s, r, w); }
"""


@pytest.fixture(scope="module")
def data() -> bytes:
    return compile_shared(engine_source([]) + COUNTING, resolve_target("portable"))


@pytest.fixture(scope="module")
def library(data: bytes) -> ctypes.CDLL:
    return load_library(data)




def run_turns(library: ctypes.CDLL, pool: ThreadPool, rounds: int, steps: int = 3) -> tuple[int, int]:
    totals = (ctypes.c_int64 * 2)()
    buffers = addresses([ctypes.addressof(totals)])
    kernel = ctypes.cast(library.turns, ctypes.c_void_p)
    plan = (Step * steps)(*(Step(kernel, ctypes.addressof(buffers), None, 0, 0) for _ in range(steps)))
    library.tw_execute(pool.pointer, plan, ctypes.c_int32(steps), ctypes.byref(Run(num_tokens=rounds)), None)
    return totals[0], totals[1]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_barriers_keep_rounds_apart_even_with_more_workers_than_cpus(library: ctypes.CDLL, workers: int) -> None:
    pool = thread_pool(library, workers)
    for _ in range(5):
        assert run_turns(library, pool, 100) == (300, 3 * 499_500)


def test_seconds_are_added_per_step(library: ctypes.CDLL) -> None:
    totals, seconds = (ctypes.c_int64 * 2)(), (ctypes.c_double * 2)(5.0, 0.0)
    buffers = addresses([ctypes.addressof(totals)])
    step = Step(ctypes.cast(library.turns, ctypes.c_void_p), ctypes.addressof(buffers), None, 0, 0)
    library.tw_execute(thread_pool(library, 2).pointer, (Step * 2)(step, step), ctypes.c_int32(2),
                       ctypes.byref(Run(num_tokens=10)), seconds)
    assert 5.0 < seconds[0] < 10.0
    assert 0.0 < seconds[1] < 5.0


def test_threads_of_the_process_take_turns(library: ctypes.CDLL) -> None:
    results: list[tuple[int, int]] = []
    threads = [threading.Thread(target=lambda: results.append(run_turns(library, thread_pool(library, 2), 50)))
               for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(150, 3 * 499_500)] * 6


def test_an_idle_team_sleeps(library: ctypes.CDLL) -> None:
    run_turns(library, thread_pool(library, 2), 10)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_pools_are_shared_between_libraries(library: ctypes.CDLL) -> None:
    other = load_library(compile_shared(engine_source([]) + COUNTING + "\n// another\n", resolve_target("portable")))
    assert thread_pool(other, 2) is thread_pool(library, 2)
    assert thread_pool(library, 3) is not thread_pool(library, 2)
    with pytest.raises(EngineError, match="threads"):
        thread_pool(library, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_gets_its_own_team(library: ctypes.CDLL) -> None:
    pool = thread_pool(library, 2)
    run_turns(library, pool, 10)
    child = os.fork()
    if child == 0:
        os._exit(0 if run_turns(library, pool, 20) == (60, 3 * 499_500) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run_turns(library, pool, 20) == (60, 3 * 499_500)


def test_the_same_bytes_are_loaded_once(data: bytes, library: ctypes.CDLL) -> None:
    assert load_library(bytes(bytearray(data))) is library
    different = load_library(compile_shared("extern \"C\" __attribute__((visibility(\"default\"))) int other() "
                                            "{ return 7; }\n", resolve_target("portable")))
    assert different.other() == 7
    assert library.tw_abi_version() == 1


def test_without_memory_files_a_private_cache_file_serves(
        monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))

    def refuse(data: bytes) -> int:
        raise OSError("no memory files")

    monkeypatch.setattr(load, "_sealed_file", refuse)
    source = "extern \"C\" __attribute__((visibility(\"default\"))) int mine() { return 11; }\n"
    compiled = compile_shared(source, resolve_target("portable"))
    assert load_library(compiled).mine() == 11
    file, = (folder / "tensorwright").glob("loaded-*.so")
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_older_glibc_is_refused_before_loading() -> None:
    with pytest.raises(IncompatibleEngineError, match=r"need glibc 9\.99"):
        load_library(b"never looked at", glibc="9.99")


def test_bytes_that_are_no_library_are_an_error(monkeypatch: pytest.MonkeyPatch,
                                                tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    with pytest.raises(EngineError, match="cannot be loaded"):
        load_library(b"\x7fELF nonsense", glibc="2.17")
