"""The deployed model: requests in, the engine's updates out. It knows Triton's calls through the module handed in.

A request's life: `execute` copies its inputs and returns; a worker reads the fields, tokenises and submits each row to
the engine; the engine's thread reports updates; the responder's thread sends them. It is the same with and without
decoupled mode, so requests of both run together in one engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwright.errors import TensorwrightError, UsageError
from tensorwright.serve.triton.exchange import Exchange, Row
from tensorwright.serve.triton.fields import Ask, read_asks, with_bias
from tensorwright.serve.triton.metrics import Metrics
from tensorwright.serve.triton.responder import Responder
from tensorwright.serve.triton.settings import ServeSettings

if TYPE_CHECKING:
    from tensorwright.runtime.async_llm import AsyncLLM

NUM_WORKERS = 2  # a long prompt tokenises on one, others go on through the other
_NUMPY_TYPES = {"TYPE_FP16": "float16", "TYPE_FP32": "float32"}


class Model:
    """One loaded engine behind Triton's three calls."""

    def __init__(self, pb: Any, args: Mapping[str, str], *, open_llm: Callable[..., Any] | None = None) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self.pb = pb
        try:
            self.settings = ServeSettings.from_parameters(parameters)
            self.llm = self._open(open_llm, Path(args["model_repository"]) / args["model_version"], parameters)
        except TensorwrightError as error:
            raise pb.TritonModelException(str(error)) from error
        for name, value in self.llm.memory_table():
            print(f"{args['model_name']}: {name} {value}", flush=True)
        self.metrics = Metrics(pb, args["model_name"], args["model_version"])
        self.workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="submit")
        self.responder = Responder(pb, self.metrics, self.settings, logits_type=_logits_type(config),
                                   statistics=self._statistics)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests. Inputs are copied now: they are Triton's memory, and gone when this returns."""
        for request in requests:
            exchange = Exchange(self.pb, request.get_response_sender())
            self.responder.open(exchange)
            try:
                inputs = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
                self.workers.submit(self._start, exchange, inputs, json.loads(request.parameters() or "{}"))
            except Exception as error:  # noqa: BLE001 - the request is answered with it, and the others go on
                self.responder.fail(exchange, error)

    def close(self) -> None:
        """End every request with an error, then the engine, then the metrics."""
        self.workers.shutdown(wait=True, cancel_futures=True)
        self.responder.close()
        self.llm.close()
        self.metrics.close()

    def _statistics(self) -> dict[str, float]:
        return {**self.llm.statistics(), "ready": float(self.llm.is_ready)}

    def _open(self, open_llm: Callable[..., Any] | None, version: Path, parameters: Mapping[str, str]) -> AsyncLLM:
        tokenizer = parameters.get("tokenizer_dir", "")
        llm: AsyncLLM = (open_llm or _llm_class())(
            version / parameters.get("engine_dir", "engine"), tokenizer_dir=version / tokenizer if tokenizer else None,
            threads=self.settings.threads, max_kv_tokens=self.settings.max_kv_tokens,
            kv_cache_fraction=self.settings.kv_cache_fraction, block_reuse=self.settings.block_reuse)
        return llm

    def _start(self, exchange: Exchange, inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        """On a worker: every row is checked before the first one runs."""
        try:
            asks = read_asks(inputs, parameters)
            self._refuse_streaming(asks)
            exchange.rows = [Row(self._biased(ask)) for ask in asks]
            for index, row in enumerate(exchange.rows):
                exchange.attach(self.llm.submit(row.ask.prompt, row.ask.parameters,
                                                partial(self.responder.update, exchange, index)))
        except Exception as error:  # noqa: BLE001 - the request is answered with it, and the worker goes on
            self.responder.fail(exchange, error)

    def _refuse_streaming(self, asks: Sequence[Ask]) -> None:
        if not self.settings.decoupled and any(ask.stream for ask in asks):
            raise UsageError("Streaming is only supported if model is deployed using decoupled mode; this one was "
                             "deployed with --no_decoupled")

    def _biased(self, ask: Ask) -> Ask:
        """Bias words become biases of their tokens, as the old preprocessing did: each token of each word."""
        if not ask.bias_words:
            return ask
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise UsageError("embedding_bias_words need a tokenizer, and this model has none")
        bias: dict[int, float] = {}
        for word, weight in ask.bias_words:
            for token_id in tokenizer.encode_plain(word):
                bias[token_id] = bias.get(token_id, 0.0) + weight
        return with_bias(ask, bias)


def _llm_class() -> type[AsyncLLM]:
    from tensorwright.runtime.async_llm import AsyncLLM

    return AsyncLLM


def _logits_type(config: Mapping[str, Any]) -> str:
    types = {output["name"]: output["data_type"] for output in config["output"]}
    return _NUMPY_TYPES[types["context_logits"]]
