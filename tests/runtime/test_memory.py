"""The plan for KV blocks, and how much memory there is, from files as Linux writes them."""

from __future__ import annotations

import pytest

from tensorwright.engine.limits import Limits
from tensorwright.errors import LimitError, UsageError
from tensorwright.runtime.memory import Needs, available_bytes, plan_memory

LIMITS = Limits(max_batch_size=4, max_seq_len=100, max_input_len=90, max_num_tokens=64)
NEEDS = Needs(weight_bytes=1000, activation_bytes=200, kv_bytes_per_token=10, tokens_per_block=16)


def plan(available, tokens=None, fraction=1.0, limits=LIMITS):
    return plan_memory(limits, NEEDS, max_kv_tokens=tokens, kv_cache_fraction=fraction, available=available)


def test_plenty_of_memory_gives_what_the_limits_can_use():
    assert plan(10**9).num_blocks == 4 * 7
    assert plan(10**9, limits=Limits(4, 100, 90, 64, max_beam_width=2)).num_blocks == 8 * 7


def test_little_memory_gives_what_fits():
    assert plan(1200 + 10 * 16 * 9 + 5).num_blocks == 9
    assert plan(1200 + 2 * 10 * 16 * 9, fraction=0.5).num_blocks == 9


def test_the_smaller_bound_wins():
    assert plan(10**9, tokens=50).num_blocks == 3
    assert plan(10**9, tokens=10**6).num_blocks == 28
    assert plan(10**9, tokens=3).num_blocks == 1


def test_too_little_memory_names_what_would_fit():
    with pytest.raises(LimitError) as caught:
        plan(1200 + 10 * 16 * 6)
    assert "holds 96 tokens" in caught.value.message
    assert "max_seq_len 100" in caught.value.message
    assert caught.value.mend == "--max_tokens_in_paged_kv_cache 96"
    assert plan(1200 + 10 * 16 * 6, tokens=96).num_blocks == 6
    with pytest.raises(LimitError, match="max_kv_tokens 200"):
        plan(1200 + 10 * 16 * 6, tokens=200)
    with pytest.raises(LimitError, match="0 tokens"):
        plan(500, tokens=16)


def needs_at(limits):
    activations = 10 * limits.max_num_tokens + 5 * limits.max_batch_size
    return Needs(weight_bytes=1000, activation_bytes=activations, kv_bytes_per_token=10, tokens_per_block=16)


@pytest.mark.parametrize(("available", "mend"), [
    (1000 + 300 + 20 + 1120, "--max_tokens_in_paged_kv_cache 64, or tensorwright build --checkpoint_dir C "
                             "--output_dir E --max_batch_size 4 --max_num_tokens 30"),
    (1000 + 160 + 10 + 1120, "--max_tokens_in_paged_kv_cache 48, or tensorwright build --checkpoint_dir C "
                             "--output_dir E --max_batch_size 2 --max_num_tokens 16"),
    (1000 + 160 + 4 + 1120, "--max_tokens_in_paged_kv_cache 48"),
    (1100, "free some memory, or use a smaller model, fewer bits for each weight, or an int8 KV cache"),
])
def test_a_refusal_names_the_largest_settings_that_fit(available, mend):
    """One sequence is 1,120 bytes; a step takes 10 bytes for each token, 16 tokens or more, and 5 for each sequence."""
    with pytest.raises(LimitError) as caught:
        plan_memory(LIMITS, needs_at(LIMITS), max_kv_tokens=None, kv_cache_fraction=1.0, available=available,
                    needs_at=needs_at)
    assert caught.value.mend == mend


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"fraction": 0.0}, {"fraction": 1.5}])
def test_bounds_that_cannot_be_meant(wrong):
    with pytest.raises(UsageError):
        plan(10**9, **wrong)


def test_table_shows_what_fits():
    table = dict(plan(10**9).table(LIMITS))
    assert table["KV tokens that fit"] == "448 (28 blocks of 16)"
    assert table["sequences of 100 tokens at once"] == "4"


def machine(root, cgroup, files):
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n", "proc/self/cgroup": cgroup, **files}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_bytes(root)


def test_control_groups_bound_the_memory(tmp_path):
    group = "sys/fs/cgroup/a/b"
    parent = "sys/fs/cgroup/a"
    files = {f"{group}/memory.max": "max\n", f"{group}/memory.current": "5\n", f"{group}/memory.stat": "anon 1\n",
             f"{parent}/memory.max": "3000000\n", f"{parent}/memory.current": "2500000\n",
             f"{parent}/memory.stat": "anon 1\ninactive_file 400000\n"}
    assert machine(tmp_path, "0::/a/b\n", files) == 900000


def test_control_groups_of_version_1(tmp_path):
    group = "sys/fs/cgroup/memory/x"
    files = {f"{group}/memory.limit_in_bytes": "3000000\n", f"{group}/memory.usage_in_bytes": "1000000\n",
             f"{group}/memory.stat": "total_inactive_file 50\n"}
    assert machine(tmp_path, "4:memory:/x\n0::/\n", files) == 2000050


def test_without_control_groups(tmp_path):
    assert machine(tmp_path, "0::/gone\n", {}) == 5000 * 1024
