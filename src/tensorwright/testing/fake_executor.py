"""An executor without a model: logits are a function of the tokens that block tables really lead to.

Its KV pool holds, for each slot, the token and its position. A row's logits are a hash of the whole context read back
through the block tables, so one wrong slot, fork, copy, reused block or length gives other tokens than `plain_logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tensorwright.runtime.batch import Batch, Draw, Drawn, Floats, Ints, SamplingRow
from tensorwright.runtime.sampling import choose

LogitsFunction = Callable[[Sequence[int]], Floats]


def plain_logits(tokens: Sequence[int], vocab_size: int = 32) -> Floats:
    """Logits [V] after these tokens: a hash of all of them in order."""
    state = 14695981039346656037
    for token in tokens:
        state = (state ^ (int(token) + 1)) * 1099511628211 % 2**64
    generator = np.random.Generator(np.random.Philox(key=state))
    return generator.standard_normal(vocab_size).astype(np.float32) * 3


class FakeExecutor:
    """`runtime.batch.Executor`. Raises RuntimeError when a context is not what its length and positions say.

    With `runs_ahead` a draw's tokens can be named before they are known, and are lost when asked for too late.
    """

    def __init__(self, *, vocab_size: int = 32, num_blocks: int = 64, block_size: int = 4,
                 max_num_tokens: int = 1 << 30, logits: LogitsFunction | None = None, runs_ahead: bool = False) -> None:
        self.vocab_size, self.num_blocks, self.block_size = vocab_size, num_blocks, block_size
        self.max_num_tokens = max_num_tokens
        self.runs_ahead = runs_ahead
        self.num_steps = self.num_draws = self.num_unknown = 0
        self._drawn = np.zeros(0, np.int32)
        self._logits = logits or (lambda tokens: plain_logits(tokens, vocab_size))
        self._tokens = np.full((num_blocks, block_size), -1, np.int64)
        self._positions = np.full((num_blocks, block_size), -1, np.int64)

    def execute(self, batch: Batch) -> Floats:
        """Write the step's tokens into their slots, then answer for the rows asked for."""
        self._check(batch)
        self.num_steps += 1
        self._tokens.reshape(-1)[batch.slots] = self._token_ids(batch)
        self._positions.reshape(-1)[batch.slots] = batch.positions
        owners = np.repeat(np.arange(len(batch.query_starts)), batch.query_lengths)
        rows = [self._logits(self._context(batch.block_tables[owners[row]], int(batch.positions[row])))
                for row in batch.output_rows.tolist()]
        return np.array(rows, np.float32).reshape(len(rows), self.vocab_size)

    def sample(self, logits: Floats, rows: Sequence[SamplingRow]) -> Draw:
        """The reference's choice."""
        tokens, log_probs = choose(logits, rows)
        self._drawn = tokens
        self.num_draws += 1
        with np.errstate(all="ignore"):
            drawn = Drawn(tokens, log_probs, np.isfinite(logits.sum(axis=1)))
        return _Late(self, drawn) if self.runs_ahead else drawn

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks."""
        for source, destination in pairs:
            self._tokens[destination] = self._tokens[source]
            self._positions[destination] = self._positions[source]

    def _token_ids(self, batch: Batch) -> Ints:
        unknown = batch.token_ids < 0
        self.num_unknown += int(unknown.sum())
        if unknown.any() and not self.runs_ahead:
            raise RuntimeError("a token that is not known, where every step ends before the next begins")
        token_ids = batch.token_ids.copy()
        token_ids[unknown] = self._drawn[-1 - batch.token_ids[unknown]]
        return token_ids

    def _context(self, table: Ints, last: int) -> list[int]:
        blocks = table[: last // self.block_size + 1]
        positions = self._positions[blocks].reshape(-1)[: last + 1]
        if positions.tolist() != list(range(last + 1)):
            raise RuntimeError(f"the context up to position {last} is broken: {positions.tolist()}")
        context: list[int] = self._tokens[blocks].reshape(-1)[: last + 1].tolist()
        return context

    def _check(self, batch: Batch) -> None:
        arrays = vars(batch).values()
        complaints = {
            "arrays are not contiguous int32": any(a.dtype != np.int32 or not a.flags.c_contiguous for a in arrays),
            "too many tokens": len(batch.token_ids) > self.max_num_tokens,
            "a slot is written twice": len(set(batch.slots.tolist())) != len(batch.slots),
            "a slot is out of range": bool((batch.slots >= self._tokens.size).any() or (batch.slots < 0).any()),
            "query starts": (np.cumsum(batch.query_lengths) - batch.query_lengths).tolist()
            != batch.query_starts.tolist(),
            "positions are not the last of kv_lengths": any(
                batch.positions[start : start + length].tolist() != list(range(end - length, end))
                for start, length, end in zip(batch.query_starts, batch.query_lengths, batch.kv_lengths, strict=True)),
        }
        wrong = [complaint for complaint, holds in complaints.items() if holds]
        if wrong:
            raise RuntimeError("batch: " + ", ".join(wrong))


class _Late:
    """A draw that is gone when the next but one is made: a device's memory for results is reused."""

    def __init__(self, executor: FakeExecutor, drawn: Drawn) -> None:
        self._executor, self._drawn = executor, drawn
        self._last = executor.num_draws + 1

    def result(self) -> Drawn:
        """The tokens."""
        if self._executor.num_draws > self._last:
            raise RuntimeError("the result was overwritten before it was asked for")
        return self._drawn
