"""Shards of training tokens: made by worker processes, read by the trainer.

Knows how documents become rows of token ids, and that a shard is a raw file of 16-bit numbers.
Knows nothing of the network.  Each row starts a document, and the last document of a row is cut
off where the row ends: nothing is padding.

The lower 15 bits of a number are the token; the top bit says that the model should learn to
produce it (``demo.corpus``: the text that is not a user's).
"""

import argparse
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from demo.corpus import Document, long_document, short_document
from demo.python_docs import python_docs
from demo.tokenizer import load_tokenizer

LEARNT = 1 << 15
SHARD_TOKENS = 1 << 20
SHORT_ROW, LONG_ROW = 128, 1024
LONG_EVERY = 5  # one shard in so many has long rows


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[list[int]]:
    texts = [text for document in documents for text, _ in document]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    rows: list[list[int]] = []
    for document in documents:
        ids: list[int] = []
        for _, learnt in document:
            piece = next(encoded).ids
            ids += [token | LEARNT for token in piece] if learnt else piece
        rows.append(ids)
    return rows


def make_shard(rng: random.Random, tokenizer: Tokenizer, docs: list[str], row: int) -> NDArray[np.uint16]:
    """``SHARD_TOKENS`` numbers, in rows of ``row``."""
    shard: list[int] = []
    while len(shard) < SHARD_TOKENS:
        documents = [
            short_document(rng) if row == SHORT_ROW or rng.random() < 0.3
            else long_document(rng, docs)
            for _ in range(2000)
        ]  # fmt: skip
        for ids in encode(tokenizer, documents):
            shard += ids[: row - len(shard) % row]
    return np.array(shard[:SHARD_TOKENS], dtype=np.uint16)


def shard_name(kind: int, worker: int, index: int) -> str:
    """Sorted by age first, so that the reader sees every worker's shards as they come."""
    return f"{kind:04}-{index:05}-{worker:03}.u16"


def work(folder: Path, worker: int, seed: int, count: int) -> None:
    """Write ``count`` shards into the folder, each aside and then renamed."""
    rng = random.Random(f"{seed}/{worker}")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    docs = python_docs()
    for index in range(count):
        row = LONG_ROW if (index + worker) % LONG_EVERY == 0 else SHORT_ROW
        aside = folder / f"worker-{worker}.part"
        make_shard(rng, tokenizer, docs, row).tofile(aside)
        aside.replace(folder / shard_name(row, worker, index))


def main() -> None:
    parser = argparse.ArgumentParser(description="One worker; demo.train starts as many as it needs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    work(arguments.folder, arguments.worker, arguments.seed, arguments.count)


if __name__ == "__main__":
    main()
