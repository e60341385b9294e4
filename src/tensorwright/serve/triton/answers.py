"""Output tensors from results and updates. It knows the names of the outputs and their shapes, and sends nothing.

Every shape begins with the rows: one row for a stream or a plain request, all rows for one response to several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tensorwright.serve.triton.exchange import Row

if TYPE_CHECKING:
    from tensorwright.runtime.results import Generated, Result, Update

Arrays = dict[str, NDArray[Any]]


def whole(rows: Sequence[Row], indices: Sequence[int], *, exclude_input: bool, logits_type: str) -> Arrays:
    """The outputs of finished rows in one response. Rows and sequences of unequal length are padded with zeros."""
    results = [_result(row) for row in rows]
    arrays: Arrays = {
        "text_output": _texts([[_text(row, s, exclude_input) for s in result.sequences]
                               for row, result in zip(rows, results, strict=True)]),
        "finish_reason": _texts([[s.finish_reason for s in result.sequences] for result in results]),
        "num_input_tokens": _column([len(result.prompt_token_ids) for result in results]),
        "num_output_tokens": _stack([np.array([len(s.token_ids) for s in r.sequences], np.int32) for r in results]),
        "batch_index": _column(indices),
    }
    if any(row.ask.parameters.return_log_probs for row in rows):
        arrays["cum_log_probs"] = _stack([np.array([s.cumulative_log_prob for s in r.sequences], np.float32)
                                          for r in results])
        arrays["output_log_probs"] = _stack([_stack([_log_probs(s) for s in r.sequences]) for r in results])
    return {**arrays, **_logits(results, logits_type)}


def piece(row: Row, index: int, update: Update) -> Arrays:
    """One event of a stream: the new text, and for a sequence that has ended its reason and token counts."""
    arrays: Arrays = {
        "text_output": _texts([[update.text]]),
        "batch_index": _column([index]),
        "sequence_index": _column([update.sequence]),
    }
    if row.ask.parameters.return_log_probs:
        arrays["cum_log_probs"] = np.array([[row.cumulative.get(update.sequence, 0.0)]], np.float32)
        arrays["output_log_probs"] = np.array([[list(update.log_probs or ())]], np.float32)
    if update.finish_reason is not None:
        arrays["finish_reason"] = _texts([[update.finish_reason]])
        arrays["num_output_tokens"] = _column([row.num_tokens.get(update.sequence, 0)])
    if update.finished and update.result is not None:
        arrays["num_input_tokens"] = _column([len(update.result.prompt_token_ids)])
    return arrays


def opening(index: int) -> Arrays:
    """An event without text, which makes Triton begin the answer."""
    return {"text_output": _texts([[""]]), "batch_index": _column([index])}


def logits_of(row: Row, logits_type: str) -> Arrays:
    """The logits of one finished row, where it asked for them."""
    return _logits([_result(row)], logits_type)


def tensors(pb: Any, arrays: Arrays) -> list[Any]:
    """Triton tensors of named arrays."""
    return [pb.Tensor(name, array) for name, array in arrays.items()]


def _logits(results: Sequence[Result], logits_type: str) -> Arrays:
    arrays: Arrays = {}
    context = [result.context_logits for result in results if result.context_logits is not None]
    if len(context) == len(results):
        arrays["context_logits"] = _stack(context).astype(logits_type, copy=False)
    generated = [[s.generation_logits for s in r.sequences if s.generation_logits is not None] for r in results]
    if all(generated):
        arrays["generation_logits"] = _stack([_stack(g) for g in generated]).astype(logits_type, copy=False)
    return arrays


def _result(row: Row) -> Result:
    if row.result is None:
        raise RuntimeError("a row is answered before it has finished")
    return row.result


def _text(row: Row, sequence: Generated, exclude_input: bool) -> str:
    exclude = exclude_input if row.ask.exclude_input is None else row.ask.exclude_input
    return ("" if exclude else row.ask.prompt) + sequence.text


def _log_probs(sequence: Generated) -> NDArray[Any]:
    return np.array(sequence.log_probs or (), np.float32)


def _texts(rows: Sequence[Sequence[str]]) -> NDArray[Any]:
    width = max(len(row) for row in rows)
    array = np.full((len(rows), width), b"", dtype=object)
    for i, row in enumerate(rows):
        for j, text in enumerate(row):
            array[i, j] = text.encode()
    return array


def _column(values: Sequence[int]) -> NDArray[Any]:
    return np.array(values, np.int32).reshape(-1, 1)


def _stack(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One more dimension in front; arrays smaller than the largest are padded with zeros."""
    if len(arrays) == 1:
        return arrays[0][np.newaxis]
    sizes = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    stacked = np.zeros((len(arrays), *sizes), arrays[0].dtype)
    for i, array in enumerate(arrays):
        stacked[(i, *(slice(size) for size in array.shape))] = array
    return stacked
