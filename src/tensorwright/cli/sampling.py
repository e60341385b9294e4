"""Options of sampling, shared by run and chat: from flags to SamplingParameters. It knows no engine.

Temperature above 0 samples, with nothing else needed. Without it the choice is greedy, except where --top_k above 1,
--top_p or --min_p ask for sampling: then the temperature is 1. `--top_k 1` is always greedy.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from tensorwright.cli.options import Parser
from tensorwright.errors import UsageError
from tensorwright.runtime.parameters import SamplingParameters


def add_sampling_options(parser: Parser) -> None:
    """What can be said of how tokens are chosen."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, help="above 0: sample (default: greedy)")
    group.add_argument("--top_k", type=int, help="sample among the k likeliest; 0: no limit; 1: greedy")
    group.add_argument("--top_p", type=float, default=0.0, help="sample among the likeliest of this mass; 0 or 1: off")
    group.add_argument("--min_p", type=float, default=0.0, help="drop tokens less likely than this share of the best")
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="divides the logits of seen tokens")
    group.add_argument("--presence_penalty", type=float, default=0.0, help="taken off the logits of generated tokens")
    group.add_argument("--frequency_penalty", type=float, default=0.0, help="the same, for each time generated")
    group.add_argument("--no_repeat_ngram_size", type=int, default=0, help="no n-gram of this size comes twice; 0: off")
    group.add_argument("--random_seed", type=int, default=0, help="the same seed gives the same text")
    group.add_argument("--end_id", type=int, help="token that ends a text (default: every end token of the model)")
    group.add_argument("--stop_words", nargs="+", action="append", metavar="WORD",
                       help="text that ends the output and is cut off; once for all prompts, or once for each")
    group.add_argument("--bad_words", nargs="+", action="append", metavar="WORD",
                       help="text that must not be generated; once for all prompts, or once for each")


def sampling_parameters(arguments: argparse.Namespace, max_tokens: int) -> SamplingParameters:
    """What the flags ask of every prompt, without stop and bad words.

    Raises:
        UsageError: a value out of range.
    """
    return SamplingParameters(
        max_tokens=max_tokens,
        temperature=_temperature(arguments),
        top_k=arguments.top_k or 0,
        top_p=arguments.top_p or 1.0,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        seed=arguments.random_seed,
        end_ids=None if arguments.end_id is None else (arguments.end_id,),
    )


def for_each_prompt(arguments: argparse.Namespace, shared: SamplingParameters, count: int) -> list[SamplingParameters]:
    """One for each prompt, with its stop and bad words.

    Raises:
        UsageError: neither one list of words for all prompts nor one for each.
    """
    stops = _lists("--stop_words", arguments.stop_words, count)
    bad_words = _lists("--bad_words", arguments.bad_words, count)
    return [replace(shared, stop=stop, bad_words=bad) for stop, bad in zip(stops, bad_words, strict=True)]


def describe(parameters: SamplingParameters) -> str:
    """The effective settings in one line; those that are off are left out."""
    greedy = parameters.temperature == 0 or parameters.top_k == 1
    parts = ["greedy"] if greedy else [f"temperature {parameters.temperature:g}"]
    if parameters.beam_width > 1:
        parts = [f"{parameters.beam_width} beams", f"length_penalty {parameters.length_penalty:g}",
                 f"early_stopping {parameters.early_stopping}"]
    elif not greedy:
        parts += [f"top_k {parameters.top_k}"] if parameters.top_k else []
        parts += [f"top_p {parameters.top_p:g}"] if parameters.top_p < 1 else []
        parts += [f"min_p {parameters.min_p:g}"] if parameters.min_p else []
        parts.append(f"seed {parameters.seed}")
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"):
        value = getattr(parameters, name)
        parts += [f"{name} {value:g}"] if value != getattr(SamplingParameters, name) else []
    return f"Sampling: {', '.join(parts)}; at most {parameters.max_tokens} new tokens"


def _temperature(arguments: argparse.Namespace) -> float:
    if arguments.temperature is not None:
        return float(arguments.temperature)
    asked = (arguments.top_k or 0) > 1 or 0 < arguments.top_p < 1 or arguments.min_p > 0
    return 1.0 if asked else 0.0


def _lists(flag: str, given: list[list[str]] | None, count: int) -> list[tuple[str, ...]]:
    if not given:
        return [()] * count
    if len(given) == 1:
        return [tuple(given[0])] * count
    if len(given) != count:
        raise UsageError(
            f"{flag} was given {len(given)} times for {count} prompts",
            mend=f"give {flag} once for all prompts, or {count} times, once for each",
        )
    return [tuple(words) for words in given]
