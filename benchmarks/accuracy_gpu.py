"""The demo model on a GPU beside the CPU: exact match, the same greedy text, near-ties, perplexity, as a table.

    python benchmarks/accuracy_gpu.py          # on a machine with a GPU: make accuracy-gpu GPU_PYTHON=python3

The CPU's engines are built with --exact: neither rounds activations to int8. Texts may part where two tokens are nearly
as likely. The rule: the logit error is the largest difference between the two engines' logits anywhere in held-out
texts; where the CPU prefers its own token to the GPU's by more than twice that, the answers differ for another reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from accuracy import ROOT, VARIANTS, Variant, engine_of, perplexity
from tensorwright.runtime.chat_template import ChatTemplate
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters

LONGEST_TEXT = 700
PLAIN = VARIANTS[0]
FP8 = Variant("fp8 (W8A8) and KV cache, beside bfloat16", ("--use_fp8_rowwise", "--fp8_kv_cache"))  # not for CPUs
Ids = Sequence[int]


@dataclass(frozen=True)
class Agreement:
    """A row: shares of questions answered exactly, answers that are the same, those that part, and why."""

    name: str
    exact_cpu: float
    exact_gpu: float
    same: int
    near_ties: int
    others: int
    logit_error: float
    perplexity_cpu: float
    perplexity_gpu: float


def compare(name: str, cpu: LLM, gpu: LLM, questions: Sequence[str], expected: Sequence[str],
            texts: Sequence[str]) -> Agreement:
    """Both engines over the same questions and texts."""
    prompts = _prompts(cpu, questions)
    given = [_answers(llm, prompts) for llm in (cpu, gpu)]
    error = max(float(np.abs(_logits(cpu, ids) - _logits(gpu, ids)).max()) for ids in _texts(cpu, texts))
    parted = [(prompt, a, b) for prompt, a, b in zip(prompts, *given, strict=True) if a != b]
    ties = sum(gap(cpu, prompt, a, b) <= 2 * error for prompt, a, b in parted)
    exact = [float(np.mean([cpu.tokenizer.decode(ids).strip() == wanted  # end ids are not part of the text
                            for ids, wanted in zip(answers, expected, strict=True)])) for answers in given]
    return Agreement(name, *exact, len(prompts) - len(parted), ties, len(parted) - ties, error,
                     perplexity(cpu, texts), perplexity(gpu, texts))


def gap(cpu: LLM, prompt: Ids, a: Ids, b: Ids) -> float:
    """How much the CPU prefers its own token where the answers part; one that ends there has an end id next."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    last = _logits(cpu, [*prompt, *a[:shared]])[-1]
    other = b[shared] if shared < len(b) else cpu.engine.end_ids[0]
    return float(last.max() - last[other])


def _prompts(llm: LLM, questions: Sequence[str]) -> list[list[int]]:
    template = ChatTemplate.of(llm.tokenizer)
    return [llm.tokenizer.encode_chat(template.render([{"role": "user", "content": q}])) for q in questions]


def _answers(llm: LLM, prompts: Sequence[Ids]) -> list[tuple[int, ...]]:
    return [tuple(result.sequences[0].token_ids) for result in llm.generate(prompts, SamplingParameters(max_tokens=64))]


def _texts(llm: LLM, texts: Sequence[str]) -> list[list[int]]:
    return [llm.tokenizer.encode(text)[:LONGEST_TEXT] for text in texts]


def _logits(llm: LLM, ids: Ids) -> NDArray[np.float64]:
    found = llm.generate([list(ids)], SamplingParameters(max_tokens=1, return_context_logits=True))[0].context_logits
    if found is None:
        raise SystemExit("error: the engine gave no context logits")
    return found.astype(np.float64)


def main() -> int:
    """Print the table in Markdown; 1 when answers differ that are no near-ties."""
    sys.path.insert(0, str(ROOT))
    from demo.corpus import held_out_text
    from demo.skills import held_out_questions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--target", default="native", help="of the engines beside the CPU's")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    asked, texts = held_out_questions(options.questions, seed=0), held_out_text(options.texts, seed=0)
    print(f"{len(asked)} held-out questions, {len(texts)} held-out texts\n")
    print("| weights | exact match, CPU | GPU | same text | near-ties | others | logit error | perplexity, CPU | GPU |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for variant in (*(each for each in VARIANTS if "--exact" not in each.build), FP8):
        with tempfile.TemporaryDirectory() as folder:
            cpu, gpu = _engines(Path(folder), variant, options.target)
            row = compare(variant.name, cpu, gpu, [question for _, question, _ in asked],
                          [answer for *_, answer in asked], texts)
        rows.append(asdict(row))
        print(f"| {row.name} | {row.exact_cpu:.1%} | {row.exact_gpu:.1%} | {row.same} of {len(asked)} | "
              f"{row.near_ties} | {row.others} | {row.logit_error:.3f} | {row.perplexity_cpu:.4f} | "
              f"{row.perplexity_gpu:.4f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["others"] for row in rows))


def _engines(folder: Path, variant: Variant, target: str) -> tuple[LLM, LLM]:
    (folder / "cpu").mkdir()
    (folder / "gpu").mkdir()
    beside = PLAIN if variant == FP8 else variant
    exact = replace(beside, build=(*beside.build, "--exact"))
    return LLM(engine_of(folder / "cpu", exact)[0]), LLM(engine_of(folder / "gpu", variant, target)[0])


if __name__ == "__main__":
    sys.exit(main())
