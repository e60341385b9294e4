"""The tensors of the deployed model, and what a request's values mean. It knows names and types, and no server.

Names, types and dimensions are those of the ensemble that tensorrtllm_backend had, so its clients keep working:
github.com/triton-inference-server/tensorrtllm_backend, all_models/inflight_batcher_llm/ensemble/config.pbtxt.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorwright.errors import UsageError
from tensorwright.runtime.parameters import SamplingParameters

Inputs = Mapping[str, NDArray[Any]]


class Field(NamedTuple):
    """One tensor: Triton's data type, and dimensions without the batch; -1 is any length."""

    name: str
    type: Literal["STRING", "INT32", "UINT64", "FP32", "BOOL", "LOGITS"]
    dims: tuple[int, ...] = (1,)
    required: bool = False


INPUTS = (
    Field("text_input", "STRING", required=True),
    Field("max_tokens", "INT32", required=True),
    Field("stream", "BOOL"),
    Field("exclude_input_in_output", "BOOL"),
    Field("temperature", "FP32"),
    Field("top_k", "INT32"),
    Field("top_p", "FP32"),
    Field("min_p", "FP32"),
    Field("random_seed", "UINT64"),
    Field("seed", "UINT64"),
    Field("repetition_penalty", "FP32"),
    Field("presence_penalty", "FP32"),
    Field("frequency_penalty", "FP32"),
    Field("no_repeat_ngram_size", "INT32"),
    Field("min_length", "INT32"),
    Field("stop_words", "STRING", (-1,)),
    Field("bad_words", "STRING", (-1,)),
    Field("end_id", "INT32"),
    Field("pad_id", "INT32"),
    Field("embedding_bias_words", "STRING", (-1,)),
    Field("embedding_bias_weights", "FP32", (-1,)),
    Field("num_return_sequences", "INT32"),
    Field("beam_width", "INT32"),
    Field("length_penalty", "FP32"),
    Field("early_stopping", "BOOL"),
    Field("return_log_probs", "BOOL"),
    Field("return_context_logits", "BOOL"),
    Field("return_generation_logits", "BOOL"),
)

OUTPUTS = (
    Field("text_output", "STRING", (-1,)),
    Field("finish_reason", "STRING", (-1,)),
    Field("num_input_tokens", "INT32"),
    Field("num_output_tokens", "INT32", (-1,)),
    Field("cum_log_probs", "FP32", (-1,)),
    Field("output_log_probs", "FP32", (-1, -1)),
    Field("context_logits", "LOGITS", (-1, -1)),
    Field("generation_logits", "LOGITS", (-1, -1, -1)),
    Field("batch_index", "INT32"),
    Field("sequence_index", "INT32"),
)

_PREFIXES_NOT_SUPPORTED = {
    "decoder_text_input": "encoder-decoder models are not supported",
    "prompt_": "prompt tuning is not supported",
    "lora_": "LoRA adapters are not supported",
    "image": "images are not supported",
    "draft": "draft models are not supported",
    "num_draft_tokens": "draft models are not supported",
    "use_draft_logits": "draft models are not supported",
    "beam_search_diversity_rate": "diverse beam search is not supported",
    "return_kv_cache_reuse_stats": "KV reuse is on the metrics page, not in answers",
}
_TRITON_OWN = ("id", "priority", "timeout")  # /generate hands these on as well as using them
_TRITON_OWN_PREFIXES = ("triton_", "sequence_", "binary_data", "classification")


@dataclass(frozen=True)
class Ask:
    """One row of a request: a prompt and what is wanted of it."""

    prompt: str
    parameters: SamplingParameters
    stream: bool = False
    exclude_input: bool | None = None  # None: as deployed
    bias_words: tuple[tuple[str, float], ...] = ()


def read_asks(inputs: Inputs, parameters: Mapping[str, Any]) -> list[Ask]:
    """The rows of a request. Every input has the shape [rows, ...]; `parameters` are JSON keys that are no input.

    Raises:
        UsageError: an unknown field, or a value that cannot be meant.
    """
    _refuse_unknown(parameters)
    rows = {array.shape[0] for array in inputs.values() if array.ndim}
    if len(rows) != 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise UsageError(f"every input must have the same number of rows; got {shapes}")
    return [read_ask(inputs, row) for row in range(rows.pop())]


def read_ask(inputs: Inputs, row: int) -> Ask:
    """One row of a request, checked.

    Raises:
        UsageError: a value that cannot be meant.
    """
    values = _Row(inputs, row)
    prompt = values.text("text_input")
    return Ask(prompt, _sampling(values), stream=bool(values.scalar("stream", False)),
               exclude_input=values.scalar("exclude_input_in_output", None), bias_words=_bias_words(values))


def with_bias(ask: Ask, bias: Mapping[int, float]) -> Ask:
    """The same row with the token biases that its words mean."""
    return replace(ask, parameters=replace(ask.parameters, logit_bias=dict(bias)))


class _Row:
    """Typed access to the values of one row."""

    def __init__(self, inputs: Inputs, row: int) -> None:
        self.inputs = inputs
        self.row = row

    def list(self, name: str) -> list[Any]:
        array = self.inputs.get(name)
        return [] if array is None else np.asarray(array[self.row]).reshape(-1).tolist()

    def scalar(self, name: str, default: Any) -> Any:
        values = self.list(name)
        return values[0] if values else default

    def text(self, name: str) -> str:
        return _decode(name, self.scalar(name, b""))

    def words(self, name: str) -> tuple[str, ...]:
        return tuple(_decode(name, word) for word in self.list(name) if word)


def _sampling(values: _Row) -> SamplingParameters:
    end_id = values.scalar("end_id", None)
    return SamplingParameters(
        max_tokens=values.scalar("max_tokens", 0),
        min_tokens=values.scalar("min_length", 0),
        **_choice(values),
        seed=_seed(values),
        repetition_penalty=values.scalar("repetition_penalty", 1.0),
        presence_penalty=values.scalar("presence_penalty", 0.0),
        frequency_penalty=values.scalar("frequency_penalty", 0.0),
        no_repeat_ngram_size=values.scalar("no_repeat_ngram_size", 0),
        num_return_sequences=values.scalar("num_return_sequences", None),
        beam_width=values.scalar("beam_width", 1),
        length_penalty=values.scalar("length_penalty", 1.0),
        early_stopping=int(values.scalar("early_stopping", True)),
        end_ids=None if end_id is None else tuple(i for i in (end_id,) if i >= 0),  # -1: never end
        stop=values.words("stop_words"),
        bad_words=values.words("bad_words"),
        return_log_probs=values.scalar("return_log_probs", False),
        return_context_logits=values.scalar("return_context_logits", False),
        return_generation_logits=values.scalar("return_generation_logits", False),
    )


def _choice(values: _Row) -> dict[str, Any]:
    """Temperature above 0 samples, with nothing else needed; top_k, top_p or min_p alone sample at temperature 1."""
    top_k = values.scalar("top_k", 0)
    top_p = values.scalar("top_p", 1.0) or 1.0  # 0 is how old clients switch it off
    min_p = values.scalar("min_p", 0.0)
    limited = top_k > 1 or top_p < 1 or min_p > 0
    temperature = values.scalar("temperature", 1.0 if limited else 0.0)
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


def _seed(values: _Row) -> int:
    given = {values.scalar(name, None) for name in ("random_seed", "seed")} - {None}
    if len(given) > 1:
        raise UsageError("random_seed and seed are two names of one value; got two different ones")
    return given.pop() if given else 0


def _bias_words(values: _Row) -> tuple[tuple[str, float], ...]:
    words, weights = values.words("embedding_bias_words"), values.list("embedding_bias_weights")
    if len(words) != len(weights):
        raise UsageError(f"embedding_bias_words and embedding_bias_weights must be equally long; got {len(words)} "
                         f"words and {len(weights)} weights")
    return tuple(zip(words, weights, strict=True))


def _decode(name: str, value: bytes | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} must be UTF-8 text; byte {error.start} of {len(value)} is not") from None


def _refuse_unknown(parameters: Mapping[str, Any]) -> None:
    known = [field.name for field in INPUTS]
    for name, value in parameters.items():
        if name in _TRITON_OWN or name.startswith(_TRITON_OWN_PREFIXES):
            continue
        reasons = [reason for prefix, reason in _PREFIXES_NOT_SUPPORTED.items() if name.startswith(prefix)]
        if reasons and (value is False or value == ""):  # old clients that send every field, switched off
            continue
        if reasons:
            raise UsageError(f"{name}: {reasons[0]}")
        near = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known, n=1)
        raise UsageError(f"unknown field {name!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                      f"; known fields: {', '.join(known)}"))
