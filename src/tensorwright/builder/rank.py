"""Builds the engine file of one rank: program, passes, plan, compiled kernels, packed weights, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorwright.builder.backends import Compiled, backend_of
from tensorwright.builder.memory import plan_memory
from tensorwright.builder.pack import WeightSource, packed_weights
from tensorwright.builder.plan import Plan, choose
from tensorwright.builder.tune import Tuning
from tensorwright.builder.tuning_facts import tuning_facts
from tensorwright.engine.format import FORMAT_VERSION, KERNELS, MANIFEST, Writer
from tensorwright.errors import BuildError
from tensorwright.kernels.interface import Target
from tensorwright.program.program import Program, to_json

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class EngineFacts:
    """What the manifest says besides program and plan."""

    rank: int
    world_size: int
    build_key: str
    vocab_size: int
    end_ids: tuple[int, ...]
    tokens_per_block: int
    model: Mapping[str, Any]
    builder: str  # version of this package


def build_rank(program: Program, target: Target, facts: EngineFacts, source: WeightSource, output: Path,
               report: Report, tuning: Tuning | None = None) -> int:
    """Write the engine file of a program that went through all passes. Gives its size in bytes."""
    backend = backend_of(target.architecture)
    plan = choose(program, target, backend.kernels, tuning)
    report(0, "compiling kernels")
    compiled = backend.compile(plan)
    try:
        with Writer(output, len(program.weights) + 2) as writer:
            table = _write_weights(plan, source, writer, report)
            writer.add(KERNELS, compiled.code)
            manifest = json.dumps(_manifest(plan, facts, table, compiled)).encode()
            writer.add(MANIFEST, manifest)
            return writer.finish(_metadata(facts, plan, {KERNELS: compiled.code, MANIFEST: manifest}))
    except OSError as error:
        raise BuildError(f"{output} could not be written: {error.strerror}; nothing of it was left behind",
                         mend="give another --output_dir, or make room") from error


def _write_weights(plan: Plan, source: WeightSource, writer: Writer, report: Report) -> list[dict[str, Any]]:
    table = []
    for weight, layout, kernel, packed in packed_weights(plan, source):
        section = f"weights/{weight.name}"
        writer.add(section, packed)
        table.append({"name": weight.name, "kernel": kernel, "layout": layout, "bytes": packed.nbytes,
                      "crc32": writer.checksums[section]})
        report(packed.nbytes, f"packing {weight.name}")
    return table


def _manifest(plan: Plan, facts: EngineFacts, weights: list[dict[str, Any]],
              compiled: Compiled) -> dict[str, Any]:
    memory, tuning = plan_memory(plan.program), tuning_facts(plan)
    return {
        **asdict(facts),
        "program": to_json(plan.program),
        "steps": [{"op": c.op.name, "kernel": c.kernel.name, "layout": c.tactic.layout,
                   "parameters": dict(c.tactic.parameters), "symbol": c.symbol,
                   "few_rows": [asdict(variant) for variant in c.few_rows]} for c in plan.choices],
        "tuning": {**tuning, "groups": [*tuning["groups"], *compiled.choices]},
        "memory": {"slots": [[slot.rows, slot.columns] for slot in memory.slots], "slot_of": memory.slot_of},
        "weights": weights,
        "kernels": compiled.facts,
    }


def _metadata(facts: EngineFacts, plan: Plan, checked: Mapping[str, bytes]) -> dict[str, str]:
    """Section hashes are over the padded bytes, as a reader sees them."""
    hashes, target = {}, plan.target
    for name, content in checked.items():
        padded = content + b"\0" * (-len(content) % 4096)
        hashes[f"{name}.sha256"] = hashlib.sha256(padded).hexdigest()
    return {"format": "tensorwright-engine", "format_version": str(FORMAT_VERSION), "builder": facts.builder,
            "target": target.name, "architecture": target.architecture, "features": " ".join(target.features),
            "rank": str(facts.rank), "world_size": str(facts.world_size), "build_key": facts.build_key,
            "tuned": "yes" if plan.is_tuned else "no", **hashes}
