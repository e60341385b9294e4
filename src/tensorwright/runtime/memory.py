"""How much memory there is, and how many KV blocks go into it. It knows sizes, not what they hold.

Weights are used from the mapped file: they need no memory of their own but must stay in the page cache to be fast, so
the plan leaves room for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tensorwright.engine.limits import Limits
from tensorwright.errors import LimitError, UsageError


@dataclass(frozen=True)
class Needs:
    """What an engine takes, in bytes, on this rank."""

    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    tokens_per_block: int


@dataclass(frozen=True)
class MemoryPlan:
    """KV blocks, and the numbers that led to them."""

    needs: Needs
    num_blocks: int
    available_bytes: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache holds, of all sequences together."""
        return self.num_blocks * self.needs.tokens_per_block

    @property
    def kv_bytes(self) -> int:
        """Memory that the cache comes to when it is full."""
        return self.kv_tokens * self.needs.kv_bytes_per_token

    def table(self, limits: Limits) -> list[tuple[str, str]]:
        """Rows for people."""
        longest = min(limits.max_seq_len, self.kv_tokens)
        return [
            ("weights", _gib(self.needs.weight_bytes)),
            ("activations", _gib(self.needs.activation_bytes)),
            ("KV cache when full", _gib(self.kv_bytes)),
            ("KV tokens that fit", f"{self.kv_tokens:,} ({self.num_blocks:,} blocks of {self.needs.tokens_per_block})"),
            ("bytes per KV token", f"{self.needs.kv_bytes_per_token:,}"),
            (f"sequences of {longest:,} tokens at once", str(self.kv_tokens // longest)),
            ("memory available", _gib(self.available_bytes)),
        ]


def plan_memory(limits: Limits, needs: Needs, *, max_kv_tokens: int | None, kv_cache_fraction: float,
                available: int, needs_at: Callable[[Limits], Needs] | None = None) -> MemoryPlan:
    """Blocks for max_batch_size sequences of max_seq_len, or fewer: the smaller bound wins.

    Args:
        limits: the engine's.
        needs: the engine's.
        max_kv_tokens: an upper bound in tokens; None: none.
        kv_cache_fraction: of the available memory that weights and activations leave, in (0, 1].
        available: bytes.
        needs_at: what other limits would take, for a refusal that names the largest that fit.

    Raises:
        UsageError: a bound that cannot be meant.
        LimitError: what was asked does not fit; the message holds the largest setting that does.
    """
    if not 0 < kv_cache_fraction <= 1:
        raise UsageError(f"the KV cache's share of free memory must be above 0 and at most 1; got {kv_cache_fraction}")
    if max_kv_tokens is not None and max_kv_tokens < 1:
        raise UsageError(f"max_kv_tokens must be 1 or more; got {max_kv_tokens}")
    block = needs.tokens_per_block

    def blocks_beside(taken: Needs) -> int:
        room = int(kv_cache_fraction * (available - taken.weight_bytes - taken.activation_bytes))
        return max(0, room) // (needs.kv_bytes_per_token * block)

    fitting = blocks_beside(needs)
    wanted = limits.max_batch_size * limits.max_beam_width * -(-limits.max_seq_len // block)
    asked = wanted if max_kv_tokens is None else max(1, max_kv_tokens // block)
    least = min(asked, wanted if max_kv_tokens else -(-limits.max_seq_len // block))
    if least > fitting:
        one = f"one sequence of max_seq_len {limits.max_seq_len}"
        what = f"max_kv_tokens {max_kv_tokens}" if max_kv_tokens else one
        raise LimitError(
            f"the KV cache for {what} needs {_gib(least * block * needs.kv_bytes_per_token)}; "
            f"{_gib(available)} are available, of which weights and activations take "
            f"{_gib(needs.weight_bytes + needs.activation_bytes)}, and {kv_cache_fraction:g} of the rest holds "
            f"{fitting * block} tokens",
            mend=_mend(limits, needs, fitting, lambda tried: needs_at is not None
                       and blocks_beside(needs_at(tried)) >= least))
    return MemoryPlan(needs, min(asked, wanted, fitting), available)


def _mend(limits: Limits, needs: Needs, fitting: int, fits: Callable[[Limits], bool]) -> str:
    """The largest settings that fit: KV tokens, tokens of a step, and where no step is small enough, sequences."""
    def tokens(count: int) -> Limits:
        return replace(limits, max_num_tokens=max(count, min(needs.tokens_per_block, limits.max_num_tokens)))

    def sequences(count: int) -> Limits:
        return replace(tokens(count), max_batch_size=count)

    ways = [f"--max_tokens_in_paged_kv_cache {fitting * needs.tokens_per_block}"] if fitting else []
    found = _largest(limits.max_num_tokens, tokens, fits) or _largest(limits.max_batch_size, sequences, fits)
    if found is not None:
        ways.append("tensorwright build --checkpoint_dir C --output_dir E "
                    f"--max_batch_size {found.max_batch_size} --max_num_tokens {found.max_num_tokens}")
    return ", or ".join(ways) or ("free some memory, or use a smaller model, fewer bits for each weight, or an int8 KV "
                                  "cache")


def _largest(most: int, at: Callable[[int], Limits], fits: Callable[[Limits], bool]) -> Limits | None:
    """Limits at the largest count from 1 to `most` that fits, where all smaller ones do; None: not even at 1."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(at(middle)) else (least, middle - 1)
    return at(least) if least else None


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: MemAvailable, or less where a control group says so."""
    bounds = [_mem_available(root / "proc/meminfo"), *_group_bounds(root)]
    return max(0, min(bounds))


def _mem_available(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise UsageError(f"{path} has no MemAvailable", mend="say --max_tokens_in_paged_kv_cache")


def _group_bounds(root: Path) -> Iterator[int]:
    """What each control group from this process's up to the root still allows, cgroup v2 and v1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = ("memory.max", "memory.current", "inactive_file")
        base = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            base /= "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif controllers:
            continue
        group = base / path.lstrip("/")
        while group != base.parent:
            yield from _group_bound(group, *names)
            group = group.parent


def _group_bound(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        words = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such controller here, or a name that only the host can see
        return
    if words.isdigit():
        yield int(words) - used + int(stat.get(reclaimable, 0))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.2f} MiB"
