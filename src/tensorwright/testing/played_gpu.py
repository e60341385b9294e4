"""A GPU that is played: what torch and launches ask of it happens late, when somebody waits for it.

So a buffer that is written again too early, a token that the host would have to know, or a recorded step that looks at
the wrong place shows. It knows the GPU executor's torch calls, and no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tensorwright.runtime.cuda import executor, inputs, logits

PROCESSORS = 8


class PlayedGpu:
    """Work in the order in which it was given; `launch` only notes it."""

    def __init__(self) -> None:
        self.done = self.replays = 0
        self.work: list[Callable[[], object]] = []
        self.recording: list[Callable[[], object]] | None = None
        self._is_busy = False

    def launch(self, work: Callable[[], object]) -> None:
        """Behind what was given before, or into the graph that is recorded."""
        (self.work if self.recording is None else self.recording).append(work)

    def wait(self, until: int | None = None) -> None:
        """Do what has been given, or the first of it; work that waits itself is at its place in the order already."""
        if self._is_busy:
            return
        self._is_busy = True
        for work in self.work[self.done:until]:
            self.done += 1
            work()
        self._is_busy = False


class _Event:
    def __init__(self, gpu: PlayedGpu) -> None:
        self._gpu, self._until = gpu, 0

    def record(self) -> None:
        self._until = len(self._gpu.work)

    def synchronize(self) -> None:
        self._gpu.wait(self._until)


class _Graph:
    def __init__(self, gpu: PlayedGpu) -> None:
        self._gpu = gpu
        self._work: list[Callable[[], object]] = []

    def capture_begin(self, **_: Any) -> None:
        self._gpu.recording = self._work

    def capture_end(self) -> None:
        self._gpu.recording = None

    def replay(self) -> None:
        self._gpu.replays += 1
        for work in self._work:
            self._gpu.launch(work)


@contextmanager
def played(gpu: PlayedGpu, **parts: Any) -> Iterator[None]:
    """Torch over this GPU, where the executor uses it. Of the executor's module, `parts` are replaced besides."""
    copy, to_host = torch.Tensor.copy_, torch.Tensor.cpu

    def copy_later(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking:
            gpu.launch(lambda: copy(into, source))
            return into
        gpu.wait()
        return copy(into, source)

    def to_host_now(tensor: torch.Tensor) -> torch.Tensor:
        gpu.wait()
        return to_host(tensor).clone()

    cuda = SimpleNamespace(
        Event=lambda: _Event(gpu), Stream=lambda _: SimpleNamespace(cuda_stream=0, synchronize=gpu.wait),
        CUDAGraph=lambda: _Graph(gpu), stream=lambda _: nullcontext(), synchronize=lambda _: gpu.wait(),
        current_device=lambda: 0, get_device_properties=lambda _: SimpleNamespace(multi_processor_count=PROCESSORS))
    names = {name: getattr(torch, name) for name in ("no_grad", "float32", "int32")}
    names |= {"cuda": cuda, "device": lambda *_: torch.device("cpu"),
              "zeros": lambda *size, pin_memory=False, **how: torch.zeros(*size, **how)}
    parts |= {name: lambda *_, **__: None for name in ("check_target", "use_context", "current_context")}
    with ExitStack() as stack:
        for module in (executor, inputs, logits):
            stack.enter_context(patch.object(module, "torch", SimpleNamespace(**names)))
        stack.enter_context(patch.object(torch.Tensor, "copy_", copy_later))
        stack.enter_context(patch.object(torch.Tensor, "cpu", to_host_now))
        for name, part in parts.items():
            stack.enter_context(patch.object(executor, name, part))
        yield
