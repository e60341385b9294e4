"""Carries a beam search over to token sequences: which beam continues on whose blocks, and what a beam ends in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorwright.errors import UsageError
from tensorwright.runtime.batch import Floats
from tensorwright.runtime.beam_search import BeamSearch, Candidate, Hypothesis
from tensorwright.runtime.constraints import Constraints
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.request import Request, TokenSequence
from tensorwright.runtime.results import FinishReason, Generated
from tensorwright.runtime.sampling import adjusted, log_softmax
from tensorwright.runtime.scheduler import Scheduler
from tensorwright.runtime.text_writer import TextWriter
from tensorwright.runtime.tokenizer import Tokenizer


class BeamGroup:
    """The beams of one request: the search and what it needs to know of text and constraints."""

    def __init__(self, request: Request, constraints: Constraints, tokenizer: Tokenizer | None) -> None:
        parameters = request.parameters
        self.search = new_search(parameters, len(request.end_ids))
        self._request = request
        self._constraints = constraints
        self._tokenizer = tokenizer

    def advance(self, scheduler: Scheduler, logits: Sequence[Floats]) -> bool:
        """One token for every beam, from a row of logits [vocabulary] each; False when the search is over."""
        request = self._request
        rows = [self._constraints.row(lane.tokens, lane.num_generated, 0, lane.counts) for lane in request.lanes]
        log_probs = log_softmax(np.stack([adjusted(line, row) for line, row in zip(logits, rows, strict=True)]))
        scores = [lane.cumulative_log_prob for lane in request.lanes]
        running = self.search.advance(scores, log_probs, request.lanes[0].num_generated + 1, self._ending)
        if not running and not self.search.ended:
            raise UsageError(f"biases and bad words forbid every token after {len(request.lanes[0].tokens)} tokens")
        parents = [request.lanes[candidate.parent] for candidate in running]
        children = [(parent, _child(parent, index, candidate))
                    for index, (parent, candidate) in enumerate(zip(parents, running, strict=True))]
        scheduler.branch(request, children)
        return bool(running)

    def finish(self, reason: FinishReason | None = None) -> dict[int, Generated]:
        """The sequences to hand out, the best first; with a reason, beams that still run end with it."""
        if reason:
            for lane in self._request.lanes:
                self.search.add(self._hypothesis(lane.output, lane.log_probs, lane.cumulative_log_prob, reason))
        best = self.search.ended[: self._request.parameters.num_sequences]
        if reason == "error":
            self._tokenizer = None  # it may be what has failed: no text then
        return {index: self._generated(hypothesis) for index, hypothesis in enumerate(best)}

    def _ending(self, candidate: Candidate) -> Hypothesis | None:
        lane = self._request.lanes[candidate.parent]
        tokens = [*lane.output, candidate.token]
        if candidate.token in self._request.end_ids or self._text(tokens)[1]:
            reason: FinishReason = "stop"
        elif len(tokens) >= self._request.parameters.max_tokens:
            reason = "length"
        else:
            return None
        return self._hypothesis(tokens, [*lane.log_probs, candidate.log_prob], candidate.score, reason)

    def _hypothesis(self, tokens: list[int], log_probs: list[float], score: float,
                    reason: FinishReason) -> Hypothesis:
        final = self.search.final_score(score, max(1, len(tokens)))
        return Hypothesis(tuple(tokens), tuple(log_probs), score, final, reason)

    def _text(self, tokens: list[int], *, whole: bool = False) -> tuple[str, bool]:
        """Text of generated tokens, and whether it ends in a stop word; only looked for where there are any."""
        parameters = self._request.parameters
        if not (whole or parameters.stop or parameters.stop_token_ids):
            return "", False
        writer = TextWriter(self._tokenizer, self._request.prompt_token_ids, parameters.stop,
                            parameters.stop_token_ids)
        text = ""
        for token in tokens:
            piece, stopped = writer.push(token)
            text += piece
            if stopped:
                return text, True
        return (text + writer.finish()[0], False) if whole else (text, False)

    def _generated(self, hypothesis: Hypothesis) -> Generated:
        tokens = list(hypothesis.tokens)
        spoken = tokens[:-1] if tokens and tokens[-1] in self._request.end_ids else tokens
        wants_log_probs = self._request.parameters.return_log_probs
        return Generated(hypothesis.tokens, self._text(spoken, whole=True)[0], hypothesis.finish_reason,
                         hypothesis.log_probs if wants_log_probs else None, hypothesis.score, None)


def new_search(parameters: SamplingParameters, num_end_ids: int) -> BeamSearch:
    """The search that the parameters ask for."""
    return BeamSearch(parameters.beam_width, parameters.length_penalty, parameters.early_stopping,
                      parameters.max_tokens, candidates_per_beam=max(2, 1 + num_end_ids))


def _child(parent: TokenSequence, index: int, candidate: Candidate) -> TokenSequence:
    counts = parent.counts.copy() if parent.counts else None
    if counts:
        counts.add(candidate.token)
    return TokenSequence(parent.request, index, [*parent.tokens, candidate.token], counts=counts,
                         log_probs=[*parent.log_probs, candidate.log_prob], cumulative_log_prob=candidate.score)
