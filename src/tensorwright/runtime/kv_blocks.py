"""Which KV block belongs to which sequence. It knows block numbers and token ids, never what a block holds.

Prefix reuse: a full block is registered under (identity of the block before it, its tokens), so a lookup compares
the tokens themselves and a hash collision cannot give another prompt's text. Identities are never used twice: what
followed an evicted block cannot be found again by accident. Blocks that nobody uses stay registered until their
space is needed, the least recently used first; a sequence gives its last block back first, so that children always
go before their parent. Nothing depends on the cache's number type: reuse works with 16-bit and int8 alike.

The paging follows PagedAttention (Kwon et al. 2023), the prefix tree RadixAttention (Zheng et al. 2023).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_ROOT = 0  # the identity before a first block


@dataclass
class BlockTable:
    """One sequence's blocks in order. The first `num_sealed` are full and registered: they are never written again."""

    blocks: list[int] = field(default_factory=list)
    num_sealed: int = 0


@dataclass(frozen=True)
class Growth:
    """A table that is to hold the positions below `end`, of which those from `start` on will be written."""

    table: BlockTable
    start: int
    end: int


class BlockManager:
    """Hands out blocks, counts their users, and finds blocks whose tokens were computed before."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuse = reuse
        self._free = list(range(num_blocks - 1, -1, -1))  # last in, first out: untouched memory stays untouched
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered and used by nobody, the oldest first
        self._users = [0] * num_blocks
        self._identities = [_ROOT] * num_blocks  # _ROOT: not registered
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._registered: dict[tuple[int, tuple[int, ...]], int] = {}
        self._last_identity = _ROOT

    @property
    def num_available(self) -> int:
        """Blocks that can be had now, the reusable but idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.num_available

    @property
    def num_idle(self) -> int:
        """Blocks that nobody holds and that wait to be found again."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.block_size)

    def match(self, tokens: Sequence[int], limit: int) -> BlockTable:
        """A table that holds the longest registered prefix of tokens[:limit], whole blocks only."""
        table = BlockTable()
        if not self.reuse:
            return table
        parent = _ROOT
        for start in range(0, limit - self.block_size + 1, self.block_size):
            block = self._registered.get((parent, tuple(tokens[start : start + self.block_size])))
            if block is None:
                break
            self._hold(block)
            table.blocks.append(block)
            parent = self._identities[block]
        table.num_sealed = len(table.blocks)
        return table

    def shortage(self, growths: Iterable[Growth]) -> int:
        """Blocks missing for all these growths together; zero or less when they fit."""
        needed = 0
        writers: Counter[int] = Counter()
        for growth in growths:
            needed += max(0, self.blocks_for(growth.end) - len(growth.table.blocks))
            if growth.start % self.block_size:
                writers[growth.table.blocks[growth.start // self.block_size]] += 1
        for block, count in writers.items():
            needed += count - (self._users[block] == count)  # the last user of a shared block keeps it
        return needed - self.num_available

    def grow(self, growth: Growth) -> tuple[int, int] | None:
        """Add blocks so that the growth can be written; a pair (source, destination) must be copied before that.

        `shortage` must have said that it fits.
        """
        table, copy = growth.table, None
        if growth.start % self.block_size:
            index = growth.start // self.block_size
            block = table.blocks[index]
            if self._users[block] > 1:
                table.blocks[index] = self._take()
                self._drop(block)
                copy = (block, table.blocks[index])
        while len(table.blocks) < self.blocks_for(growth.end):
            table.blocks.append(self._take())
        return copy

    def seal(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Register the blocks that are full now. Where another block holds the same, the table changes to that one."""
        if not self.reuse:
            return
        for index in range(table.num_sealed, num_computed // self.block_size):
            parent = self._identities[table.blocks[index - 1]] if index else _ROOT
            key = (parent, tuple(tokens[index * self.block_size : (index + 1) * self.block_size]))
            block, twin = table.blocks[index], self._registered.get(key)
            if twin is None:
                self._last_identity += 1
                self._identities[block] = self._last_identity
                self._keys[block] = key
                self._registered[key] = block
            elif twin != block:
                self._hold(twin)
                self._drop(block)
                table.blocks[index] = twin
            table.num_sealed = index + 1

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks. The one that writes first into a shared block gets a copy by `grow`."""
        for block in table.blocks:
            self._users[block] += 1
        return BlockTable(list(table.blocks), table.num_sealed)

    def release(self, table: BlockTable) -> None:
        """Give all of a table's blocks back and empty it."""
        while table.blocks:
            self._drop(table.blocks.pop())
        table.num_sealed = 0

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise RuntimeError if the books are wrong, given every table that is alive. For tests and debugging."""
        users = Counter(block for table in tables for block in table.blocks)
        idle, free = set(self._idle), set(self._free)
        complaints = {
            "users differ from the tables": [users[b] for b in range(self.num_blocks)] != self._users,
            "a free block twice": len(free) != len(self._free),
            "a block both free and idle": bool(free & idle),
            "unused blocks lost": {b for b in range(self.num_blocks) if not users[b]} != free | idle,
            "an idle block is not registered": any(not self._identities[b] for b in idle),
            "a free block is registered": any(self._identities[b] for b in free),
            "registers differ": {key: b for b, key in self._keys.items()} != self._registered,
            "a child outlived its parent": not {parent for parent, _ in self._registered} <= {
                _ROOT, *(self._identities[b] for b in self._keys)},
        }
        wrong = [complaint for complaint, holds in complaints.items() if holds]
        if wrong:
            raise RuntimeError("KV blocks: " + ", ".join(wrong))

    def _hold(self, block: int) -> None:
        if not self._users[block]:
            del self._idle[block]
        self._users[block] += 1

    def _drop(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        if self._identities[block]:
            self._idle[block] = None
        else:
            self._free.append(block)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._identities[block] = _ROOT
            del self._registered[self._keys.pop(block)]
        self._users[block] = 1
        return block
