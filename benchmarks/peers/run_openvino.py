"""OpenVINO GenAI for `protocol.py`: an int4 model folder through the continuous-batching pipeline on the CPU.

Activations are quantised to int8 in the weights' groups of 128, the fastest setting; prefix caching is off, the KV
cache is as large as the batch needs, and else the defaults hold: paged attention and an 8-bit KV cache among them.
"""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai
import protocol

BLOCK = 32  # tokens in a KV block on CPUs


class OpenVino:
    """The pipeline, and a count of requests for their ids."""

    def __init__(self, settings: protocol.Settings) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = protocol.STEP_TOKENS
        scheduler.num_kv_blocks = settings.batch * (-(-settings.length // BLOCK) + 1)
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": settings.threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(settings.model), scheduler, "CPU", properties)
        self._requests = 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[protocol.Event]:
        greedy = openvino_genai.GenerationConfig()
        greedy.max_new_tokens, greedy.ignore_eos, greedy.do_sample = new_tokens, True, False
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], np.int64))
            handles.append(self._pipeline.add_request(self._requests, ids, greedy))
            self._requests += 1
        events = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            moment = time.perf_counter()
            for sequence, handle in enumerate(handles):
                if handle.can_read():
                    count = sum(len(output.generated_ids) for output in handle.read().values())
                    events.append((sequence, moment, count))
        return events


if __name__ == "__main__":
    protocol.main(OpenVino)
