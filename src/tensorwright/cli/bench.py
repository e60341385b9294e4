"""`tensorwright bench`: load, first token, prefill, decode and memory of an engine, through the real runtime.

Prompts are random tokens, different for every sequence, blocks are not reused, and end ids are ignored, so that every
request has the lengths that were asked for. Figures are medians over the repeats. A decode step must read the weights
and the cached keys and values once: `share_of_limit` compares that with what the machine's memory can deliver.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwright.cli.files import check_place, write_whole
from tensorwright.cli.options import Parser
from tensorwright.errors import LimitError, UsageError

if TYPE_CHECKING:
    from tensorwright.engine.engine import Engine
    from tensorwright.engine.limits import Limits
    from tensorwright.runtime.communicator import Communicator
    from tensorwright.runtime.llm import LLM


@dataclass(frozen=True)
class Decode:
    """A batch in steady decode: time of a step, tokens of all sequences per second, bytes it must read."""

    batch: int
    tpot_ms: float
    tok_s: float
    bytes_per_step: float
    share_of_limit: float


@dataclass(frozen=True)
class Measurement:
    """What `--json` holds. Bandwidth is what the same threads read from memory beyond the caches."""

    engine_dir: str
    target: str
    threads: int
    input_len: int
    output_len: int
    load_s: float
    ttft_ms: float
    prefill_tok_s: float
    peak_rss_bytes: int
    bandwidth_bytes_s: float
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
    parser.add_argument("--profile", action="store_true", help="also name the steps that the time goes to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print a table, and write the JSON file. Of several ranks, the first one speaks."""
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
    _print(result)
    if arguments.json is not None:
        text = json.dumps(asdict(result), indent=2) + "\n"
        write_whole(arguments.json, lambda file: file.write(text.encode()))
    return 0


def measure(arguments: argparse.Namespace, communicator: Communicator | None) -> Measurement:
    """All figures, of this rank. LimitError when the engine cannot hold such requests."""
    from tensorwright.cli.bandwidth import read_bandwidth
    from tensorwright.cli.machine import peak_memory_bytes
    from tensorwright.engine.config import limits_of, read_config
    from tensorwright.runtime.executor import default_threads
    from tensorwright.runtime.llm import LLM

    threads = arguments.threads or default_threads()
    length = arguments.input_len + arguments.output_len
    _check(limits_of(read_config(arguments.engine_dir)), arguments)
    started = time.perf_counter()
    llm = LLM(arguments.engine_dir, threads=threads, block_reuse=False, communicator=communicator,
              max_kv_tokens=_kv_tokens(arguments.engine_dir, max(arguments.batch_sizes), length))
    load_s = time.perf_counter() - started
    ttft_s = _first_token(llm, arguments.input_len, arguments.repeats)
    tpots = {batch: _step_time(llm, batch, arguments) for batch in arguments.batch_sizes}
    peak = peak_memory_bytes()
    bandwidth = read_bandwidth(threads)
    mean_length = arguments.input_len + arguments.output_len / 2
    decode = tuple(_decode(llm.engine, batch, tpots[batch], mean_length, bandwidth) for batch in tpots)
    profile: tuple[dict[str, Any], ...] = ()
    if arguments.profile:
        from tensorwright.cli.profile import profile_decode

        profile = tuple(profile_decode(llm.engine, batch, round(mean_length), threads, bandwidth, communicator)
                        for batch in arguments.batch_sizes)
    return Measurement(str(arguments.engine_dir), llm.engine.target, threads, arguments.input_len,
                       arguments.output_len, load_s, ttft_s * 1e3, arguments.input_len / ttft_s, peak, bandwidth,
                       decode, profile)


def step_bytes(engine: Engine, num_tokens: int, kv_tokens: int) -> list[float]:
    """Bytes that each op of a step must move, as its kernel states them."""
    from tensorwright.kernels.cpu.registry import KERNELS

    kernels = {kernel.name: kernel for kernel in KERNELS}
    return [kernels[step.kernel].cost(op, engine.program, num_tokens, kv_tokens).bytes
            for op, step in zip(engine.program.ops, engine.steps, strict=True)]


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


def _kv_tokens(engine_dir: Path, batch: int, length: int) -> int:
    """Room for the largest batch in whole blocks, and one block more for each sequence."""
    from tensorwright.engine.config import read_config

    size = int(read_config(engine_dir)["build_config"]["tokens_per_block"])
    return batch * (-(-length // size) + 1) * size


def _first_token(llm: LLM, input_len: int, repeats: int) -> float:
    """Median seconds from one request's start to its first token; a first, untimed request warms up."""
    from tensorwright.runtime.parameters import SamplingParameters

    times = []
    for repeat in range(repeats + 1):
        prompts = random_prompts(1, input_len, llm.engine.vocab_size, seed=repeat)
        result = llm.generate(prompts, SamplingParameters(max_tokens=1, end_ids=()))[0]
        if result.error is not None:
            raise UsageError(f"the request failed: {result.error}")
        times.append(result.time_to_first_token_s)
    return statistics.median(times[1:])


def _step_time(llm: LLM, batch: int, arguments: argparse.Namespace) -> float:
    """Median seconds of a decode step of so many sequences."""
    from tensorwright.runtime.parameters import SamplingParameters

    parameters = SamplingParameters(max_tokens=arguments.output_len, end_ids=())
    times = []
    for repeat in range(arguments.repeats):
        prompts = random_prompts(batch, arguments.input_len, llm.engine.vocab_size, seed=1000 * batch + repeat)
        events = [(update.request_id, time.perf_counter(), len(update.token_ids))
                  for update in llm.stream(prompts, parameters) if update.token_ids]
        times.append(time_per_token(events))
    return statistics.median(times)


def _decode(engine: Engine, batch: int, step_s: float, mean_length: float, bandwidth: float) -> Decode:
    num_bytes = sum(step_bytes(engine, batch, round(batch * mean_length)))
    return Decode(batch, step_s * 1e3, batch / step_s, num_bytes, num_bytes / step_s / bandwidth)


def _print(result: Measurement) -> None:
    from tensorwright.cli.tables import format_bytes, format_seconds, print_table

    print_table(f"{result.engine_dir}: target {result.target}, {result.threads} threads, prompts of "
                f"{result.input_len} tokens, {result.output_len} new tokens", [
                    ("load", format_seconds(result.load_s)), ("first token", f"{result.ttft_ms:.1f} ms"),
                    ("prefill", f"{result.prefill_tok_s:.0f} tokens/s"),
                    ("peak memory", format_bytes(result.peak_rss_bytes)),
                    ("memory bandwidth", f"{result.bandwidth_bytes_s / 1e9:.1f} GB/s read")])
    print_table("\nDecode", [
        (str(d.batch), f"{d.tpot_ms:.2f}", f"{d.tok_s:.1f}", format_bytes(d.bytes_per_step), f"{d.share_of_limit:.0%}")
        for d in result.decode], header=("batch", "ms/step", "tokens/s", "bytes/step", "share of limit"))
    if result.profile:
        from tensorwright.cli.profile import print_profile

        for profile in result.profile:
            print_profile(profile)


def _count(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _counts(words: str) -> tuple[int, ...]:
    return tuple(_count(word) for word in words.split(","))
