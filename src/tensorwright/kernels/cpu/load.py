"""Loads the shared object of an engine from memory, and keeps the process's thread pools.

It knows the dynamic linker and fork. It does not know what the kernels compute (`native/abi.h`, `kernels/cpu/abi.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import stat

from tensorwright.errors import EngineError, IncompatibleEngineError
from tensorwright.kernels.cpu.compile import cache_folder
from tensorwright.kernels.cpu.elf import required_glibc, version_key

# include/uapi/linux/fcntl.h; the names came to Python's fcntl in 3.9, but not on every libc.
_ADD_SEALS, _SEAL_ALL = 1033, 0x1 | 0x2 | 0x4 | 0x8


class ThreadPool:
    """A team of worker threads made by the first library that asked; a child process gets a new one after a fork."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.threads = threads
        self._library = library
        self._create()

    @property
    def pointer(self) -> ctypes.c_void_p:
        """tw_pool*, valid in this process."""
        if self._process != os.getpid():
            self._create()  # the parent's threads do not exist here; its memory is left alone
        return self._pointer

    def _create(self) -> None:
        create = self._library.tw_pool_create
        create.argtypes, create.restype = [ctypes.c_int32], ctypes.c_void_p
        address = create(self.threads)
        if not address:
            raise EngineError(f"the system gives no {self.threads} threads", mend="use fewer with --threads")
        self._pointer = ctypes.c_void_p(address)
        self._process = os.getpid()


def load_library(data: bytes, *, glibc: str | None = None) -> ctypes.CDLL:
    """The library held in `data`; the same bytes give the same library. `glibc`: the version it needs, if known.

    Raises:
        IncompatibleEngineError: this system's glibc is older than the library needs.
        EngineError: the dynamic linker refused it.
    """
    check_glibc(glibc or required_glibc(data))
    return _load(data)


def check_glibc(required: str) -> None:
    """Raise IncompatibleEngineError where this system's glibc is older than `required`, such as "2.34"."""
    name, here = platform.libc_ver()
    if name == "glibc" and version_key(here) < version_key(required):
        raise IncompatibleEngineError(
            f"the engine's kernels need glibc {required}; this system has {here}",
            mend="tensorwright build --rebuild_kernels ENGINE_DIR (on this machine, or one as old)")


def thread_pool(library: ctypes.CDLL, threads: int) -> ThreadPool:
    """The process's pool of that many workers, the calling thread counted: one for all engines of an ABI version."""
    pools = _pools(int(library.tw_abi_version()))
    if threads not in pools:
        pools[threads] = ThreadPool(library, threads)
    return pools[threads]


@functools.lru_cache(maxsize=8)
def _pools(abi_version: int) -> dict[int, ThreadPool]:
    return {}


@functools.lru_cache(maxsize=64)
def _load(data: bytes) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(f"/proc/self/fd/{_sealed_file(data)}")
    except OSError as first:  # no memfd, no /proc, or a mount policy against executable memory files
        try:
            return ctypes.CDLL(_cached_file(data))
        except OSError as second:
            raise EngineError(f"the engine's kernels cannot be loaded: {first}; {second}") from second


def _sealed_file(data: bytes) -> int:
    """A descriptor of unchangeable memory. Never closed: dlopen gives the earlier library for a reused number."""
    descriptor = os.memfd_create("tensorwright-kernels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]
    fcntl.fcntl(descriptor, _ADD_SEALS, _SEAL_ALL)
    return descriptor


def _cached_file(data: bytes) -> str:
    """The library as a file of the user's cache, named by its hash; one that is not this user's alone is replaced."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"loaded-{hashlib.sha256(data).hexdigest()}.so"
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        own = status.st_uid == os.getuid() and stat.S_ISREG(status.st_mode) and not status.st_mode & 0o022
        if own and path.read_bytes() == data:
            return str(path)
    aside = folder / f".{path.name}.{os.getpid()}"
    aside.write_bytes(data)
    aside.chmod(0o600)
    aside.replace(path)
    return str(path)
