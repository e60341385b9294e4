"""The rule of near-ties in `benchmarks/accuracy_gpu.py`, on logits that are made up."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"
LOGITS = np.array([[0.0, 3.0, 2.9, -1.0, 0.5]])  # after any text: token 1 is best, 2 nearly, 4 is the end


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import accuracy_gpu

    return accuracy_gpu


@pytest.mark.parametrize(("cpu", "gpu", "prefix", "gap"), [
    ((7, 1, 3), (7, 2, 3), [5, 7], 0.1), ((7, 1, 3), (7, 3, 3), [5, 7], 4.0), ((7, 1), (7,), [5, 7], 2.5),
    ((1,), (0,), [5], 3.0)])
def test_the_gap_is_where_the_answers_part(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, cpu: tuple[int, ...],
                                           gpu: tuple[int, ...], prefix: list[int], gap: float) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(accuracy, "_logits", lambda llm, ids: seen.append(ids) or LOGITS)
    llm = SimpleNamespace(engine=SimpleNamespace(end_ids=(4,)))
    assert accuracy.gap(llm, [5], cpu, gpu) == pytest.approx(gap)
    assert seen == [prefix]


def test_answers_that_part_beyond_the_logit_error_are_no_near_ties(accuracy: ModuleType,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(decode=str, encode=lambda text: [1, 2])
    cpu, gpu = (SimpleNamespace(name=name, tokenizer=tokenizer, engine=SimpleNamespace(end_ids=(4,)))
                for name in ("cpu", "gpu"))
    answers = {"cpu": [(1,), (1,), (1, 2)], "gpu": [(2,), (3,), (1, 2)]}
    monkeypatch.setattr(accuracy, "_prompts", lambda llm, questions: [[9]] * 3)
    monkeypatch.setattr(accuracy, "_answers", lambda llm, prompts, max_tokens: answers[llm.name])
    monkeypatch.setattr(accuracy, "_logits", lambda llm, ids: LOGITS + (0.2 if llm.name == "gpu" else 0.0))
    monkeypatch.setattr(accuracy, "perplexity", lambda llm, texts, longest: 2.0)
    row = accuracy.compare("x", cpu, gpu, ["q"] * 3, ["(1,)"] * 3, ["text"])
    assert (row.same, row.near_ties, row.others) == (1, 1, 1)
    assert (row.exact_cpu, row.exact_gpu) == (pytest.approx(2 / 3), 0.0)
    assert row.logit_error == pytest.approx(0.2)
