"""`tensorwright bench`: load, first token, prefill, decode and memory of an engine, through the real runtime.

Prompts are random tokens, different for every sequence, blocks are not reused, and end ids are ignored, so that every
request has the lengths that were asked for. Figures are medians over the repeats. What the machine can do is measured
in the same run: bytes read per second, and operations per second in the engine's own instructions (`roofline.py`).
On shared machines the bandwidth changes from one minute to the next, so it is read just before and just after every
stretch of decode steps, and a stretch is compared with its own two readings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwright.cli.files import check_place, write_whole
from tensorwright.cli.options import Parser
from tensorwright.errors import LimitError, UsageError

if TYPE_CHECKING:
    from tensorwright.cli.profile import RecordingExecutor
    from tensorwright.cli.roofline import Limits as RooflineLimits
    from tensorwright.cli.roofline import Work
    from tensorwright.engine.engine import Engine
    from tensorwright.engine.limits import Limits
    from tensorwright.runtime.communicator import Communicator
    from tensorwright.runtime.llm import LLM


WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class Speed:
    """What a step of one kind reaches: rates, and shares of the limits. None where a limit is not known."""

    bytes_per_step: float
    operations_per_step: float
    bytes_s: float
    operations_s: float
    share_of_bandwidth: float
    share_of_arithmetic: float | None
    share_of_limit: float  # of the limit that comes first: the larger of the two shares


@dataclass(frozen=True)
class Prefill(Speed):
    """One prompt alone, all its chunks together, from the request to the first token."""

    ttft_ms: float
    tok_s: float


@dataclass(frozen=True)
class Decode(Speed):
    """A batch in steady decode: time of a step, tokens of all sequences per second; the bandwidth around it."""

    batch: int
    tpot_ms: float
    tok_s: float
    bandwidth_bytes_s: float


@dataclass(frozen=True)
class Stretch:
    """Decode steps in a row: seconds of one, and bytes that could be read per second, before and after."""

    step_s: float
    bandwidths: tuple[float, float]

    @property
    def bandwidth(self) -> float:
        """The mean of the two readings."""
        return statistics.fmean(self.bandwidths)


@dataclass(frozen=True)
class Measurement:
    """What `--json` holds. The limits are what the same threads reach in the same run."""

    engine_dir: str
    target: str
    threads: int
    input_len: int
    output_len: int
    load_s: float
    peak_rss_bytes: int
    device: str | None  # the GPU, and what the engine has taken of its memory
    device_bytes: int | None
    bandwidth_bytes_s: float
    arithmetic_operations_s: Mapping[int, float] | None  # by the bits of the numbers that are multiplied
    prefill: Prefill
    decode: tuple[Decode, ...]
    profile: tuple[dict[str, Any], ...] = ()


def configure(parser: Parser) -> None:
    """What to measure, and where the figures go."""
    parser.add_argument("--engine_dir", type=Path, default=Path("engine_outputs"), help="engine folder")
    parser.add_argument("--batch_sizes", "--batch_size", type=_counts, default=(1,), metavar="N,N,...",
                        help="sequences decoded together (default: 1)")
    parser.add_argument("--input_len", type=_count, default=512, help="tokens of each prompt")
    parser.add_argument("--output_len", type=_count, default=64, help="new tokens of each sequence, 2 or more")
    parser.add_argument("--threads", type=_count, help="threads (default: one per physical core)")
    parser.add_argument("--repeats", type=_count, default=3, help="times that each figure is measured")
    parser.add_argument("--profile", action="store_true",
                        help="also name the steps that the time goes to; on a GPU the kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print a table, and write the JSON file. Of several ranks, the first one speaks."""
    from tensorwright.cli.bench_table import print_measurement
    from tensorwright.runtime.communicator import Communicator

    if arguments.json is not None:
        check_place(arguments.json)
    communicator = Communicator.from_environment()
    try:
        result = measure(arguments, communicator)
    finally:
        if communicator is not None:
            communicator.close()
    if communicator is not None and communicator.rank > 0:
        return 0
    if communicator is not None:
        print(f"Ranks: {communicator.size}, sums travel by {communicator.transport}")
    print_measurement(result)
    if arguments.json is not None:
        text = json.dumps(asdict(result), indent=2) + "\n"
        write_whole(arguments.json, lambda file: file.write(text.encode()))
    return 0


def measure(arguments: argparse.Namespace, communicator: Communicator | None) -> Measurement:
    """All figures, of this rank. LimitError when the engine cannot hold such requests."""
    from tensorwright.cli.machine import peak_memory_bytes
    from tensorwright.cli.roofline import decode_step, prefill_steps, work_of
    from tensorwright.engine.config import limits_of, read_config
    from tensorwright.runtime.executor import default_threads

    threads = arguments.threads or default_threads()
    _check(limits_of(read_config(arguments.engine_dir)), arguments)
    started = time.perf_counter()
    llm, recorder = _open(arguments, threads, communicator)
    load_s = time.perf_counter() - started
    ttft_s = _first_token(llm, arguments.input_len, arguments.repeats)
    prompt_records = tuple(recorder.records) if recorder else ()
    peaks = [peak_memory_bytes()]  # the probes' own memory does not count
    device, device_bytes = _device(llm.engine)
    read = _reader(llm.engine, threads)
    stretches = {batch: _decode(llm, batch, arguments, read, peaks) for batch in arguments.batch_sizes}
    limits = measure_limits(llm.engine, threads, [each for found in stretches.values() for each in found])
    chunks = prefill_steps(arguments.input_len, llm.engine.limits.max_num_tokens)
    kv_length = arguments.input_len + arguments.output_len // 2
    prompt_work = work_of(llm.engine, chunks, limits)
    tpots = {batch: statistics.median(each.step_s for each in found) for batch, found in stretches.items()}
    step_work = {batch: work_of(llm.engine, [decode_step(batch, kv_length)],
                                replace(limits, bytes_s=_bandwidth(found))) for batch, found in stretches.items()}
    prefill = Prefill(**_speed(prompt_work, ttft_s), ttft_ms=ttft_s * 1e3, tok_s=arguments.input_len / ttft_s)
    decode = tuple(Decode(**_speed(step_work[batch], step_s, stretches[batch]), batch=batch, tpot_ms=step_s * 1e3,
                          tok_s=batch / step_s, bandwidth_bytes_s=_bandwidth(stretches[batch]))
                   for batch, step_s in tpots.items())
    profile: tuple[dict[str, Any], ...] = ()
    if arguments.profile and is_gpu(llm.engine):
        from tensorwright.cli.gpu_profile import trace_decode, trace_prefill

        profile = (trace_prefill(llm, arguments.input_len, ttft_s, limits.bytes_s),
                   *(trace_decode(llm, batch, arguments.input_len, arguments.output_len, step_s, limits.bytes_s)
                     for batch, step_s in tpots.items()))
    elif recorder:
        from tensorwright.cli.profile import profile_decode, profile_prefill

        profile = (profile_prefill(llm.engine, prompt_records, prompt_work, arguments.input_len, ttft_s),
                   *(profile_decode(llm.engine, recorder.records, step_work[batch], batch, kv_length, step_s)
                     for batch, step_s in tpots.items()))
    return Measurement(str(arguments.engine_dir), llm.engine.target, threads, arguments.input_len,
                       arguments.output_len, load_s, max(peaks), device, device_bytes, limits.bytes_s,
                       limits.operations_s, prefill, decode, profile)


def _open(arguments: argparse.Namespace, threads: int,
          communicator: Communicator | None) -> tuple[LLM, RecordingExecutor | None]:
    """The engine with room for the largest batch; with --profile, what records its steps."""
    from tensorwright.engine.config import read_config
    from tensorwright.engine.engine import Engine
    from tensorwright.runtime.llm import LLM

    # Every sequence in whole blocks, and one block more for each.
    size = int(read_config(arguments.engine_dir)["build_config"]["tokens_per_block"])
    num_blocks = max(arguments.batch_sizes) * (-(-(arguments.input_len + arguments.output_len) // size) + 1)
    recorder = None
    if arguments.profile:
        from tensorwright.cli.profile import RecordingExecutor

        engine = Engine.open(arguments.engine_dir, communicator.rank if communicator else 0)
        if not is_gpu(engine):
            recorder = RecordingExecutor(engine, num_blocks=num_blocks, threads=threads, communicator=communicator)
    llm = LLM(arguments.engine_dir, threads=threads, block_reuse=False, communicator=communicator,
              max_kv_tokens=num_blocks * size, executor=recorder)
    return llm, recorder


def measure_limits(engine: Engine, threads: int, stretches: Sequence[Stretch]) -> RooflineLimits:
    """The bandwidth found around all stretches, and the arithmetic of the engine's target on so many threads."""
    from tensorwright.cli.arithmetic import arithmetic_rates
    from tensorwright.cli.roofline import FLOAT_BITS, Limits, operand_widths
    from tensorwright.kernels.cpu.load import load_library

    if is_gpu(engine):
        from tensorwright.cli.gpu_limits import multiply_rate

        return Limits(_bandwidth(stretches), {FLOAT_BITS: multiply_rate()})
    library = load_library(engine.kernels(), glibc=engine.manifest["kernels"]["glibc"])
    return Limits(_bandwidth(stretches), arithmetic_rates(library, threads, operand_widths(engine)))


def _reader(engine: Engine, threads: int) -> Callable[[], float]:
    """What measures the bandwidth of the machine that the engine runs on, in bytes per second."""
    if is_gpu(engine):
        from tensorwright.cli.gpu_limits import read_rate

        return read_rate
    from tensorwright.cli import bandwidth

    return lambda: bandwidth.read_bandwidth(threads)


def _device(engine: Engine) -> tuple[str | None, int | None]:
    """The GPU's name and the bytes taken of it; None, None for CPU engines."""
    if not is_gpu(engine):
        return None, None
    from tensorwright.cli.gpu_limits import device_bytes, device_name

    return device_name(), device_bytes()


def is_gpu(engine: Engine) -> bool:
    """Whether the engine runs on a GPU."""
    return engine.metadata["architecture"] == "cuda"


def random_prompts(num_prompts: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids; no two prompts share a beginning, except by chance."""
    import numpy as np

    prompts: list[list[int]] = np.random.default_rng(seed).integers(0, vocab_size, (num_prompts, length)).tolist()
    return prompts


def time_per_token(events: Sequence[tuple[int, float, int]]) -> float:
    """Seconds per token of each sequence while all of them decode, from (sequence, time, new tokens) in time order.

    The window opens with the last sequence's first token and closes with the first sequence's last.
    """
    by_sequence: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for sequence, moment, count in events:
        by_sequence[sequence].append((moment, count))
    opens = max(times[0][0] for times in by_sequence.values())
    closes = min(times[-1][0] for times in by_sequence.values())
    spans = []
    for times in by_sequence.values():
        inside = [(moment, count) for moment, count in times if opens <= moment <= closes]
        tokens = sum(count for _, count in inside[1:])
        if tokens:
            spans.append((inside[-1][0] - inside[0][0]) / tokens)
    if not spans:
        raise UsageError("the sequences never decoded together: the first ended before the last began",
                         mend="a larger --output_len, or smaller --batch_sizes")
    return statistics.fmean(spans)


def _check(limits: Limits, arguments: argparse.Namespace) -> None:
    length, largest = arguments.input_len + arguments.output_len, max(arguments.batch_sizes)
    if arguments.output_len < 2:
        raise UsageError(f"--output_len is {arguments.output_len}, expected 2 or more: decode steps begin with the "
                         "second token")
    if arguments.input_len > limits.max_input_len or length > limits.max_seq_len:
        raise LimitError(f"--input_len {arguments.input_len} and --output_len {arguments.output_len} make {length} "
                         f"tokens; the engine allows max_input_len {limits.max_input_len} and max_seq_len "
                         f"{limits.max_seq_len}")
    if largest > limits.max_batch_size:
        raise LimitError(f"--batch_sizes asks for {largest}; the engine's max_batch_size is {limits.max_batch_size}")


def _first_token(llm: LLM, input_len: int, repeats: int) -> float:
    """Median seconds from one request's start to its first token; a first, untimed request warms up."""
    from tensorwright.runtime.parameters import SamplingParameters

    times = []
    for repeat in range(repeats + 1):
        length = input_len if repeat else min(input_len, WARM_UP_TOKENS)
        prompts = random_prompts(1, length, llm.engine.vocab_size, seed=repeat)
        result = llm.generate(prompts, SamplingParameters(max_tokens=1, end_ids=()))[0]
        if result.error is not None:
            raise UsageError(f"the request failed: {result.error}")
        times.append(result.time_to_first_token_s)
    return statistics.median(times[1:])


def _decode(llm: LLM, batch: int, arguments: argparse.Namespace, read: Callable[[], float],
            peaks: list[int]) -> list[Stretch]:
    """One stretch of decode steps of so many sequences for each repeat; adds to `peaks` the memory in use after it."""
    from tensorwright.cli.machine import resident_bytes
    from tensorwright.runtime.parameters import SamplingParameters

    parameters = SamplingParameters(max_tokens=arguments.output_len, end_ids=())
    found = []
    for repeat in range(arguments.repeats):
        prompts = random_prompts(batch, arguments.input_len, llm.engine.vocab_size, seed=1000 * batch + repeat)
        before, events = 0.0, list[tuple[int, float, int]]()
        starts = 2 if llm.runs_ahead and arguments.output_len > 2 else 1  # one runs on during read()
        for update in llm.stream(prompts, parameters):
            if update.token_ids:
                events.append((update.request_id, time.perf_counter(), len(update.token_ids)))
            decoding = {sequence for sequence, _, _ in events}
            if starts and len(decoding) == batch and update.request_id == max(decoding):  # the step's last update
                before, starts = before or read(), starts - 1
                events = [(sequence, time.perf_counter(), 0) for sequence in decoding]
        peaks.append(resident_bytes())
        found.append(Stretch(time_per_token(events), (before, read())))
    return found


def _bandwidth(stretches: Sequence[Stretch]) -> float:
    return statistics.median(each.bandwidth for each in stretches)


def _speed(works: Sequence[Work], seconds: float, stretches: Sequence[Stretch] = ()) -> dict[str, Any]:
    """The fields of `Speed` of ops that took so long together; with stretches, the median of their shares."""
    from tensorwright.cli.roofline import total

    work = total(works)
    memory = statistics.median(work.bytes / each.step_s / each.bandwidth for each in stretches) if stretches else \
        work.memory_s / seconds
    arithmetic = None if work.arithmetic_s is None else work.arithmetic_s / seconds
    return {"bytes_per_step": work.bytes, "operations_per_step": work.operations, "bytes_s": work.bytes / seconds,
            "operations_s": work.operations / seconds, "share_of_bandwidth": memory, "share_of_arithmetic": arithmetic,
            "share_of_limit": max(memory, arithmetic or 0.0)}


def _count(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _counts(words: str) -> tuple[int, ...]:
    return tuple(_count(word) for word in words.split(","))
