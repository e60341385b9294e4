"""From a prompt and parameters to a request that can run, or an error with the numbers. It runs nothing.

Everything that can be known to be wrong is refused here, before the request is queued. Safe to use from several
threads: tokenising happens on the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from tensorwright.engine.limits import Limits
from tensorwright.errors import LimitError, UsageError
from tensorwright.runtime.beams import BeamGroup
from tensorwright.runtime.constraints import Constraints, TokenCounts
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.request import Request, TokenSequence, most_blocks
from tensorwright.runtime.results import Update
from tensorwright.runtime.text_writer import TextWriter
from tensorwright.runtime.tokenizer import Tokenizer
from tensorwright.runtime.words import word_sequences

Prompt = str | Sequence[int]


class RequestFactory:
    """Makes requests for one engine. `num_blocks` of `block_size` tokens are all the KV blocks that there are."""

    def __init__(self, limits: Limits, *, vocab_size: int, end_ids: Sequence[int], tokenizer: Tokenizer | None,
                 num_blocks: int, block_size: int) -> None:
        self.limits = limits
        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        self.tokenizer = tokenizer
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ids = count()

    def make(self, prompt: Prompt, parameters: SamplingParameters, on_update: Callable[[Update], None]) -> Request:
        """A request that is sure to fit.

        Raises:
            UsageError: an empty prompt, token ids that the model does not have, text without a tokenizer.
            LimitError: over a limit of the engine or of its KV cache; the message holds the numbers.
        """
        self._check_parameters(parameters)
        tokens = self._tokens(prompt)
        self._check_lengths(len(tokens), parameters)
        end_ids = self.end_ids if parameters.end_ids is None else frozenset(parameters.end_ids)
        constraints = Constraints(parameters, end_ids, self._bad_words(parameters))
        text = prompt if isinstance(prompt, str) else self._text(tokens)
        request = Request(next(self._ids), text, tokens, parameters, end_ids, on_update, constraints)
        if parameters.beam_width > 1:
            request.beams = BeamGroup(request, constraints, self.tokenizer)
        request.lanes = [self._lane(request, index) for index in range(_num_lanes(parameters, at_start=True))]
        return request

    def _lane(self, request: Request, index: int) -> TokenSequence:
        parameters, prompt = request.parameters, request.prompt_token_ids
        lane = TokenSequence(request, index, list(prompt))
        if request.beams is None:
            lane.writer = TextWriter(self.tokenizer, prompt, parameters.stop, parameters.stop_token_ids)
        if request.constraints.counts_tokens:
            lane.counts = TokenCounts(prompt, parameters.max_tokens)
        return lane

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str) and prompt:
            if self.tokenizer is None:
                raise UsageError("a text prompt needs a tokenizer, and the engine folder has none",
                                 mend="pass --tokenizer_dir, or token ids instead of text")
            tokens = tuple(self.tokenizer.encode(prompt, max_tokens=self.limits.max_input_len))
        else:
            tokens = tuple(map(int, prompt))
        if not tokens:
            raise UsageError("the prompt is empty: at least one token is needed", mend="send some text")
        self._check_ids("prompt", tokens)
        return tokens

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special=False) if self.tokenizer else ""

    def _bad_words(self, parameters: SamplingParameters) -> list[tuple[int, ...]]:
        found = [tuple(sequence) for sequence in parameters.bad_token_ids]
        if parameters.bad_words and self.tokenizer:
            found += word_sequences(parameters.bad_words, self.tokenizer)
        return found

    def _check_ids(self, what: str, tokens: Sequence[int]) -> None:
        wrong = [token for token in (min(tokens), max(tokens)) if not 0 <= token < self.vocab_size]
        if wrong:
            raise UsageError(f"token id {wrong[0]} in {what} is out of range: the model has the ids 0 to "
                             f"{self.vocab_size - 1}", mend="use the tokenizer of the model that the engine is of")

    def _check_parameters(self, parameters: SamplingParameters) -> None:
        limits, width = self.limits, parameters.beam_width
        if width > limits.max_beam_width:
            raise LimitError(f"beam_width {width} is over the engine's max_beam_width {limits.max_beam_width}",
                             mend=f"rebuild with --max_beam_width {width}")
        if width > 1 and parameters.num_sequences > width:
            raise LimitError(f"num_return_sequences {parameters.num_sequences} is over beam_width {width}",
                             mend=f"ask for at most {width}, or for a beam_width of {parameters.num_sequences}")
        lanes = _num_lanes(parameters)
        if width == 1 and lanes > limits.max_batch_size:
            raise LimitError(f"num_return_sequences {lanes} is over the engine's max_batch_size "
                             f"{limits.max_batch_size}", mend=f"rebuild with --max_batch_size {lanes}")
        if lanes > limits.max_num_tokens:
            raise LimitError(f"{lanes} sequences advance together, and the engine's max_num_tokens is "
                             f"{limits.max_num_tokens}", mend=f"rebuild with --max_num_tokens {lanes}")
        self._check_logits(parameters)
        if self.tokenizer is None and (parameters.stop or parameters.bad_words):
            raise UsageError("stop and bad_words need a tokenizer, and the engine folder has none",
                             mend="pass --tokenizer_dir, or use stop_token_ids and bad_token_ids")
        for what, ids in (("logit_bias", tuple(parameters.logit_bias)),
                          *(("bad_token_ids", sequence) for sequence in parameters.bad_token_ids)):
            if ids:
                self._check_ids(what, ids)

    def _check_logits(self, parameters: SamplingParameters) -> None:
        if parameters.return_context_logits and not self.limits.gather_context_logits:
            raise UsageError("the engine was not built to give context logits", mend="rebuild with "
                             "--gather_context_logits (or --gather_all_token_logits)")
        if parameters.return_generation_logits and not self.limits.gather_generation_logits:
            raise UsageError("the engine was not built to give generation logits", mend="rebuild with "
                             "--gather_generation_logits (or --gather_all_token_logits)")
        if parameters.return_generation_logits and parameters.beam_width > 1:
            raise UsageError("generation logits are not available with beams: use beam_width 1")

    def _check_lengths(self, length: int, parameters: SamplingParameters) -> None:
        limits, total = self.limits, length + parameters.max_tokens
        numbers = (f"prompt {length} tokens, new tokens {parameters.max_tokens}, max_seq_len {limits.max_seq_len}")
        if length > limits.max_input_len:
            raise LimitError(f"the prompt is longer than the engine's max_input_len {limits.max_input_len}: {numbers}",
                             mend=f"rebuild with --max_input_len {length} and --max_seq_len {total} or more")
        if total > limits.max_seq_len:
            raise LimitError(f"prompt and new tokens are together {total}, over the engine's limit: {numbers}",
                             mend=f"ask for fewer new tokens, or rebuild with --max_seq_len {total}")
        needed = most_blocks(length, total, _num_lanes(parameters), self.block_size)
        if needed > self.num_blocks:
            raise LimitError(
                f"the request can need {needed * self.block_size} tokens of KV cache and there are "
                f"{self.num_blocks * self.block_size}: {numbers}, {_num_lanes(parameters)} sequence(s)",
                mend="ask for fewer new tokens, or give the cache more (--max_tokens_in_paged_kv_cache)")


def _num_lanes(parameters: SamplingParameters, *, at_start: bool = False) -> int:
    """Sequences that the request comes to have; beams start as one."""
    if parameters.beam_width > 1:
        return 1 if at_start else parameters.beam_width
    return parameters.num_sequences
