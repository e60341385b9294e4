"""`tensorwright deploy --start` as a process of its own, and plain HTTP to it. For tests and measurements."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import tensorwright


class DeployedServer:
    """The command with free ports of loopback. Use as a context manager; leaving it stops the server."""

    def __init__(self, engine_dir: Path, repository: Path, *words: str) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        command = [sys.executable, "-m", "tensorwright", "deploy", "--engine_dir", str(engine_dir),
                   "--model_repository", str(repository), "--start", "--http_port", str(self.http_port),
                   "--grpc_port", str(self.grpc_port), "--metrics_port", str(self.metrics_port), *words]
        source = str(Path(tensorwright.__file__).parent.parent)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env={**os.environ, "PYTHONPATH": source})
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> DeployedServer:
        """Wait until it says that it is ready."""
        if not self._ready.wait(120) or self.process.poll() is not None:
            self.stop()
            raise RuntimeError(f"the server did not start:\n{self.output}")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def output(self) -> str:
        """All that it has printed."""
        return "".join(self.lines)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = 60) -> int:
        """The exit status of a server that ends by itself."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a POST; a text body is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=60)
        try:
            connection.request("POST", path, body if isinstance(body, str) else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def generate(self, **body: Any) -> tuple[int, Any]:
        """Ask /generate."""
        return self.post("/v2/models/ensemble/generate", body)

    def stream(self, **body: Any) -> Generator[dict[str, Any], None, None]:
        """Events of /generate_stream. Closing the iterator closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=60)
        try:
            connection.request("POST", "/v2/models/ensemble/generate_stream", json.dumps({"stream": True, **body}))
            answer = connection.getresponse()
            while line := answer.readline():
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """One value of the metrics page, 0 when it is not there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=60)
        try:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
        finally:
            connection.close()
        for line in page.splitlines():
            found = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
            if found and found[1] == name and all(f'{k}="{v}"' in found[2] for k, v in labels.items()):
                return float(found[3])
        return 0.0

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            if line.startswith("Ctrl-C"):
                self._ready.set()
        self._ready.set()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
