"""What the command `deploy` is told: where to write, and where to listen. Plain data, quick to import."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from tensorwright.errors import UsageError


@dataclass(frozen=True)
class DeployOptions:
    """What `deploy` writes and where."""

    engine_dir: Path = field(metadata={"help": "engine folder that `build` wrote"})
    model_repository: Path = field(metadata={"help": "model repository to write the model into",
                                             "flags": ("--model_repo",)})
    model_name: str = field(default="ensemble", metadata={"help": "name that clients ask for"})
    tokenizer_dir: Path | None = field(default=None, metadata={"help": "tokenizer folder (default: the engine's)"})
    force: bool = field(default=False, metadata={"help": "replace a folder that deploy did not write"})


@dataclass(frozen=True)
class LaunchOptions:
    """Addresses and times of one server."""

    host: str = field(default="127.0.0.1", metadata={"help": "IPv4 address to listen on; 0.0.0.0: the network"})
    http_port: int = field(default=8000, metadata={"help": "port of HTTP"})
    grpc_port: int = field(default=8001, metadata={"help": "port of gRPC"})
    metrics_port: int = field(default=8002, metadata={"help": "port of the metrics page"})
    start_timeout_s: float = field(default=600.0, metadata={"help": "seconds that loading may take"})

    def __post_init__(self) -> None:
        try:
            ipaddress.IPv4Address(self.host)
        except ValueError:  # the server takes a name for 255.255.255.255, and its gRPC cannot read an IPv6 address
            raise UsageError(f"host must be an IPv4 address; got {self.host!r}", mend="--host 127.0.0.1") from None
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}
        for name, port in ports.items():
            if not 1 <= port <= 65535:
                raise UsageError(f"{name} must be from 1 to 65535; got {port}")
        if len(set(ports.values())) != len(ports):
            raise UsageError(f"the three ports must differ; got {ports}")

    def url(self, port: int) -> str:
        """A URL for this machine's own clients."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{port}"
