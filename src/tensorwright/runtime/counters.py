"""What the loop counts for metrics and logs. Totals since the start; gauges come from scheduler and blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Add to the fields; every one only grows."""

    requests: int = 0
    requests_finished: int = 0  # all of them, the next two included
    cancellations: int = 0
    errors: int = 0
    tokens_in: int = 0  # of prompts
    tokens_out: int = 0  # generated
    tokens_computed: int = 0  # by steps: chunks of prompts, decodes, and what preemption made again
    steps: int = 0
    ttft_sum_s: float = 0.0
    ttft_count: int = 0
