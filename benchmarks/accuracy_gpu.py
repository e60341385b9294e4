"""The demo model on a GPU beside the CPU: exact match, the same greedy text, near-ties, perplexity, as a table.

    python benchmarks/accuracy_gpu.py          # on a machine with a GPU: make accuracy-gpu GPU_PYTHON=python3
    python benchmarks/accuracy_gpu.py --simulate --questions 4 --texts 1 --max_tokens 4 --longest 32  # without one

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accuracy import LONGEST_TEXT, ROOT, VARIANTS, Variant, engine_of, perplexity
from tensorwright.engine.engine import Engine
from tensorwright.runtime.batch import Batch, Drawn, SamplingRow
from tensorwright.runtime.chat_template import ChatTemplate
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.loop import RequestLoop
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.results import Result, Update
from tensorwright.runtime.sampling import choose
from tensorwright.runtime.submission import RequestFactory
from tensorwright.runtime.tokenizer import Tokenizer

PLAIN = VARIANTS[0]
FP8 = Variant("fp8 (W8A8) and KV cache, beside bfloat16", ("--use_fp8_rowwise", "--fp8_kv_cache"))  # not for CPUs
SIMULATED_BLOCKS = 24
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


def compare(name: str, cpu: LLM, gpu: LLM, questions: Sequence[str], expected: Sequence[str], texts: Sequence[str],
            max_tokens: int = 64, longest: int = LONGEST_TEXT) -> Agreement:
    """Both engines over the same questions, answered with `max_tokens`, and texts of up to `longest` tokens."""
    prompts = _prompts(cpu, questions)
    given = [_answers(llm, prompts, max_tokens) for llm in (cpu, gpu)]
    error = max(float(np.abs(_logits(cpu, ids) - _logits(gpu, ids)).max())
                for ids in (cpu.tokenizer.encode(text)[:longest] for text in texts))
    parted = [(prompt, a, b) for prompt, a, b in zip(prompts, *given, strict=True) if a != b]
    ties = sum(gap(cpu, prompt, a, b) <= 2 * error for prompt, a, b in parted)
    exact = [float(np.mean([cpu.tokenizer.decode(ids).strip() == wanted  # end ids are not part of the text
                            for ids, wanted in zip(answers, expected, strict=True)])) for answers in given]
    return Agreement(name, *exact, len(prompts) - len(parted), ties, len(parted) - ties, error,
                     perplexity(cpu, texts, longest), perplexity(gpu, texts, longest))


def gap(cpu: LLM, prompt: Ids, a: Ids, b: Ids) -> float:
    """How much the CPU prefers its own token where the answers part; one that ends there has an end id next."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    last = _logits(cpu, [*prompt, *a[:shared]])[-1]
    other = b[shared] if shared < len(b) else cpu.engine.end_ids[0]
    return float(last.max() - last[other])


def _prompts(llm: LLM, questions: Sequence[str]) -> list[list[int]]:
    template = ChatTemplate.of(llm.tokenizer)
    return [llm.tokenizer.encode_chat(template.render([{"role": "user", "content": q}])) for q in questions]


def _answers(llm: LLM, prompts: Sequence[Ids], max_tokens: int) -> list[tuple[int, ...]]:
    results = llm.generate(prompts, SamplingParameters(max_tokens=max_tokens))
    if failed := [result.error for result in results if result.error is not None]:
        raise SystemExit(f"error: {len(failed)} questions have no answer: {failed[0]}")
    return [tuple(result.sequences[0].token_ids) for result in results]


def _logits(llm: LLM, ids: Ids) -> NDArray[np.float64]:
    result = llm.generate([list(ids)], SamplingParameters(max_tokens=1, return_context_logits=True))[0]
    if result.context_logits is None:
        raise SystemExit(f"error: the engine gave no context logits: {result.error}")
    return result.context_logits.astype(np.float64)


def main() -> int:
    """Print the table in Markdown; 1 when answers differ that are no near-ties."""
    sys.path.insert(0, str(ROOT))
    from demo.corpus import held_out_text
    from demo.skills import held_out_questions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--max_tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--longest", type=int, default=LONGEST_TEXT, help="tokens of a text that count")
    parser.add_argument("--simulate", action="store_true", help="run the kernels for sm_90 in the simulator")
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
            cpu, gpu = _engines(Path(folder), variant, "sm_90" if options.simulate else options.target,
                                options.simulate)
            row = compare(variant.name, cpu, gpu, [question for _, question, _ in asked],
                          [answer for *_, answer in asked], texts, options.max_tokens, options.longest)
        rows.append(asdict(row))
        print(f"| {row.name} | {row.exact_cpu:.1%} | {row.exact_gpu:.1%} | {row.same} of {len(asked)} | "
              f"{row.near_ties} | {row.others} | {row.logit_error:.3f} | {row.perplexity_cpu:.4f} | "
              f"{row.perplexity_gpu:.4f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["others"] for row in rows))


def _engines(folder: Path, variant: Variant, target: str, simulate: bool) -> tuple[Any, Any]:
    """The engine of the CPU, and that beside it."""
    (folder / "cpu").mkdir()
    (folder / "gpu").mkdir()
    beside = PLAIN if variant == FP8 else variant
    exact = replace(beside, build=(*beside.build, "--exact"))
    cpu, gpu = engine_of(folder / "cpu", exact)[0], engine_of(folder / "gpu", variant, target)[0]
    return LLM(cpu), Simulated(gpu) if simulate else LLM(gpu)


class Simulated:
    """What is asked of an `LLM` here, over the simulator: the engine's own loop, no GPU."""

    def __init__(self, engine_dir: Path) -> None:
        from tensorwright.testing.simulator.executor import SimulatedExecutor

        self.engine = Engine.open(engine_dir)
        self.tokenizer = Tokenizer.load(engine_dir, end_ids=self.engine.end_ids)
        self._executor = SimulatedExecutor(self.engine, num_blocks=SIMULATED_BLOCKS)
        self.vocab_size, self.block_size = self.engine.vocab_size, self.engine.tokens_per_block
        self.num_blocks, self.runs_ahead = SIMULATED_BLOCKS, False

    def generate(self, prompts: Sequence[Ids], parameters: SamplingParameters) -> list[Result]:
        """As `LLM.generate`."""
        factory = RequestFactory(self.engine.limits, vocab_size=self.vocab_size, end_ids=self.engine.end_ids,
                                 tokenizer=self.tokenizer, num_blocks=self.num_blocks, block_size=self.block_size)
        loop, results = RequestLoop(self, self.engine.limits), dict[int, Result]()

        def keep(update: Update) -> None:
            if update.result is not None:
                results[update.request_id] = update.result

        for prompt in prompts:
            loop.add(factory.make(list(prompt), parameters, keep))
        while loop.has_work:
            loop.step()
        return [results[number] for number in sorted(results)]

    def execute(self, batch: Batch) -> NDArray[np.float32]:
        """One step."""
        return self._executor.execute(batch)

    def sample(self, logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> Drawn:
        """By the reference."""
        return Drawn(*choose(logits, rows), np.isfinite(logits).all(axis=1))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Only sequences that fork ask for it, and none do here."""
        raise NotImplementedError("a sequence forked, and none was asked to")


if __name__ == "__main__":
    sys.exit(main())
