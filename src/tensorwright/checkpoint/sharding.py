"""Which rows and columns of the Hugging Face tensors make a rank's tensor. It knows shapes, and reads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from tensorwright.checkpoint.config import CheckpointConfig
from tensorwright.errors import UsageError
from tensorwright.models.config import ModelConfig
from tensorwright.models.weight_names import Source, WeightSpec


@dataclass(frozen=True)
class Piece:
    """Rows and columns of one source, and the row where they start in the rank's tensor."""

    source: Source
    rows: range
    columns: range | None  # None: vectors
    target_row: int


def shard_shape(spec: WeightSpec, config: CheckpointConfig) -> tuple[int, ...]:
    """Shape of every rank's tensor, before quantisation. The vocabulary is padded up to a multiple of the ranks."""
    rows = sum(len(_rows(source, spec, config, 0)) for source in spec.sources)
    if spec.cut == "vocabulary":
        rows = -(-spec.sources[0].shape[0] // config.tp_size)
    columns = _columns(spec.sources[0], spec, config.tp_size, 0)
    return (rows,) if columns is None else (rows, len(columns))


def pieces(spec: WeightSpec, config: CheckpointConfig, rank: int) -> tuple[Piece, ...]:
    """A rank's tensor from the top down; rows that no piece covers are padding."""
    found = []
    target = 0
    for source in spec.sources:
        rows = _rows(source, spec, config, rank)
        found.append(Piece(source, rows, _columns(source, spec, config.tp_size, rank), target))
        target += len(rows)
    return tuple(found)


def _rows(source: Source, spec: WeightSpec, config: CheckpointConfig, rank: int) -> range:
    count, tp_size, kv_heads = source.shape[0], config.tp_size, config.model.num_kv_heads
    if spec.cut in ("none", "columns"):
        return range(count)
    if source.is_kv and kv_heads < tp_size:  # every head goes to tp_size / kv_heads ranks
        head = rank * kv_heads // tp_size
        return range(head * config.model.head_size, (head + 1) * config.model.head_size)
    share = -(-count // tp_size)
    return range(min(rank * share, count), min((rank + 1) * share, count))


def _columns(source: Source, spec: WeightSpec, tp_size: int, rank: int) -> range | None:
    if len(source.shape) == 1:
        return None
    count = source.shape[1]
    share = count // tp_size
    return range(rank * share, (rank + 1) * share) if spec.cut == "columns" else range(count)


def check_sizes(config: CheckpointConfig) -> None:
    """Refuses ranks that do not divide the model and groups that do not divide a rank's inputs. Raises UsageError."""
    model, tp_size = config.model, config.tp_size
    if tp_size < 1:
        raise UsageError(f"--tp_size {tp_size}: expected 1 or more ranks", mend="--tp_size 1")
    fitting = [n for n in range(1, min(tp_size, model.num_heads) + 1) if not _reasons(model, n)]
    reasons = _reasons(model, tp_size)
    if reasons:
        raise UsageError(f"the model cannot be cut into --tp_size {tp_size} ranks: {'; '.join(reasons)}",
                         mend=f"--tp_size {fitting[-1] if fitting else 1}")
    group = config.quantization.group_size
    if config.quantization.algorithm != "W4A16" or group == -1:
        _check_even(config)
        return
    inputs = _inputs(config)
    wrong = [f"{name} has {count}" for name, count in inputs.items() if count % group]
    if wrong:
        smaller = [size for size in (64, 32) if size < group and not any(n % size for n in inputs.values())]
        raise UsageError(f"inputs per rank are not multiples of the group size {group}: {', '.join(wrong)}",
                         mend=f"--group_size {smaller[0] if smaller else -1}")


def _inputs(config: CheckpointConfig) -> dict[str, int]:
    """Inputs of the quantised matrices on one rank."""
    model = config.model
    return {"qkv, fc and gate": model.hidden_size, "dense": model.num_heads * model.head_size // config.tp_size,
            "proj": model.intermediate_size // config.tp_size}


def _check_even(config: CheckpointConfig) -> None:
    if config.quantization.algorithm != "W4A16":
        return
    odd = [f"{name} has {count}" for name, count in _inputs(config).items() if count % 2]
    if odd:
        raise UsageError(f"two int4 codes share a byte, but the inputs per rank are odd: {', '.join(odd)}",
                         mend="--weight_only_precision int8")


def _reasons(model: ModelConfig, tp_size: int) -> list[str]:
    reasons = []
    if model.num_heads % tp_size:
        reasons.append(f"{model.num_heads} attention heads do not divide by {tp_size}")
    if model.num_kv_heads % tp_size and tp_size % model.num_kv_heads:
        reasons.append(f"{model.num_kv_heads} key and value heads neither divide by {tp_size} nor divide it")
    if model.intermediate_size % tp_size:
        reasons.append(f"intermediate_size {model.intermediate_size} does not divide by {tp_size}")
    return reasons
