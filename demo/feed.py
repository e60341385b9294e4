"""The trainer's side of the shards: starts the workers and hands out batches.

Knows the shard files and the device that batches should be on.  Knows nothing of the network.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.shards import LONG_ROW, SHORT_ROW


def start_workers(folder: Path, workers: int, seed: int) -> list[subprocess.Popen[bytes]]:
    """Processes of their own, which hand over plain files: nothing is pickled."""
    command = [sys.executable, "-m", "demo.shards", str(folder), "--seed", str(seed)]
    one_thread = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # there is a process per core
    return [subprocess.Popen([*command, "--worker", str(i)], env=one_thread) for i in range(workers)]


class Feed:
    """Batches of whole rows, from new shards as long as there are any, else from old ones."""

    def __init__(self, folder: Path, batch_tokens: int, seed: int, device: torch.device) -> None:
        self.folder = folder
        self.batch_tokens = batch_tokens
        self.device = device
        self.rng = random.Random(seed)
        self.fresh: dict[int, list[Tensor]] = {SHORT_ROW: [], LONG_ROW: []}
        self.used: dict[int, list[Tensor]] = {SHORT_ROW: [], LONG_ROW: []}
        self.waiting: dict[int, list[Tensor]] = {SHORT_ROW: [], LONG_ROW: []}
        self.seen: set[str] = set()
        self.scanned = 0.0
        self.repeats = 0

    def _scan(self) -> None:
        self.scanned = time.monotonic()
        for path in sorted(self.folder.glob("*.u16")):
            if path.name not in self.seen:
                self.seen.add(path.name)
                row = int(path.name.split("-")[0])
                numbers = np.fromfile(path, dtype=np.uint16).astype(np.int32)
                self.fresh[row].append(torch.from_numpy(numbers).to(self.device))
                path.unlink()

    def _shard(self, row: int) -> Tensor:
        while True:
            if time.monotonic() - self.scanned > 0.5:
                self._scan()
            if self.fresh[row]:
                shard = self.fresh[row].pop(0)
                self.used[row].append(shard)
                return shard
            if self.used[row]:
                self.repeats += 1
                return self.rng.choice(self.used[row])
            time.sleep(0.1)  # only at the start, before the first shard is there

    def batch(self, row: int) -> Tensor:
        """``[batch_tokens / row, row]`` numbers as ``demo.shards`` defines them."""
        if not self.waiting[row]:
            rows = self._shard(row).view(-1, row)
            order = torch.randperm(len(rows), device=self.device)
            self.waiting[row] = list(torch.split(rows[order], self.batch_tokens // row))
        return self.waiting[row].pop()
