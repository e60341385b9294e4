"""`tensorwright inspect PATH`: what a model, checkpoint or engine is. It reads headers, and never loads code.

Engines of other machines, ranks and, as far as their header goes, other versions can be inspected too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwright.cli.options import Parser
from tensorwright.cli.tables import format_bytes, print_table
from tensorwright.errors import EngineError, ModelError, UsageError

if TYPE_CHECKING:
    from tensorwright.engine.format import Reader
    from tensorwright.models.config import ModelConfig
    from tensorwright.program.program import Program

Facts = dict[str, Any]
_LOOK = "python3 -m json.tool {}/config.json"


def configure(parser: Parser) -> None:
    """A path, and what to show of it beyond the facts."""
    parser.usage = "%(prog)s PATH [options]"
    parser.add_argument("path", type=Path, metavar="PATH", help="a model, checkpoint or engine folder, or a file")
    parser.add_argument("--program", action="store_true", help="an engine's program, one op a line")
    parser.add_argument("--tactics", action="store_true", help="an engine's tactics, with their times and limits")
    parser.add_argument("--weights", action="store_true", help="every tensor with dtype, shape and size")
    parser.add_argument("--verify", action="store_true", help="read an engine whole and check every section")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print the facts, then what was asked for beyond them."""
    facts = describe(arguments.path, weights=arguments.weights)
    program = _program_text(arguments.path, facts) if arguments.program else None
    tuning = _tuning(arguments.path, facts) if arguments.tactics else None
    if arguments.verify:
        facts["verified"] = _verify(arguments.path, facts)
    if arguments.json:
        asked = {"program": program, "tactics": tuning}
        print(json.dumps({**facts, **{name: value for name, value in asked.items() if value is not None}}, indent=2,
                         default=str))
        return 0
    _print(facts)
    if tuning is not None:
        _print_tuning(tuning)
    if program is not None:
        print("\nProgram\n" + program, end="")
    return 0


def describe(path: Path, *, weights: bool = False) -> Facts:
    """What lies at a path. Raises an error of the tree for what is nothing known, or is damaged."""
    if path.is_file():
        return _file(path, weights)
    if not path.is_dir():
        raise UsageError(f"there is nothing at {path}", mend=f"ls {path.parent}")
    config = _config(path)
    if "build_config" in config:
        return _engine_folder(path, config, weights)
    if "pretrained_config" not in config and "quantization" in config and "architecture" in config:
        return _checkpoint(path, weights)
    if "architectures" in config or "model_type" in config:
        return _model_folder(path, config, weights)
    raise UsageError(f"{path}/config.json is of no model, checkpoint or engine: it has none of architectures, "
                     "quantization and build_config", mend=_LOOK.format(path))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise UsageError(f"{path} is no model, checkpoint or engine folder: it has no config.json; it holds "
                         f"{found}", mend="give the folder that config.json lies in") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}/config.json is not JSON: {error}", mend=_LOOK.format(path)) from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}/config.json is not a JSON object", mend=_LOOK.format(path))
    return config


def _file(path: Path, weights: bool) -> Facts:
    if path.suffix == ".engine":
        from tensorwright.engine.format import Reader

        return {"kind": "engine file", "path": path, **_engine_file(Reader(path), weights)}
    if path.suffix == ".safetensors":
        return {"kind": "safetensors file", "path": path, **_tensors([path], weights)}
    raise UsageError(f"{path} is neither an .engine nor a .safetensors file",
                     mend=f"tensorwright inspect {path.parent}")


def _engine_folder(path: Path, config: Mapping[str, Any], weights: bool) -> Facts:
    from tensorwright.engine.config import limits_of, read_config
    from tensorwright.engine.format import Reader

    read_config(path)
    files = sorted(path.glob("rank*.engine"))
    first = _engine_file(Reader(path / "rank0.engine"), weights)
    build, whole = config["build_config"], first["ranks"] == len(files)
    return {"kind": "engine folder", "path": path, **first, "rank": None,
            "files": f"{len(files)} of {first['ranks']} ranks" + ("" if whole else ": not whole"),
            "profiling": build.get("profiling_verbosity"), "tokenizer": (path / "tokenizer.json").is_file(),
            "limits": asdict(limits_of(config))}


def _engine_file(reader: Reader, weights: bool) -> Facts:
    metadata, manifest = reader.metadata, _manifest(reader)
    program = _program(manifest)
    facts: Facts = {
        "built by": f"Tensorwright {metadata.get('builder')}, format {metadata.get('format_version')}",
        "target": f"{metadata.get('target')} ({metadata.get('architecture')})",
        "features": metadata.get("features"), "glibc": manifest["kernels"].get("glibc"),
        "rank": int(metadata["rank"]), "ranks": int(metadata["world_size"]),
        **_model_facts(manifest["model"]), "end_ids": manifest["end_ids"],
        "weights": _dtypes(program), "activations": _activations(program, metadata["architecture"]),
        "kv_cache": _cache_dtypes(program),
        "tokens_per_block": manifest["tokens_per_block"], "engine_bytes": reader.path.stat().st_size,
        "weight_bytes": sum(entry["bytes"] for entry in manifest["weights"]),
        "ops": dict(Counter(op.kind for op in program.ops)),
        "kernels": sorted({step["kernel"] for step in manifest["steps"]})}
    if weights:
        facts["tensors"] = [
            (entry["name"], _weight_type(program, entry["name"]), list(program.weights[entry["name"]].shape),
             entry["layout"], entry["bytes"]) for entry in manifest["weights"]]
    return facts


def _checkpoint(path: Path, weights: bool) -> Facts:
    from tensorwright.checkpoint.reader import Checkpoint

    config = Checkpoint(path).config
    algorithm = config.quantization.algorithm or "none"
    return {"kind": "checkpoint folder", "path": path, **_model_facts(asdict(config.model)), "quantization": algorithm,
            "group_size": config.quantization.group_size if config.quantization.algorithm else None,
            "kv_cache": config.quantization.kv_cache or config.model.dtype,
            "quantized lm_head": config.quantization.quantize_lm_head, "ranks": config.tp_size,
            "end_ids": list(config.end_ids), "tokenizer": (path / "tokenizer.json").is_file(),
            **_tensors([path / f"rank{rank}.safetensors" for rank in range(config.tp_size)], weights)}


def _model_folder(path: Path, config: Mapping[str, Any], weights: bool) -> Facts:
    from tensorwright.models import from_huggingface

    facts: Facts = {"kind": "Hugging Face model folder", "path": path}
    try:
        model: ModelConfig = from_huggingface(config)
        facts.update(_model_facts(asdict(model)), convertible="yes")
    except ModelError as error:
        facts.update(architecture=(config.get("architectures") or [config.get("model_type")])[0],
                     convertible=f"no: {error.message}")
    facts["tokenizer"] = (path / "tokenizer.json").is_file()
    return {**facts, **_tensors(_model_files(path), weights)}


def _model_files(path: Path) -> list[Path]:
    """The safetensors files that the index names, or the only one; `consolidated` copies are left out."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith("consolidated")]


def _tensors(files: list[Path], weights: bool) -> Facts:
    from tensorwright.checkpoint.tensor_file import TensorFile
    from tensorwright.errors import CheckpointError

    entries = {name: entry for file in files for name, entry in TensorFile(file, CheckpointError).entries.items()}
    facts: Facts = {"files": len(files), "num_tensors": len(entries),
                    "weight_bytes": sum(entry.num_bytes for entry in entries.values()),
                    "stored as": dict(Counter(entry.dtype for entry in entries.values()))}
    if weights:
        facts["tensors"] = [(name, entry.dtype, list(entry.shape), "", entry.num_bytes)
                            for name, entry in sorted(entries.items())]
    return facts


def _model_facts(model: Mapping[str, Any]) -> Facts:
    """The model's sizes, of the whole model; fields that say nothing are left out."""
    rope = model["rope"]
    heads = f"{model['num_heads']} of {model['head_size']}, {model['num_kv_heads']} for keys and values"
    return {"architecture": model["architecture"], "dtype": model["dtype"], "layers": model["num_layers"],
            "hidden_size": model["hidden_size"], "heads": heads, "intermediate_size": model["intermediate_size"],
            "vocab_size": model["vocab_size"], "positions": model["max_position_embeddings"],
            "rope": f"{rope['kind']}, theta {rope['theta']:g}", "sliding_window": model["sliding_window"] or None,
            "tied_embeddings": model["tied_embeddings"]}


def _manifest(reader: Reader) -> dict[str, Any]:
    from tensorwright.engine.engine import read_manifest

    if reader.metadata.get("format") != "tensorwright-engine":
        raise EngineError(f"{reader.path} is a safetensors file but no engine", mend="rename it to .safetensors")
    return read_manifest(reader)


def _program(manifest: Mapping[str, Any]) -> Program:
    from tensorwright.program.program import from_json

    return from_json(manifest["program"])


def _program_text(path: Path, facts: Facts) -> str:
    from tensorwright.program.printer import to_text

    return to_text(_program(_first_manifest(path, facts, "a program")))


def _tuning(path: Path, facts: Facts) -> dict[str, Any]:
    """`tuning_facts` of the first rank; empty in engines of format 1."""
    tuning: dict[str, Any] = _first_manifest(path, facts, "tactics").get("tuning", {})
    return tuning


def _first_manifest(path: Path, facts: Facts, what: str) -> dict[str, Any]:
    from tensorwright.engine.format import Reader

    if not facts["kind"].startswith("engine"):
        raise UsageError(f"{path} is a {facts['kind']}; only engines hold {what}", mend="tensorwright build")
    return _manifest(Reader(path / "rank0.engine" if path.is_dir() else path))


def _print_tuning(tuning: Mapping[str, Any]) -> None:
    from tensorwright.cli.tactics import print_tactics

    print()
    print_tactics(tuning, every_bucket=True)
    if not tuning.get("groups"):
        print("Tactics: no op has a choice of them.")


def _verify(path: Path, facts: Facts) -> str:
    """Check every section of every rank's file; raises EngineError that names damaged ones."""
    from tensorwright.engine.engine import verify
    from tensorwright.engine.format import Reader

    if not facts["kind"].startswith("engine"):
        raise UsageError(f"{path} is a {facts['kind']}; only engines hold checksums", mend="tensorwright build")
    files = sorted(path.glob("rank*.engine")) if path.is_dir() else [path]
    for reader in map(Reader, files):
        verify(reader)
    return f"every section of {len(files)} engine file{'s' if len(files) > 1 else ''} is sound"


def _dtypes(program: Program) -> dict[str, int]:
    """Elements held in each dtype."""
    counts: Counter[str] = Counter()
    for weight in program.weights.values():
        counts[_weight_type(program, weight.name)] += math.prod(weight.shape)
    return dict(counts)


def _weight_type(program: Program, name: str) -> str:
    weight = program.weights[name]
    group = f" group {weight.group_size}" if weight.group_size > 0 else " per channel"
    return weight.dtype + (group if weight.is_quantized else "")


def _activations(program: Program, architecture: str) -> str:
    """float32 always; rounded on the way into products: to 16 bits on GPUs, and on CPUs to int8 in linears with
    quantised weights, unless built with --exact.
    """
    if architecture == "cuda":
        rows = max((op.attributes.get("float8_rows", 0) for op in program.ops), default=0)
        return "float32, 16-bit in products" + (f", float8 in those of {rows} rows or more" if rows else "")
    linears = [op for op in program.ops if op.kind == "linear"]
    rounded = sum(op.attributes.get("activation_group", 0) > 0 for op in linears)
    if rounded:
        return f"float32, int8 in {rounded} of {len(linears)} linears"
    exact = any(program.weights[op.weights["weight"]].is_quantized for op in linears)
    return "float32 (built with --exact)" if exact else "float32"


def _cache_dtypes(program: Program) -> str:
    caches = [buffer for buffer in program.buffers.values() if buffer.kind == "cache"]
    return " + ".join(sorted({f"{buffer.dtype}{' scales' if 'scales' in buffer.name else ''}" for buffer in caches}))


def _print(facts: Facts) -> None:
    plain = [(name.replace("_", " "), _text(name, value)) for name, value in facts.items()
             if value is not None and name not in ("kind", "path", "limits", "tensors")]
    print_table(f"{facts['kind'][0].upper()}{facts['kind'][1:]} {facts['path']}", plain)
    if "limits" in facts:
        print_table("\nLimits", [(name, str(value)) for name, value in facts["limits"].items()])
    if "tensors" in facts:
        rows = [(name, dtype, str(shape), layout, format_bytes(size))
                for name, dtype, shape, layout, size in facts["tensors"]]
        print_table("\nTensors", rows, header=("name", "dtype", "shape", "layout", "size"))


def _text(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
