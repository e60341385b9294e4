"""`make demo`: the demo model from its Hugging Face folder to answers over HTTP, with the commands that a user types.

It runs convert, build, run and deploy as they are installed beside this Python, asks the server, prints what each step
took, and stops everything, also on failure. All output goes to .demo/.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import urllib.response
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / ".demo"
PROMPT = "hi how are you?"
MAX_TOKENS = 48


class Demo:
    """The steps that ran, with their durations."""

    def __init__(self) -> None:
        self.durations: list[tuple[str, float]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step; a failed one is not counted."""
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        self.durations.append((name, time.monotonic() - started))

    def run(self, name: str, *words: str | Path) -> None:
        """One command, shown first."""
        with self.step(name):
            subprocess.run(command(name, *words), cwd=ROOT, check=True)

    def ask(self, url: str) -> None:
        """Both ways of asking over HTTP."""
        body = {"text_input": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0.2}
        with self.step("generate"):
            with post(f"{url}/generate", {**body, "exclude_input_in_output": True}) as answer:
                value = json.load(answer)
            check(value)
            print(f"{value['text_output'].strip()!r}   ({value['num_output_tokens']} tokens, {value['finish_reason']})")
        with self.step("generate_stream"):
            self._stream(url, {**body, "stream": True})

    def _stream(self, url: str, body: dict[str, object]) -> None:
        started, first, pieces, last = time.monotonic(), None, [], {}
        with post(f"{url}/generate_stream", body) as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    last = json.loads(line[5:])
                    check(last)
                    first = first or time.monotonic() - started
                    pieces.append(last["text_output"])
                    print(pieces[-1], end="", flush=True)
        if first is None or "finish_reason" not in last:
            raise RuntimeError(f"the stream ended without a finish_reason: {last}")
        print(f"\n({len(pieces)} events, first after {first * 1000:.0f} ms, {last['finish_reason']})")


def command(verb: str, *words: str | Path) -> list[str]:
    """A tensorwright command line of this Python, after showing it."""
    script = Path(sys.executable).with_name("tensorwright")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "tensorwright"]
    print("$ tensorwright", verb, shlex.join(str(word) for word in words), flush=True)
    return [*program, verb, *(str(word) for word in words)]


def check(answer: dict[str, object]) -> None:
    """Refuse what is no answer."""
    if "error" in answer or "text_output" not in answer:
        raise RuntimeError(f"the server answered {answer}")


def post(url: str, body: dict[str, object]) -> urllib.response.addinfourl:
    """POST JSON."""
    print(f"$ curl -s {url} -d {shlex.quote(json.dumps(body))}", flush=True)
    answer: urllib.response.addinfourl = urllib.request.urlopen(url, json.dumps(body).encode(), timeout=120)
    return answer


@contextmanager
def server(engine: Path) -> Iterator[str]:
    """The deployed model on free ports of loopback; yields its URL."""
    ports = free_ports(3)
    words = ["--engine_dir", engine, "--model_repository", OUTPUT / "repository", "--start", "--http_port", ports[0],
             "--grpc_port", ports[1], "--metrics_port", ports[2]]
    process = subprocess.Popen(command("deploy", *(str(word) for word in words)), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)
    try:
        wait_ready(process)
        yield f"http://127.0.0.1:{ports[0]}/v2/models/ensemble"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_ready(process: subprocess.Popen[str]) -> None:
    """Show what the command says until it says that it is ready."""
    for line in process.stdout or ():
        print(line, end="", flush=True)
        if line.startswith("Ctrl-C"):
            return
    raise RuntimeError(f"deploy ended with status {process.wait()}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def find_model() -> Path:
    """The trained demo model, or a tiny random one that only shows the steps."""
    model = ROOT / "demo" / "model"
    if (model / "model.safetensors").is_file():
        return model
    from tensorwright.testing.tiny import write_model

    print("note: demo/model is not here; a tiny random model stands in, and answers nonsense")
    return write_model(OUTPUT / "model")


def main() -> int:
    """Every step in order; 1 when one fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    shutil.rmtree(OUTPUT, ignore_errors=True)
    demo, started = Demo(), time.monotonic()
    checkpoint, engine = OUTPUT / "checkpoint", OUTPUT / "engine"
    try:
        demo.run("convert", "--model_dir", find_model(), "--output_dir", checkpoint, "--use_weight_only",
                 "--weight_only_precision", "int4")
        demo.run("build", "--checkpoint_dir", checkpoint, "--output_dir", engine, "--max_batch_size", "16")
        demo.run("run", "--engine_dir", engine, "--input_text", PROMPT, "--max_output_len", str(MAX_TOKENS),
                 "--temperature", "0.2")
        print()
        deploying = time.monotonic()
        with server(engine) as url:
            demo.durations.append(("deploy", time.monotonic() - deploying))
            demo.ask(url)
            stopping = time.monotonic()
        demo.durations.append(("stop", time.monotonic() - stopping))
    except (subprocess.SubprocessError, OSError, RuntimeError, KeyError, ValueError) as error:
        print(f"\nerror: the demo failed: {error}", file=sys.stderr)
        return 1
    print("\n== what it took")
    for name, seconds in [*demo.durations, ("all", time.monotonic() - started)]:
        print(f"  {name:<16} {seconds:6.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
