"""Block manager: whatever is done, the books balance and a match leads to the very tokens that were asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tensorwright.runtime.kv_blocks import BlockManager, Growth

SIZE = 3


class Blocks(RuleBasedStateMachine):
    """Sequences that start, grow, fork and end over a pool that remembers what was written where."""

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(12, SIZE)
        self.pool = {}
        self.live = []  # [tokens, table]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def start(self, tokens):
        table = self.manager.match(tokens, len(tokens) - 1)
        assert table.num_sealed * SIZE < len(tokens)
        growth = Growth(table, table.num_sealed * SIZE, len(tokens))
        if self.manager.shortage([growth]) > 0:
            self.manager.release(table)
            return
        self.manager.grow(growth)
        self._write(tokens, table, growth.start)
        self.live.append([tokens, table])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def extend(self, data, more):
        entry = data.draw(st.sampled_from(self.live))
        tokens, table = entry
        growth = Growth(table, len(tokens), len(tokens) + len(more))
        if self.manager.shortage([growth]) > 0:
            return
        copy = self.manager.grow(growth)
        if copy:
            for offset in range(SIZE):
                self.pool[copy[1], offset] = self.pool.get((copy[0], offset))
        entry[0] = tokens + more
        self._write(entry[0], table, len(tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        tokens, table = data.draw(st.sampled_from(self.live))
        self.live.append([list(tokens), self.manager.fork(table)])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data):
        index = data.draw(st.integers(0, len(self.live) - 1))
        self.manager.release(self.live.pop(index)[1])

    def _write(self, tokens, table, start):
        for position in range(start, len(tokens)):
            self.pool[table.blocks[position // SIZE], position % SIZE] = tokens[position]
        self.manager.seal(table, tokens, len(tokens))

    @invariant()
    def the_books_balance(self):
        self.manager.check_integrity([table for _, table in self.live])

    @invariant()
    def tables_lead_to_their_tokens(self):
        for tokens, table in self.live:
            assert [self.pool[table.blocks[p // SIZE], p % SIZE] for p in range(len(tokens))] == tokens
            assert len(table.blocks) == self.manager.blocks_for(len(tokens))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def filled(manager, tokens):
    table = manager.match(tokens, len(tokens) - 1)
    manager.grow(Growth(table, table.num_sealed * manager.block_size, len(tokens)))
    manager.seal(table, tokens, len(tokens))
    return table


def test_equal_blocks_become_one():
    manager = BlockManager(8, 2)
    first = manager.match([1, 2, 3, 4], 3)
    second = manager.match([1, 2, 3, 4], 3)
    for table in (first, second):  # both start before either is registered
        manager.grow(Growth(table, 0, 4))
    for table in (first, second):
        manager.seal(table, [1, 2, 3, 4], 4)
    assert first.blocks == second.blocks
    assert manager.num_used == 2


def test_the_same_tokens_after_another_prefix_are_not_the_same_block():
    manager = BlockManager(8, 2)
    manager.release(filled(manager, [1, 2, 7, 7]))
    assert manager.match([3, 4, 7, 7], 4).blocks == []
    assert len(manager.match([1, 2, 7, 7, 5], 5).blocks) == 2


def test_the_oldest_prefix_goes_first_and_its_end_before_its_start():
    manager = BlockManager(4, 2)
    manager.release(filled(manager, [1, 1, 2, 2]))
    manager.release(filled(manager, [3, 3, 4, 4]))
    table = filled(manager, [5, 5])
    assert len(manager.match([1, 1, 2, 2, 9], 4).blocks) == 1
    assert table.blocks


def test_freed_blocks_are_used_again_before_untouched_ones():
    manager = BlockManager(100, 4, reuse=False)
    touched = set()
    for _ in range(20):
        table = filled(manager, list(range(12)))
        touched |= set(table.blocks)
        manager.release(table)
    assert len(touched) == 3


def test_without_reuse_nothing_is_found():
    manager = BlockManager(4, 2, reuse=False)
    manager.release(filled(manager, [1, 1, 2, 2]))
    assert manager.match([1, 1, 2, 2], 4).blocks == []
    assert manager.num_available == 4


def test_integrity_check_sees_a_lost_table():
    manager = BlockManager(4, 2)
    filled(manager, [1, 1])
    with pytest.raises(RuntimeError, match="users differ"):
        manager.check_integrity([])


def test_scheduler_and_blocks_import_no_arrays():
    program = ("import sys, tensorwright.runtime.scheduler, tensorwright.runtime.kv_blocks;"
               "sys.exit(','.join({'numpy', 'torch'} & set(sys.modules)))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stderr.strip() == ""
