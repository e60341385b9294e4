"""A checkpoint folder opened for reading, one tensor at a time from a memory map. It knows no Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

from tensorwright.checkpoint.config import read_config
from tensorwright.checkpoint.tensor import Tensor
from tensorwright.checkpoint.tensor_file import TensorFile
from tensorwright.errors import CheckpointError

SCALE_SUFFIXES = ("weights_scaling_factor", "per_channel_scale")


class Checkpoint:
    """The folder that `convert` wrote. Names of weights go without `.weight`; others (`X.bias`) as they are."""

    def __init__(self, directory: Path) -> None:
        """Reads config.json and every rank's header. Raises CheckpointError."""
        self.directory = directory
        self.config = read_config(directory)
        paths = [directory / f"rank{rank}.safetensors" for rank in range(self.config.tp_size)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks {', '.join(missing)}; config.json says tp_size "
                                  f"{self.config.tp_size}", mend="tensorwright convert --model_dir M --output_dir "
                                  f"{directory} --tp_size {self.config.tp_size}")
        self._files = tuple(TensorFile(path, CheckpointError) for path in paths)

    def names(self, rank: int) -> tuple[str, ...]:
        """The names that `tensor` takes, of one rank's file."""
        return tuple(name.removesuffix(".weight") for name in self._files[rank].entries
                     if not name.endswith(SCALE_SUFFIXES))

    def shape(self, rank: int, name: str) -> tuple[int, ...]:
        """Shape as stored: an int4 matrix has half as many columns as inputs."""
        return self._files[rank].entries[self._stored(rank, name)].shape

    def tensor(self, rank: int, name: str) -> Tensor:
        """A tensor in the neutral layout; arrays are views of the file. Scales are [out, in/group] or [out, 1]."""
        file = self._files[rank]
        stored = self._stored(rank, name)
        base = stored.removesuffix(".weight")
        for suffix in SCALE_SUFFIXES:
            if f"{base}.{suffix}" in file.entries:
                scales = file.map(f"{base}.{suffix}")
                return Tensor(file.map(stored), scales.reshape(scales.shape[0], -1))
        return Tensor(file.map(stored))

    def _stored(self, rank: int, name: str) -> str:
        entries = self._files[rank].entries
        for stored in (f"{name}.weight", name):
            if stored in entries:
                return stored
        raise CheckpointError(f"{self._files[rank].path} has no tensor {name} or {name}.weight",
                              mend=f"tensorwright inspect {self.directory}")
