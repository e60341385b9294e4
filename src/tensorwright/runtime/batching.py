"""Turns a schedule into the arrays of one step. It knows the batch's layout, not why a chunk was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tensorwright.runtime.batch import Batch, Ints
from tensorwright.runtime.request import TokenSequence
from tensorwright.runtime.scheduler import Chunk


def make_batch(chunks: Sequence[Chunk], block_size: int, drawn: Mapping[TokenSequence, int]) -> Batch:
    """The step's arrays; rows of logits come in the order of the chunks and of their output positions.

    `drawn` has the number, in the last draw, of a token that is not known yet and that ends its sequence.
    """
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    ends = np.array([chunk.end for chunk in chunks], np.int32)
    lengths = ends - starts
    query_starts = np.cumsum(lengths, dtype=np.int32) - lengths
    tables = _block_tables(chunks, -(-int(ends.max()) // block_size))
    owners = np.repeat(np.arange(len(chunks), dtype=np.int32), lengths)
    positions = np.arange(len(owners), dtype=np.int32) + (starts - query_starts)[owners]
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    return Batch(
        token_ids=_token_ids(chunks, len(owners), drawn),
        positions=positions,
        slots=slots.astype(np.int32),
        query_starts=query_starts,
        query_lengths=lengths,
        kv_lengths=ends,
        block_tables=tables,
        output_rows=_output_rows(chunks, query_starts),
    )


def _block_tables(chunks: Sequence[Chunk], width: int) -> Ints:
    tables = np.zeros((len(chunks), width), np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        blocks = chunk.sequence.table.blocks[:width]
        row[: len(blocks)] = blocks
    return tables


def _token_ids(chunks: Sequence[Chunk], count: int, drawn: Mapping[TokenSequence, int]) -> Ints:
    ids: list[int] = []
    for chunk in chunks:
        ids += chunk.sequence.tokens[chunk.start : chunk.end]
        if chunk.end > len(chunk.sequence.tokens):
            ids.append(-1 - drawn[chunk.sequence])
    return np.fromiter(ids, np.int32, count)


def _output_rows(chunks: Sequence[Chunk], query_starts: Ints) -> Ints:
    rows = [first + position - chunk.start for chunk, first in zip(chunks, query_starts.tolist(), strict=True)
            for position in chunk.output_positions]
    return np.array(rows, np.int32)
