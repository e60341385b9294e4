"""Which executor and which memory an engine gets: the runtime's one dispatch between CPUs and GPUs.

The modules of the other machine are not imported: a CPU engine loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tensorwright.engine.engine import Engine
from tensorwright.runtime.batch import Executor
from tensorwright.runtime.communicator import Communicator
from tensorwright.runtime.memory import available_bytes

GPU = "cuda"


class Machine(Protocol):
    """What an engine runs on."""

    def available_bytes(self, engine: Engine, communicator: Communicator | None) -> int:
        """Memory that weights, activations and the KV cache of this rank may share."""

    def scratch_bytes(self, engine: Engine, rows: Mapping[str, int]) -> int:
        """Memory that ops take besides activations, for so many "tokens" and "outputs"."""

    def executor(self, engine: Engine, *, threads: int | None, num_blocks: int,
                 communicator: Communicator | None) -> Executor:
        """The engine, ready to execute batches."""


def machine_of(engine: Engine) -> Machine:
    """By the architecture that the engine was built for."""
    return _Gpu() if engine.metadata["architecture"] == GPU else _Cpu()


class _Cpu:
    def available_bytes(self, engine: Engine, communicator: Communicator | None) -> int:
        return available_bytes() // engine.world_size  # ranks of one host share its memory

    def scratch_bytes(self, engine: Engine, rows: Mapping[str, int]) -> int:
        return 0  # little, and not counted

    def executor(self, engine: Engine, *, threads: int | None, num_blocks: int,
                 communicator: Communicator | None) -> Executor:
        from tensorwright.runtime.executor import CpuExecutor

        return CpuExecutor(engine, threads=threads, num_blocks=num_blocks, communicator=communicator)


class _Gpu:
    def available_bytes(self, engine: Engine, communicator: Communicator | None) -> int:
        from tensorwright.kernels.cuda.targets import check_target

        check_target(engine.target, engine=str(engine.directory))
        from tensorwright.runtime.cuda.memory import free_bytes
        from tensorwright.runtime.cuda.ranks import use_own_gpu

        use_own_gpu(communicator)
        return free_bytes()

    def scratch_bytes(self, engine: Engine, rows: Mapping[str, int]) -> int:
        from tensorwright.runtime.cuda.memory import scratch_bytes
        from tensorwright.runtime.cuda.ranks import shape_of

        shared = shape_of(engine, rows["tokens"]).bytes if engine.world_size > 1 else 0
        return scratch_bytes(engine, rows) + shared

    def executor(self, engine: Engine, *, threads: int | None, num_blocks: int,
                 communicator: Communicator | None) -> Executor:
        from tensorwright.runtime.cuda.executor import CudaExecutor

        return CudaExecutor(engine, num_blocks=num_blocks, communicator=communicator)
