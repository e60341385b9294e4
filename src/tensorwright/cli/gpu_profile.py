"""Where the time of a GPU's steps goes: kernels as they run, recorded steps too, traced by torch's profiler (CUPTI).

Kernels that are launched before their predecessor has ended overlap with it, and between others the device waits: what
they take together, less the overlap, plus the waiting, is the step. It knows an engine's launches and what they read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorwright.cli.bench import random_prompts
from tensorwright.cli.tables import print_table
from tensorwright.engine.engine import Engine
from tensorwright.kernels.cuda.launch import GpuSource, from_json
from tensorwright.kernels.cuda.sample import GREEDY
from tensorwright.program.ops import OPS
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.results import Update

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace
SHORT_NAME = 40
_KV = OPS["attention"].inputs.index("kv")


@dataclass(frozen=True)
class Span:
    """Something that ran on the device, in seconds of one clock."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Kernel:
    """What the engine knows of a kernel: a name for people, and bytes of weights and cache that a launch reads."""

    title: str
    bytes: float


@dataclass(frozen=True)
class Line:
    """All launches of a title, of one step: how many, their time, its share of the step, bytes, share of the limit."""

    name: str
    count: float
    ms: float
    share: float
    bytes: float
    share_of_limit: float


def trace_prefill(llm: LLM, input_len: int, measured_s: float, bytes_s: float) -> dict[str, Any]:
    """One prompt alone, from its request to its first token; without tracing it took `measured_s`."""
    prompts = random_prompts(1, input_len, llm.engine.vocab_size, seed=7)
    spans = trace(lambda: _exhaust(llm.stream(prompts, SamplingParameters(max_tokens=1, end_ids=()))))
    known = known_kernels(llm.engine, input_len / 2)
    return {"phase": "prefill", "batch": 1, "length": input_len,
            **profile_steps(spans, known, steps=1, measured_s=measured_s, bytes_s=bytes_s)}


def trace_decode(llm: LLM, batch: int, input_len: int, output_len: int, measured_s: float,
                 bytes_s: float) -> dict[str, Any]:
    """The second half of the steps in which all sequences decode; without tracing, one took `measured_s`."""
    prompts = random_prompts(batch, input_len, llm.engine.vocab_size, seed=8)
    updates = llm.stream(prompts, SamplingParameters(max_tokens=output_len, end_ids=()))
    counts = dict.fromkeys(range(batch), 0)
    first = None
    for update in updates:
        first = update.request_id if first is None else first
        counts[update.request_id - first] += len(update.token_ids)
        if min(counts.values()) >= output_len // 2:
            break
    spans = trace(lambda: _exhaust(updates))
    length = input_len + output_len * 3 // 4
    return {"phase": "decode", "batch": batch, "length": length,
            **profile_steps(spans, known_kernels(llm.engine, batch * length), steps=count_steps(spans, llm.engine),
                            measured_s=measured_s, bytes_s=bytes_s)}


def _exhaust(updates: Iterator[Update]) -> None:
    for _ in updates:
        pass


def trace(run: Callable[[], None]) -> list[Span]:
    """What the device did meanwhile, in the order of its beginnings."""
    import torch

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        return spans_of(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"])


def spans_of(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """The device's part of a Chrome trace, whose times are in microseconds."""
    found = [Span(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in events
             if event.get("cat") in DEVICE_WORK]
    return sorted(found, key=lambda span: span.begin_s)


def profile_steps(spans: Sequence[Span], known: Mapping[str, Kernel], *, steps: int, measured_s: float,
                  bytes_s: float) -> dict[str, Any]:
    """Lines and sums of one of so many steps. `known` by the names of the trace; `bytes_s`: the memory's read rate."""
    groups: dict[str, list[tuple[Span, float]]] = {}
    for span in spans:
        kernel = known.get(span.name) or Kernel(_short(span.name), 0.0)
        groups.setdefault(kernel.title, []).append((span, kernel.bytes))
    window_s = spans[-1].end_s - spans[0].begin_s if spans else 0.0
    busy = busy_s(spans)
    kernels = sum(span.end_s - span.begin_s for span in spans)
    lines = [_line(title, members, steps, window_s, bytes_s) for title, members in groups.items()]
    return {"measured_ms": measured_s * 1e3, "traced_ms": window_s / steps * 1e3, "kernels_ms": kernels / steps * 1e3,
            "overlap_ms": (kernels - busy) / steps * 1e3, "idle_ms": (window_s - busy) / steps * 1e3,
            "kinds": [asdict(line) for line in sorted(lines, key=lambda line: -line.ms)]}


def busy_s(spans: Sequence[Span]) -> float:
    """Seconds in which anything ran; spans by their beginnings."""
    busy, end = 0.0, float("-inf")
    for span in spans:
        busy += max(0.0, span.end_s - max(end, span.begin_s))
        end = max(end, span.end_s)
    return busy


def known_kernels(engine: Engine, kv_tokens: float) -> dict[str, Kernel]:
    """Every kernel of the engine by its mangled and its readable name, for steps that see so many cached tokens."""
    import torch

    facts, sizes = engine.manifest["kernels"], {w["name"]: w["bytes"] for w in engine.manifest["weights"]}
    found: dict[str, list[tuple[str, float]]] = {}
    for source, weights in _sources(engine):
        for launch in source.launches:
            names = [*_named(launch.arguments, weights), *(
                name for table, pointers in source.tables if f"tables.{table}" in _flat(launch.arguments)
                for name in _named(pointers, weights))]
            read = sum(sizes[name] for name in names if name in sizes and "embedding" not in name)
            read += kv_tokens * engine.kv_bytes_per_token * _cached_layers(names, launch.arguments, engine)
            found.setdefault(launch.function, []).append((_role(names, sizes), read))
    kernels: dict[str, Kernel] = {}
    for function, uses in found.items():
        if function in facts["functions"]:
            roles = " ".join(sorted({role for role, _ in uses if role}))
            title = f"{function.partition('<')[0].removeprefix('tw::')} {roles}".strip()
            symbol = facts["functions"][function]["symbol"]
            kernel = Kernel(title, sum(read for _, read in uses) / len(uses))
            kernels |= dict.fromkeys((symbol, torch._C._demangle(symbol)), kernel)
    return kernels


def count_steps(spans: Sequence[Span], engine: Engine) -> int:
    """How often the step's last kernel ran, the greedy choice."""
    facts = engine.manifest["kernels"]
    function = from_json(facts["entries"][GREEDY]).launches[0].function
    base = function.partition("<")[0].rpartition("::")[2]
    return max(1, sum(base in span.name for span in spans))


def print_gpu_profile(profile: Mapping[str, Any]) -> None:
    """The table of one phase and batch size."""
    what = (f"Prefill of {profile['length']} tokens" if profile["phase"] == "prefill" else
            f"One decode step, batch {profile['batch']}, {profile['length']} tokens each")
    rows = [(line["name"], f"{line['count']:.3g}", f"{line['ms']:.3f}", f"{line['share']:.1%}",
             *((f"{line['bytes'] / line['ms'] / 1e9:.2f}", f"{line['share_of_limit']:.0%}") if line["bytes"] else ()))
            for line in profile["kinds"]]
    ends = (("all kernels", "kernels_ms"), ("less overlap", "overlap_ms"), ("device waits", "idle_ms"),
            ("the step, traced", "traced_ms"), ("the step, not traced", "measured_ms"))
    rows += [(words, "", f"{profile[name]:.3f}", f"{profile[name] / profile['traced_ms']:.1%}")
             for words, name in ends if profile["traced_ms"]]
    print_table(f"\n{what}", rows, header=("", "launches", "ms", "share", "TB/s", "of limit"))


def _line(title: str, members: Sequence[tuple[Span, float]], steps: int, window_s: float, bytes_s: float) -> Line:
    taken, read = sum(span.end_s - span.begin_s for span, _ in members), sum(each for _, each in members)
    return Line(title, len(members) / steps, taken / steps * 1e3, taken / window_s, read / steps,
                read / bytes_s / taken if taken else 0.0)


def _sources(engine: Engine) -> list[tuple[GpuSource, Mapping[str, str]]]:
    """Each op's launches with its weights by role, then those of stretches, which name weights themselves."""
    entries = engine.manifest["kernels"]["entries"]
    ops = [(from_json(entries[variant.symbol]), op.weights)
           for op, step in zip(engine.program.ops, engine.steps, strict=True) for variant in step.variants]
    return [*ops, *((from_json(entries[stretch["entry"]]), dict[str, str]())
                    for stretch in engine.manifest["kernels"]["stretches"])]


def _named(arguments: Iterable[Any], weights: Mapping[str, str]) -> list[str]:
    """Weights and buffers of the program that arguments point to."""
    found = []
    for argument in _flat(arguments):
        kind, _, name = str(argument).partition("+")[0].partition(".")
        if kind == "named":
            found.append(name)
        elif kind == "weights" and name in weights and "+" not in str(argument):
            found.append(weights[name])
    return found


def _flat(arguments: Iterable[Any]) -> list[Any]:
    return [each for argument in arguments for each in (argument if isinstance(argument, tuple) else (argument,))]


def _cached_layers(names: Sequence[str], arguments: Iterable[Any], engine: Engine) -> float:
    """The share of all layers' cached keys and values that a launch reads: only one that knows their lengths does."""
    caches = {op.inputs[_KV] for op in engine.program.ops if op.kind == "attention"}
    reads = any(str(argument).endswith("kv_lengths") for argument in _flat(arguments))
    mine = len({*names} & caches) or sum(str(argument) == "inputs.kv" for argument in _flat(arguments))
    return mine / len(caches) if reads and caches else 0.0


def _role(names: Sequence[str], sizes: Mapping[str, int]) -> str:
    """What tells a launch from others of its kernel: its matrix, such as "qkv"; "" where it has none or many."""
    matrices = {name.removesuffix(".weight").rpartition(".")[2] for name in names if name.endswith(".weight")}
    return matrices.pop() if len(matrices) == 1 else ""


def _short(name: str) -> str:
    """Of a library's kernel: without its parameters."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0].strip()[:SHORT_NAME] or name[:SHORT_NAME]
