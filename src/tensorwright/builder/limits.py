"""From what was asked and what the model was made for to the limits of an engine, with a line for every change.

It knows numbers only: no files, no kernels, no memory. The rules are the ones that users of `trtllm-build` know, except
where chunked prefill, which is always on here, makes a rule unnecessary. docs/build.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorwright.builder.options import BuildOptions
from tensorwright.engine.limits import Limits
from tensorwright.errors import UsageError

ABSENT_POSITIONS = 2048  # what a model is taken to allow when its config does not say
MAX_DEDUCED_SEQ_LEN = 131_072  # positions in a config beyond this are believed only when asked for
DEFAULT_MAX_NUM_TOKENS = 2048
MANY_TOKENS = 16_384  # steps beyond this cost memory and bring no speed
FACTOR_IS_INCLUDED = ("default", "su", "longrope", "llama3")  # rope kinds whose positions already count the scaling


def rope_factor(kind: str, scaling: Mapping[str, float]) -> float:
    """How many times max_position_embeddings a model with this rope scaling can be used for."""
    return 1.0 if kind in FACTOR_IS_INCLUDED else float(scaling.get("factor", 1.0))


def derive(options: BuildOptions, *, max_position_embeddings: int | None,
           rope_factor: float = 1.0) -> tuple[Limits, list[str]]:
    """The limits, and notes on everything that was deduced, clipped or ignored.

    Raises UsageError for numbers that cannot be meant.
    """
    _check(options)
    notes: list[str] = []
    max_seq_len = _max_seq_len(options, max_position_embeddings, rope_factor, notes)
    limits = Limits(
        max_batch_size=options.max_batch_size, max_seq_len=max_seq_len,
        max_input_len=_max_input_len(options, max_seq_len, notes),
        max_num_tokens=_max_num_tokens(options, max_seq_len, notes), max_beam_width=options.max_beam_width,
        gather_context_logits=options.gather_context_logits,
        gather_generation_logits=options.gather_generation_logits, logits_dtype=options.logits_dtype or "float32")
    if (rows := limits.max_batch_size * limits.max_beam_width) > limits.max_num_tokens:
        notes.append(f"max_batch_size x max_beam_width is {rows}, but a step holds max_num_tokens "
                     f"{limits.max_num_tokens}: at most that many sequences get their next token in one step")
    return limits, notes


def opt_num_tokens(options: BuildOptions, limits: Limits) -> int:
    """Tokens in the step that tactics are chosen for: as asked, but never more than a step can hold."""
    return min(options.opt_num_tokens or limits.max_batch_size * limits.max_beam_width, limits.max_num_tokens)


def _check(options: BuildOptions) -> None:
    lowest = {"max_batch_size": 1, "max_seq_len": 2, "max_input_len": 1, "max_num_tokens": 1, "opt_num_tokens": 1,
              "max_beam_width": 1, "tokens_per_block": 8, "workers": 1}
    for name, least in lowest.items():
        value = getattr(options, name)
        if value is not None and value < least:
            why = ": a token of prompt and a new one" if name == "max_seq_len" else ""
            raise UsageError(f"{name} must be {least} or more{why}; got {value}", mend=f"leave --{name} out")
    size = options.tokens_per_block
    if size & (size - 1):
        raise UsageError(f"tokens_per_block must be a power of two; got {size}", mend="--tokens_per_block 64")


def _max_seq_len(options: BuildOptions, positions: int | None, factor: float, notes: list[str]) -> int:
    made_for = int((positions or ABSENT_POSITIONS) * factor)
    asked = options.max_seq_len
    if asked is None:
        value = min(made_for, MAX_DEDUCED_SEQ_LEN)
        notes.append(f"max_seq_len is not specified, using deduced value {value}")
        if value < made_for:
            notes.append(f"the model's config claims {made_for} positions, which is taken as a hint; "
                         f"give --max_seq_len for more than {MAX_DEDUCED_SEQ_LEN}")
        return _at_least_two(value)
    if asked > made_for:
        notes.append(f"max_seq_len {asked} is larger than the {made_for} positions that the model was made for: "
                     "accuracy might be affected")
    return asked


def _at_least_two(max_seq_len: int) -> int:
    if max_seq_len < 2:
        raise UsageError(f"the model's config allows {max_seq_len} positions; a prompt and a new token need 2",
                         mend="give --max_seq_len")
    return max_seq_len


def _max_input_len(options: BuildOptions, max_seq_len: int, notes: list[str]) -> int:
    """The longest prompt that is really accepted: a new token must fit after it."""
    longest = max_seq_len - 1
    asked = options.max_input_len
    if asked is None:
        return longest
    if asked > max_seq_len:
        notes.append(f"max_input_len {asked} is larger than max_seq_len {max_seq_len} and is clipped to it")
    if asked >= longest:
        return longest
    if options.remove_input_padding and options.context_fmha:
        notes.append(f"max_input_len {asked} is not used, because prompts are packed and go in chunks: a prompt may "
                     f"have {longest} tokens (--remove_input_padding disable holds prompts to max_input_len)")
        return longest
    return asked


def _max_num_tokens(options: BuildOptions, max_seq_len: int, notes: list[str]) -> int:
    most = max_seq_len * options.max_batch_size
    asked = options.max_num_tokens
    value = min(DEFAULT_MAX_NUM_TOKENS if asked is None else asked, most)
    if asked is not None and asked > most:
        notes.append(f"max_num_tokens {asked} is larger than max_seq_len x max_batch_size and is clipped to {most}")
    if value > MANY_TOKENS:
        notes.append(f"max_num_tokens {value} is above {MANY_TOKENS}: more memory, and probably no more speed")
    if value < options.tokens_per_block <= most:
        notes.append(f"max_num_tokens {value} is raised to tokens_per_block {options.tokens_per_block}")
        value = options.tokens_per_block
    return value
