"""Opening an engine of several ranks: what each rank finds becomes what all of them do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorwright.runtime.opening import open_engine
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.fake_executor import FakeExecutor


class OtherRank:
    """A communicator whose other rank has room for so many KV blocks."""

    rank, size = 0, 2

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    def gather(self, data: bytes) -> list[bytes]:
        return [data, str(self._blocks).encode()]


@pytest.mark.parametrize("blocks", [5, 10_000])
def test_the_rank_with_the_least_memory_decides(blocks: int, tmp_path: Path) -> None:
    folder = build_engine(Recipe(tp_size=2), tmp_path)
    opened = open_engine(folder, communicator=OtherRank(blocks), executor=FakeExecutor())
    most = opened.engine.limits.max_batch_size * -(-opened.engine.limits.max_seq_len // 16)
    assert opened.plan.num_blocks == min(blocks, most)
