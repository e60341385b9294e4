"""Running the Triton server in the foreground: start, wait until ready, watch, stop, and leave nothing behind.

The server answers ready (200) even when the process of the model has died, so that process is watched here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorwright.errors import ServeError
from tensorwright.serve.triton.bundle import (
    Bundle,
    check_python,
    find_bundle,
    server_environment,
    write_backends,
)
from tensorwright.serve.triton.metrics import READY
from tensorwright.serve.triton.options import LaunchOptions

POLL_S = 0.1
HEALTH_S = 2.0  # between two looks at the model's own metrics
EXIT_S = 10  # what the server gives running requests when it is stopped
KILL_S = 5  # more before it is killed
# A Python that becomes the server, after asking for SIGTERM when this process dies, even of SIGKILL: PR_SET_PDEATHSIG
# of prctl(2) is 1. (subprocess's preexec_fn would do it, but is unsafe beside threads.)
BECOME_SERVER = ("import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGTERM)); "
                 "os.execv(sys.argv[1], sys.argv[1:])")
HARMLESS = ("CudaDriverHelper has not been initialized", "Signal (15) received", "Signal (2) received")


class Server:
    """One tritonserver process in a session of its own, with its model's stub processes."""

    def __init__(self, bundle: Bundle, environment: dict[str, str], repository: Path, model: str,
                 options: LaunchOptions) -> None:
        self.model = model
        self.options = options
        self.prefix = f"tensorwright_{os.getpid()}_{id(self):x}_"
        self.folder = Path(tempfile.mkdtemp(prefix="tensorwright-triton-"))
        self.stubs: set[int] = set()
        self.last_lines: deque[str] = deque(maxlen=20)
        write_backends(bundle, self.folder / "backends")
        (self.folder / "repository").mkdir()
        (self.folder / "repository" / model).symlink_to(repository.resolve() / model)  # this model and no other
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BECOME_SERVER, str(bundle.server), *self._arguments()],
            env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace")
        self._forwarder = threading.Thread(target=self._forward, daemon=True)
        self._forwarder.start()

    def wait_ready(self, stop: threading.Event) -> bool:
        """Wait until server and model answer ready. False when `stop` was set meanwhile.

        Raises:
            ServeError: the server ended, or did not become ready in time.
        """
        deadline = time.monotonic() + self.options.start_timeout_s
        while not stop.is_set():
            if self.process.poll() is not None:
                raise ServeError(f"the Triton server ended with status {self.process.returncode} while it loaded "
                                 f"{self.model}; its last words:\n{self._last_words()}")
            if self._answers("/v2/health/ready") and self._answers(f"/v2/models/{self.model}/ready"):
                self.stubs = set(_children(self.process.pid))
                return True
            if time.monotonic() > deadline:
                raise ServeError(f"the Triton server was not ready after {self.options.start_timeout_s:g} s",
                                 mend="a larger --start_timeout_s, or look at its messages above")
            stop.wait(POLL_S)
        return False

    def watch(self, stop: threading.Event) -> None:
        """Return when `stop` is set.

        Raises:
            ServeError: the server or the process of the model died.
        """
        looked_s = time.monotonic()
        while not stop.wait(POLL_S):
            if self.process.poll() is not None:
                raise ServeError(f"the Triton server ended by itself with status {self.process.returncode}; its last "
                                 f"words:\n{self._last_words()}")
            dead = self.stubs - set(_children(self.process.pid))
            if dead:
                raise ServeError(f"the process of model {self.model} died (pid {min(dead)}): every request would fail, "
                                 f"so the server is stopped; its last words:\n{self._last_words()}",
                                 mend="start it again; if memory was short, with a smaller --max_kv_tokens")
            if time.monotonic() - looked_s > HEALTH_S:
                looked_s = time.monotonic()
                self._check_engine()

    def stop(self) -> None:
        """Stop the server, kill what remains of its session, and remove its files and shared memory."""
        if self.process.poll() is None:
            healthy = self.stubs <= set(_children(self.process.pid))
            self.process.send_signal(signal.SIGTERM if healthy else signal.SIGKILL)  # else it waits for a dead stub
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_S + KILL_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._forwarder.join(KILL_S)
        shutil.rmtree(self.folder, ignore_errors=True)
        for region in Path("/dev/shm").glob(f"{self.prefix}*"):
            region.unlink(missing_ok=True)

    def _arguments(self) -> list[str]:
        options = self.options
        return [f"--model-repository={self.folder / 'repository'}",
                f"--backend-directory={self.folder / 'backends'}", "--disable-auto-complete-config",
                f"--http-address={options.host}", f"--http-port={options.http_port}",
                f"--grpc-address={options.host}", f"--grpc-port={options.grpc_port}",
                f"--metrics-address={options.host}", f"--metrics-port={options.metrics_port}",
                f"--backend-config=python,shm-region-prefix-name={self.prefix}", f"--exit-timeout-secs={EXIT_S}",
                "--log-info=false", "--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]

    def _forward(self) -> None:
        """The server's messages, without those that mean nothing on a machine without a GPU."""
        if self.process.stdout is None:
            return
        with self.process.stdout as lines:
            for line in lines:
                if not any(text in line for text in HARMLESS):
                    self.last_lines.append(line.rstrip())
                    print(line, end="", file=sys.stderr, flush=True)

    def _last_words(self) -> str:
        self._forwarder.join(1.0)
        return "\n".join(f"  {line}" for line in self.last_lines) or "  (none)"

    def _check_engine(self) -> None:
        lines = (self._get(self.options.metrics_port, "/metrics") or "").splitlines()
        if any(line.startswith(READY) and line.endswith(" 0") for line in lines):
            raise ServeError("the engine's loop has failed: every request would fail, so the server is stopped; its "
                             f"last words:\n{self._last_words()}", mend="start it again")

    def _answers(self, path: str) -> bool:
        return self._get(self.options.http_port, path) is not None

    def _get(self, port: int, path: str) -> str | None:
        """The body of an answer 200, or None."""
        try:
            with urllib.request.urlopen(self.options.url(port) + path, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return None


def serve(repository: Path, model: str, options: LaunchOptions, on_ready: Callable[[], None]) -> None:
    """Run the server until SIGINT or SIGTERM. `on_ready` is called when the model can be asked.

    Raises:
        ServeError: no server installed, a port in use, or anything that ends it early.
    """
    bundle = find_bundle()
    environment = server_environment(bundle)
    check_python(environment)
    _check_ports(options)
    with _stop_signals() as stop:
        server = Server(bundle, environment, repository, model, options)
        try:
            if server.wait_ready(stop):
                on_ready()
                server.watch(stop)
        finally:
            server.stop()


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and a closed terminal set while the block runs; `nohup` is respected."""
    stop = threading.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _check_ports(options: LaunchOptions) -> None:
    for name, port in (("http", options.http_port), ("grpc", options.grpc_port), ("metrics", options.metrics_port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, port))
            except OSError as error:
                raise ServeError(f"{options.host} port {port} for {name} cannot be used: {error.strerror}",
                                 mend=f"another --{name}_port") from None


def _children(pid: int) -> Iterator[int]:
    """Living direct children of a process. Zombies count as dead."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                yield int(status.parent.name)
