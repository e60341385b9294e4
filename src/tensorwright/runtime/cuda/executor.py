"""Runs the plan of a GPU engine: one copy in, launches or a recorded graph, one copy out.

It knows the program, the engine's plan and the device's memory. It knows no requests and no scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from tensorwright.engine.engine import Engine
from tensorwright.errors import UsageError
from tensorwright.kernels.cuda.driver import current_context, use_context
from tensorwright.kernels.cuda.targets import check_target
from tensorwright.runtime.batch import Batch, SamplingRow
from tensorwright.runtime.communicator import Communicator, check_ranks
from tensorwright.runtime.cuda.inputs import Inputs, Sizes, decode_bucket, sizes_of
from tensorwright.runtime.cuda.logits import DeviceLogits, LateDraw, Results
from tensorwright.runtime.cuda.memory import Activations, Caches, Weights
from tensorwright.runtime.cuda.plan import Plan
from tensorwright.runtime.cuda.ranks import Ranks
from tensorwright.runtime.cuda.sampling import Samplings, is_greedy

NOT_IN_NUMPY: dict[torch.dtype, Any] = {torch.bfloat16: ml_dtypes.bfloat16,
                                        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}


class CudaExecutor:
    """`runtime.batch.Executor` over an engine's cubins. Everything runs on one stream, in the order of the calls."""

    runs_ahead = True

    def __init__(self, engine: Engine, *, num_blocks: int, communicator: Communicator | None = None,
                 graphs: bool = True, stretches: bool = True) -> None:
        """Take all memory and copy the weights.

        `graphs`: record steps of single tokens when they first come. `stretches`: run several ops at once where the
        engine has kernels for it. Tests compare both with neither.

        Raises IncompatibleEngineError for another GPU, RanksError for a wrong number of ranks, LimitError where
        memory is too little.
        """
        check_target(engine.target, engine=str(engine.directory))
        check_ranks(engine.world_size, communicator)
        self.engine, self.program = engine, engine.program
        self.vocab_size, self.num_blocks, self.block_size = engine.vocab_size, num_blocks, engine.tokens_per_block
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=self.device)  # makes the context, which modules are loaded into
        self._context, self._graphs_wanted, self._stretches_wanted = current_context(), graphs, stretches
        limits = engine.limits
        self._max_tokens = limits.max_num_tokens
        self._table_width = -(-limits.max_seq_len // self.block_size)
        self._buckets = _buckets(min(limits.max_batch_size * limits.max_beam_width, self._max_tokens))
        self._weights = Weights(engine, self.device)
        self._caches = Caches(engine, num_blocks, self.device)
        self._inputs, self._samplings = Inputs(self.device), Samplings(self.device)
        most = max(self._max_tokens, self._buckets[-1])
        self._ranks = None if communicator is None else Ranks(engine, communicator, self.device, most)
        self._stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch: no types
        self._results = Results(self.device, self._check)
        with torch.cuda.stream(self._stream):
            # One row of logits may give several tokens, so there may be more draws than rows of a small step.
            self._bind(max(self._buckets[-1], limits.max_batch_size))

    def _bind(self, max_outputs: int) -> None:
        """Memory for so many rows of logits; graphs of other memory are dropped."""
        torch.cuda.synchronize(self.device)  # a step may still use what is given up here
        rows = {"tokens": max(self._max_tokens, self._buckets[-1]), "outputs": max_outputs}
        self._activations = Activations(self.engine, rows, self.device)  # too little memory leaves all as it was
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._plan = Plan(self.engine, self._weights, self._caches, self._activations, processors,
                          stretches=self._stretches_wanted, ranks=self._ranks)
        self._graphs: dict[tuple[int, str | None], torch.cuda.CUDAGraph | None] = {}  # by bucket and stretch
        self._graphs_address = self._inputs.address
        self._results.grow(max_outputs)
        self._max_outputs = max_outputs

    def execute(self, batch: Batch) -> DeviceLogits:
        """Logits float32 [R, vocab] on the device, overwritten by the next call, with the greedy choice of each row."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            self._run(batch, 0, len(self.program.ops))
        return DeviceLogits(self.logits[:batch.output_rows.shape[0]], self._stream)

    def execute_range(self, batch: Batch, begin: int, end: int) -> None:
        """Run the ops begin .. end − 1 only; what earlier ops would have written must be in their buffers."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            self._run(batch, begin, end)
        self._stream.synchronize()
        self._check()

    def _check(self) -> None:
        """Raise RanksError if another rank has left the last step without what it needed."""
        if self._ranks is not None:
            self._ranks.check()

    @property
    def logits(self) -> torch.Tensor:
        """Where they are on the device, [rows, vocab]."""
        return self._activations.buffer(self.program.ops[-1].outputs[0], self.vocab_size)

    def _run(self, batch: Batch, begin: int, end: int) -> None:
        use_context(self._context)  # of this thread: a server steps in another one than it loads in
        if batch.token_ids.shape[0] > self._max_tokens:
            raise UsageError(f"a step of {batch.token_ids.shape[0]} tokens; the engine holds {self._max_tokens}")
        if batch.output_rows.shape[0] > self._max_outputs:
            self._bind(batch.output_rows.shape[0])
        is_whole = (begin, end) == (0, len(self.program.ops))
        bucket = decode_bucket(batch, self._buckets, self._table_width) if is_whole else None
        sizes = bucket or sizes_of(batch)
        inputs = self._inputs.send(batch, sizes)
        if self._graphs_address != self._inputs.address:
            self._graphs, self._graphs_address = {}, self._inputs.address
        if bucket is None or not self._graphs_wanted or not self._replay(bucket, inputs):
            self._launch(begin, end, sizes, inputs)

    def _launch(self, begin: int, end: int, sizes: Sizes, inputs: dict[str, int]) -> None:
        """Ops one after the other; in a whole step, tokens that were just drawn before, and the greedy choice after."""
        stream, results = self._stream.cuda_stream, self._results
        if (begin, end) == (0, len(self.program.ops)):
            self._plan.take(sizes.tokens, inputs["token_ids"], results.drawn, stream)
        self._plan.run(begin, end, sizes, inputs, stream)
        if end == len(self.program.ops) and sizes.outputs:
            self._plan.choose(sizes.outputs, self.logits, results.chosen, results.drawn, stream)

    def _replay(self, bucket: Sizes, inputs: dict[str, int]) -> bool:
        """Run the bucket's graph, recorded when it comes for the second time: the first run makes what it needs."""
        key = bucket.tokens, self._plan.stretch(0, len(self.program.ops), bucket)
        if key not in self._graphs:
            self._graphs[key] = None
            return False
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")  # torch.cuda.graph would wait, and collect garbage
            try:
                self._launch(0, len(self.program.ops), bucket, inputs)
            finally:
                graph.capture_end()
            self._graphs[key] = graph
        graph.replay()
        return True

    def buffer(self, name: str) -> NDArray[Any]:
        """A copy of a buffer: caches whole, activations [rows, columns]."""
        self._stream.synchronize()
        cache = self._caches.tensors.get(name)
        if cache is None:
            return np.asarray(self._activations.buffer(name, int(self.program.buffers[name].shape[1])).cpu().numpy())
        if cache.dtype in NOT_IN_NUMPY:
            return np.asarray(cache.view(torch.uint8).cpu().numpy()).view(NOT_IN_NUMPY[cache.dtype])
        return np.asarray(cache.cpu().numpy())

    def sample(self, logits: DeviceLogits, rows: Sequence[SamplingRow]) -> LateDraw:
        """A token and its log probability for each row of logits (see `runtime.sampling` for the meaning)."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            if not (logits.is_whole and all(is_greedy(row) for row in rows)):
                samplings, adjustments = self._samplings.send(logits.rows, rows)
                self._plan.draw(len(rows), logits.values, samplings, adjustments, self._results.chosen,
                                self._results.drawn, self._stream.cuda_stream)
            return self._results.send(len(rows))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination) in every layer."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            for source, destination in pairs:
                self._caches.copy_block(source, destination)


def _buckets(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the first that holds all."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)
