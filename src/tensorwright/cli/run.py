"""`tensorwright run` and `examples/run.py`: prompts in, text or files out.

It knows the order of a run; options of sampling, inputs, outputs and the engine live in the modules beside it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tensorwright.cli.inputs import NO_TOKENIZER, Source, Tokenization, read_prompts
from tensorwright.cli.options import Parser, add_switch, note
from tensorwright.cli.outputs import Console, Labels, Stream, prompt_text, show_errors, show_results
from tensorwright.cli.result_files import Files, write_files
from tensorwright.cli.run_flags import add_upstream_flags
from tensorwright.cli.sampling import add_sampling_options, describe, for_each_prompt, sampling_parameters
from tensorwright.cli.session import add_session_options, open_session
from tensorwright.errors import UsageError

if TYPE_CHECKING:
    from tensorwright.engine.limits import Limits
    from tensorwright.runtime.llm import LLM
    from tensorwright.runtime.parameters import SamplingParameters
    from tensorwright.runtime.results import Result

DEFAULT_MAX_OUTPUT_LEN = 256
STREAMING_INTERVAL = 5  # tokens between two lines when several sequences are streamed
PROFILE_RUNS = 10


def configure(parser: Parser) -> None:
    """All flags of `examples/run.py`, and our own."""
    add_session_options(parser)
    _add_input_options(parser)
    _add_output_options(parser)
    add_sampling_options(parser)
    group = parser.add_argument_group("several outputs for a prompt")
    group.add_argument("--num_beams", type=int, default=1, help="beam search with this many beams")
    group.add_argument("--num_return_sequences", type=int, help="outputs for each prompt; with beams, the best ones")
    group.add_argument("--length_penalty", type=float, default=1.0, help="beams: above 1 favours long outputs")
    group.add_argument("--early_stopping", type=int, default=1,
                       help="beams: 1 stop when enough have ended, 0 when no better can come, other: never early")
    add_upstream_flags(parser)


def _add_input_options(parser: Parser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--input_text", nargs="+", metavar="TEXT", help="one prompt each")
    group.add_argument("--input_file", type=Path,
                       help=".txt: a prompt per line; .csv or .npy: a row of token ids per prompt")
    add_switch(group, "--chat", default=False, help="apply the model's chat template to each text")
    group.add_argument("--system", metavar="TEXT", help="system message for --chat")
    group.add_argument("--max_input_length", type=int, metavar="TOKENS",
                       help="a longer prompt is an error (default: what the engine takes)")
    add_switch(group, "--no_add_special_tokens", default=False,
               help="no special token, such as BOS, before the text")


def _add_output_options(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--max_output_len", type=int, metavar="TOKENS",
                       help=f"most new tokens of each output (default: what fits, at most {DEFAULT_MAX_OUTPUT_LEN})")
    group.add_argument("--output_csv", type=Path, help="write token ids here instead of printing text")
    group.add_argument("--output_npy", type=Path, help="the same as .npy")
    group.add_argument("--output_logits_npy", type=Path, metavar="BASE",
                       help="write BASE_context.npy and BASE_generation.npy")
    group.add_argument("--output_log_probs_npy", type=Path, help="log probability of each output token")
    group.add_argument("--output_cum_log_probs_npy", type=Path, help="sum of each output's log probabilities")
    add_switch(group, "--streaming", default=False, help="print text as it comes")
    group.add_argument("--streaming_interval", type=int, metavar="TOKENS",
                       help=f"print after this many (default: 1; {STREAMING_INTERVAL} when there are several outputs)")
    add_switch(group, "--return_all_generated_tokens", default=False,
               help="with --streaming: each time all text so far, on a line of its own")
    add_switch(group, "--run_profiling", default=False,
               help=f"afterwards {PROFILE_RUNS} runs to warm up and {PROFILE_RUNS} timed ones")


def main(arguments: argparse.Namespace) -> int:
    """Run the prompts; 0 when every one of them was answered."""
    _check_counts(arguments)
    files = Files(arguments.output_csv, arguments.output_npy, _base(arguments.output_logits_npy),
                  arguments.output_log_probs_npy, arguments.output_cum_log_probs_npy)
    source = _source(arguments)
    with open_session(arguments) as (llm, console):
        files.check(llm.engine.limits)
        prompts = read_prompts(source, _tokenization(arguments, llm))
        shared = _parameters(arguments, files, llm.engine.limits, max(map(len, prompts)))
        console.info(describe(shared))
        parameters = for_each_prompt(arguments, shared, len(prompts))
        results = _answer(arguments, llm, console, prompts, parameters, show_text=not files.replaces_text)
        if console.is_leader:
            for line in write_files(files, results, _pad_id(llm)):
                console.info(line)
        if arguments.run_profiling:
            _profile(llm, console, prompts, parameters)
    return 1 if any(result.error for result in results) else 0


def _check_counts(arguments: argparse.Namespace) -> None:
    for name in ("max_output_len", "max_input_length", "num_beams", "num_return_sequences", "streaming_interval"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more", mend=f"--{name} 1, or leave it out")


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.input_file is not None and arguments.input_text is not None:
        note("--input_text is not used: --input_file wins")
    if arguments.system is not None and not arguments.chat:
        raise UsageError("--system is part of a chat", mend="add --chat")
    return Source(tuple(arguments.input_text or ()), arguments.input_file)


def _tokenization(arguments: argparse.Namespace, llm: LLM) -> Tokenization:
    limits = llm.engine.limits
    most, name = limits.max_input_len, "the engine's max_input_len"
    if arguments.max_input_length is not None and arguments.max_input_length < most:
        most, name = arguments.max_input_length, "--max_input_length"
    numbers = f" (new tokens {arguments.max_output_len or 1}, max_seq_len {limits.max_seq_len})"
    return Tokenization(llm.tokenizer, most, name, numbers, add_special_tokens=not arguments.no_add_special_tokens,
                        chat=arguments.chat, system=arguments.system, pad_id=_pad_id(llm))


def _parameters(arguments: argparse.Namespace, files: Files, limits: Limits, longest: int) -> SamplingParameters:
    """What all prompts share. The engine checks each prompt with it before anything runs."""
    room = max(1, min(DEFAULT_MAX_OUTPUT_LEN, limits.max_seq_len - longest))
    max_tokens = room if arguments.max_output_len is None else arguments.max_output_len
    beams, sequences = arguments.num_beams, arguments.num_return_sequences
    wants_logits = files.logits is not None
    if beams > 1 and (sequences or 1) > beams:
        raise UsageError(f"--num_return_sequences {sequences} is more than --num_beams {beams}",
                         mend=f"--num_beams {sequences}")
    return replace(
        sampling_parameters(arguments, max_tokens),
        beam_width=beams,
        num_return_sequences=sequences,
        length_penalty=arguments.length_penalty,
        early_stopping=arguments.early_stopping,
        return_log_probs=files.log_probs is not None,
        return_context_logits=wants_logits and limits.gather_context_logits,
        return_generation_logits=wants_logits and limits.gather_generation_logits and beams == 1,
    )


def _answer(arguments: argparse.Namespace, llm: LLM, console: Console, prompts: list[list[int]],
            parameters: list[SamplingParameters], *, show_text: bool) -> list[Result]:
    if show_text and llm.tokenizer is None:
        console.info(f"No tokenizer.json: token ids are shown. For text: {NO_TOKENIZER}")
    labels = Labels(arguments.num_beams, parameters[0].num_sequences)
    if arguments.streaming and show_text:
        return _stream(arguments, llm, console, prompts, parameters, labels)
    results = llm.generate(prompts, parameters)
    if show_text:
        show_results(console, results, labels, llm.tokenizer)
    return results


def _stream(arguments: argparse.Namespace, llm: LLM, console: Console, prompts: list[list[int]],
            parameters: list[SamplingParameters], labels: Labels) -> list[Result]:
    num_sequences = len(prompts) * parameters[0].num_sequences
    updates = llm.stream(prompts, parameters)  # refuses bad requests before anything is printed
    interval = arguments.streaming_interval or (1 if num_sequences == 1 else STREAMING_INTERVAL)
    stream = Stream(console, labels, [prompt_text(ids, llm.tokenizer) for ids in prompts], num_sequences, interval,
                    arguments.return_all_generated_tokens, llm.tokenizer is not None)
    stream.start()
    results: dict[int, Result] = {}
    first_id: int | None = None
    for update in updates:
        first_id = update.request_id if first_id is None else first_id
        stream.show(update.request_id - first_id, update)
        if update.result is not None:
            results[update.request_id] = update.result
    ordered = [results[request_id] for request_id in sorted(results)]
    show_errors(console, ordered)
    return ordered


def _profile(llm: LLM, console: Console, prompts: list[list[int]], parameters: list[SamplingParameters]) -> None:
    """Latency of the whole batch, as scripts look for it, and what it consists of."""
    import time

    for _ in range(PROFILE_RUNS):
        llm.generate(prompts, parameters)
    started = time.perf_counter()
    runs = [llm.generate(prompts, parameters) for _ in range(PROFILE_RUNS)]
    latency_s = (time.perf_counter() - started) / PROFILE_RUNS
    results = [result for run in runs for result in run]
    num_tokens = sum(len(sequence.token_ids) for result in results for sequence in result.sequences)
    first_ms = 1000 * sum(result.time_to_first_token_s for result in results) / len(results)
    cached = sum(result.num_cached_tokens for result in results) // PROFILE_RUNS
    console.result(f"batch_size: {len(prompts)}, avg latency of {PROFILE_RUNS} iterations: : {latency_s} sec")
    per_second = num_tokens / PROFILE_RUNS / latency_s
    console.result(f"time to first token: {first_ms:.1f} ms, output: {per_second:.1f} tokens/s")
    if cached:
        console.result(f"{cached} of {sum(map(len, prompts))} prompt tokens came from the cache; "
                       "--kv_cache_enable_block_reuse disable measures whole prompts")


def _pad_id(llm: LLM) -> int:
    if llm.tokenizer is not None and llm.tokenizer.pad_id is not None:
        return llm.tokenizer.pad_id
    return next(iter(llm.engine.end_ids), 0)


def _base(path: Path | None) -> Path | None:
    """Users write the base name with or without .npy."""
    return path.with_suffix("") if path is not None and path.suffix == ".npy" else path
