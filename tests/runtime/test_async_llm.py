"""LLM and AsyncLLM over an engine that is all fakes: threads, cancelling, closing, counting."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from tensorwright.errors import LimitError, TensorwrightError, UsageError
from tensorwright.runtime import async_llm, llm
from tensorwright.runtime.async_llm import AsyncLLM
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.memory import MemoryPlan, Needs
from tensorwright.runtime.opening import OpenEngine
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.testing.plain_run import LIMITS, Harness, plain_run

ENDLESS = SamplingParameters(max_tokens=200, end_ids=())


@pytest.fixture
def harness(monkeypatch):
    harness = Harness(num_blocks=200)

    def open_engine(engine_dir, **options):
        plan = MemoryPlan(Needs(1, 1, 1, 4), 200, 1000)
        return OpenEngine(SimpleNamespace(limits=LIMITS), None, plan, harness.factory, harness.loop)

    for module in (llm, async_llm):
        monkeypatch.setattr(module, "open_engine", open_engine)
    return harness


@pytest.fixture
def served(harness):
    served = AsyncLLM("engine")
    yield served
    served.close()


class Inbox:
    def __init__(self):
        self.updates = []
        self.done = threading.Event()

    def __call__(self, update):
        self.updates.append(update)
        if update.finished:
            self.done.set()

    @property
    def result(self):
        assert self.done.wait(20)
        return self.updates[-1].result


def test_results_come_in_the_order_of_the_prompts(harness):
    prompts = [(3, 4, 5), (5,) * 30, (6, 3)]
    parameters = [SamplingParameters(max_tokens=n, temperature=1.0) for n in (20, 2, 9)]
    results = LLM("engine").generate(prompts, parameters)
    assert [[list(s.token_ids) for s in r.sequences] for r in results] == [
        plain_run(p, q) for p, q in zip(prompts, parameters, strict=True)]


def test_a_bad_prompt_keeps_all_others_from_running(harness):
    with pytest.raises(LimitError, match="prompt 1: "):
        LLM("engine").generate([(3, 4), (3,) * 300], ENDLESS)
    assert harness.loop.counters.requests == 0


def test_prompts_are_a_list(harness):
    with pytest.raises(UsageError, match="list"):
        LLM("engine").generate("hi", ENDLESS)
    with pytest.raises(UsageError, match="2 prompts and 1"):
        LLM("engine").generate([(3,), (4,)], [ENDLESS])


def test_closing_a_stream_cancels_what_runs(harness):
    updates = LLM("engine").stream([(3, 4), (5, 6)], ENDLESS)
    next(updates)
    updates.close()
    assert not harness.loop.has_work
    assert harness.loop.blocks.num_used == 0
    assert harness.loop.counters.cancellations == 2


def test_many_threads_get_their_own_answers(served):
    inboxes = {}

    def client(number):
        for index in range(4):
            inbox = inboxes[number, index] = Inbox()
            parameters = SamplingParameters(max_tokens=12, temperature=1.0, seed=index)
            served.submit((3 + number, 4, 5), parameters, inbox)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (number, index), inbox in inboxes.items():
        parameters = SamplingParameters(max_tokens=12, temperature=1.0, seed=index)
        assert [list(inbox.result.sequences[0].token_ids)] == plain_run((3 + number, 4, 5), parameters)
        assert all(update.request_id == inbox.result.request_id for update in inbox.updates)
    statistics = served.statistics()
    assert statistics["requests"] == statistics["requests_finished"] == statistics["ttft_count"] == 20
    assert statistics["tokens_in"] == 60
    assert statistics["tokens_out"] == sum(len(i.result.sequences[0].token_ids) for i in inboxes.values())
    assert statistics["ttft_sum_s"] > 0


def test_cancel_ends_within_a_step(served, harness):
    seen = threading.Semaphore(0)
    inbox = Inbox()

    def slowly(update):
        seen.release()
        inbox(update)
        time.sleep(0.01)

    request = served.submit((3, 4), ENDLESS, slowly)
    assert seen.acquire(timeout=20)
    request.cancel()
    length = len(inbox.updates)
    assert inbox.result.sequences[0].finish_reason == "cancelled"
    assert len(inbox.result.sequences[0].token_ids) <= length + 1
    for _ in range(200):
        if served.statistics()["blocks_used"] == 0:
            break
        time.sleep(0.01)
    assert served.statistics()["blocks_used"] == 0
    assert served.statistics()["cancellations"] == 1


def test_close_ends_every_request(harness):
    served = AsyncLLM("engine")
    inboxes = [Inbox() for _ in range(12)]
    for inbox in inboxes:
        served.submit((3, 4), ENDLESS, inbox)
    served.close()
    served.close()
    assert {inbox.result.sequences[0].finish_reason for inbox in inboxes} <= {"cancelled", "length"}
    assert not served.is_ready
    with pytest.raises(UsageError, match="closed"):
        served.submit((3, 4), ENDLESS, print)


def test_close_from_a_callback_does_not_hang(harness):
    served = AsyncLLM("engine")
    inbox = Inbox()

    def closing(update):
        if not update.finished:
            served.close()
        inbox(update)

    served.submit((3, 4), ENDLESS, closing)
    assert inbox.result.sequences[0].finish_reason == "cancelled"


def test_a_failed_loop_answers_everybody_and_says_so(served, harness):
    harness.loop.scheduler.schedule = lambda: 1 / 0
    inbox = Inbox()
    served.submit((3, 4), ENDLESS, inbox)
    assert "ZeroDivisionError" in inbox.result.error
    served._thread._thread.join(20)
    assert not served.is_ready
    with pytest.raises(TensorwrightError, match="ZeroDivisionError"):
        served.submit((3, 4), ENDLESS, print)


def test_several_ranks_are_refused():
    with pytest.raises(UsageError, match="one rank"):
        AsyncLLM("engine", communicator=SimpleNamespace(rank=0, size=2))
