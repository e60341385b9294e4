"""Our numbers on Triton's metrics page. It knows Triton's metric objects and their two dangers.

Triton's own durations end when a decoupled request is released, a few milliseconds after it came, so first-token and
request times are published here. Touching metrics from two threads at once ends the server, and so does leaving them
to Python's shutdown (server issues 8662 and 8663): one lock guards them all, and `close` deletes them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

OUTCOMES = ("stop", "length", "cancelled", "timeout", "refused", "error")
READY = "tensorwright_engine_ready"  # 0 when the engine's loop has failed, and every request would
_COUNTERS = {
    "tensorwright_input_tokens_total": "Prompt tokens of finished requests",
    "tensorwright_output_tokens_total": "Generated tokens",
    "tensorwright_first_token_seconds_sum": "Time from arrival to first token, all requests that had one",
    "tensorwright_first_token_seconds_count": "Requests that had a first token",
    "tensorwright_request_seconds_sum": "Time from arrival to the last response, all requests",
    "tensorwright_request_seconds_count": "Requests that have ended",
}
_BLOCKS = ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type")
_REQUESTS = ("nv_trt_llm_request_metrics", "request_type")
_GAUGES = {  # statistic of the engine loop: our family, then the family and label that the old backend had
    "requests_active": ("tensorwright_requests_active", *_REQUESTS, "active"),
    "requests_waiting": ("tensorwright_requests_waiting", *_REQUESTS, "waiting"),
    "blocks_total": ("tensorwright_kv_blocks_total", *_BLOCKS, "max"),
    "blocks_free": ("tensorwright_kv_blocks_free", *_BLOCKS, "free"),
    "blocks_used": ("tensorwright_kv_blocks_used", *_BLOCKS, "used"),
    "blocks_reused": ("tensorwright_kv_blocks_reused", *_BLOCKS, "reused"),
    "tokens_per_block": ("tensorwright_tokens_per_kv_block", *_BLOCKS, "tokens_per"),
    "prefix_hits": ("tensorwright_prefix_hits",),
    "preemptions": ("tensorwright_preemptions",),
    "steps": ("tensorwright_steps",),
    "tokens_computed": ("tensorwright_tokens_computed",),
    "ready": (READY,),
}


class Metrics:
    """Counters of requests, and gauges for what the engine loop counts."""

    def __init__(self, pb: Any, model: str, version: str) -> None:
        self._pb = pb
        self._lock = threading.Lock()
        self._labels = {"model": model, "version": version}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._shown: dict[str, float] = {}
        with self._lock:
            for name, meaning in _COUNTERS.items():
                self._create(name, "", meaning, "COUNTER", {})
            for outcome in OUTCOMES:
                self._create("tensorwright_requests_total", outcome, "Requests by how they ended", "COUNTER",
                             {"outcome": outcome})

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to `tensorwright_<name>`."""
        self._increment(f"tensorwright_{name}", "", amount)

    def ended(self, outcome: str, seconds: float) -> None:
        """One request has ended."""
        self._increment("tensorwright_requests_total", outcome, 1.0)
        self.count("request_seconds_sum", seconds)
        self.count("request_seconds_count")

    def show(self, statistics: Mapping[str, float]) -> None:
        """Set the gauges; only values that changed cost a message to the server."""
        with self._lock:
            for name, value in statistics.items():
                if self._families and name in _GAUGES and self._shown.get(name) != value:
                    self._shown[name] = value
                    own, *old = _GAUGES[name]
                    self._gauge(own, {}).set(value)
                    if old:
                        self._gauge(old[0], {old[1]: old[2]}).set(value)

    def close(self) -> None:
        """Delete the metrics, then their families. Later calls do nothing."""
        with self._lock:
            self._metrics.clear()
            self._families.clear()

    def _increment(self, name: str, key: str, amount: float) -> None:
        with self._lock:
            metric = self._metrics.get((name, key))
            if metric is not None and amount > 0:
                metric.increment(amount)

    def _gauge(self, name: str, labels: Mapping[str, str]) -> Any:
        key = next(iter(labels.values()), "")
        if (name, key) not in self._metrics:
            self._create(name, key, "Of the engine loop", "GAUGE", labels)
        return self._metrics[name, key]

    def _create(self, name: str, key: str, meaning: str, kind: str, labels: Mapping[str, str]) -> None:
        if name not in self._families:
            family = self._pb.MetricFamily
            self._families[name] = family(name=name, description=meaning, kind=getattr(family, kind))
        self._metrics[name, key] = self._families[name].Metric(labels={**self._labels, **labels})
