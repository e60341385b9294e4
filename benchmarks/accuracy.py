"""What each quantisation costs on the demo model: perplexity, exact match and agreement with 16-bit, as a table.

It takes demo/model through convert and build with the commands that users type, and asks held-out questions. Usage:
`make accuracy`, or `python benchmarks/accuracy.py --questions 400`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tensorwright.runtime.chat_template import ChatTemplate
from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "model"
sys.path.insert(0, str(ROOT))

LONGEST_TEXT = 700  # tokens
INT8 = ("--use_weight_only", "--weight_only_precision", "int8")
INT4 = ("--use_weight_only", "--weight_only_precision", "int4")


@dataclass(frozen=True)
class Variant:
    """A row of the table: flags of convert, and of build."""

    name: str
    convert: tuple[str, ...] = ()
    build: tuple[str, ...] = ()


VARIANTS = (
    Variant("bfloat16"),
    Variant("W8A16", INT8),
    Variant("W8A16, exact", INT8, ("--exact",)),
    Variant("W4A16, groups of 128", INT4),
    Variant("W4A16, groups of 128, exact", INT4, ("--exact",)),
    Variant("W4A16, groups of 64", (*INT4, "--group_size", "64")),
    Variant("W4A16, one scale per channel", (*INT4, "--group_size", "-1")),
    Variant("bfloat16, int8 KV cache", ("--int8_kv_cache",)),
    Variant("W4A16, groups of 128, int8 lm_head and KV cache", (*INT4, "--quantize_lm_head", "--int8_kv_cache")),
)


@dataclass(frozen=True)
class Score:
    """exact and same are shares from 0 to 1; perplexity is per token; weight_error is |w - q| / |w| of the MLP's fc."""

    exact: float
    same: float
    perplexity: float
    megabytes: float
    weight_error: str


def engine_of(folder: Path, variant: Variant, target: str = "cpu") -> tuple[Path, str]:
    """Convert and build demo/model as the variant says; also the weight error that convert prints."""
    checkpoint, engine = folder / "checkpoint", folder / "engine"
    command = [sys.executable, "-m", "tensorwright"]
    printed = subprocess.run([*command, "convert", "--model_dir", str(MODEL), "--output_dir", str(checkpoint),
                              "--dtype", "bfloat16", *variant.convert],
                             check=True, capture_output=True, text=True).stdout
    error = re.search(r"^ *fc +([0-9.]+)", printed, flags=re.MULTILINE)
    subprocess.run([*command, "build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(engine),
                    "--max_batch_size", "32", "--max_seq_len", "768", "--max_num_tokens", "768",
                    "--gather_all_token_logits", "--target", target, *variant.build], check=True, capture_output=True)
    return engine, error.group(1) if error else ""


def answers(llm: LLM, questions: Sequence[str]) -> list[str]:
    """Greedy answers through the chat template."""
    template = ChatTemplate.of(llm.tokenizer)
    prompts = [llm.tokenizer.encode_chat(template.render([{"role": "user", "content": q}])) for q in questions]
    results = llm.generate(prompts, SamplingParameters(max_tokens=64))
    return [result.sequences[0].text.strip() for result in results]


def perplexity(llm: LLM, texts: Sequence[str], longest: int = LONGEST_TEXT) -> float:
    """The exponential of the mean negative log likelihood of all tokens after each text's first, up to `longest`."""
    total, count = 0.0, 0
    for text in texts:
        ids = llm.tokenizer.encode(text)[:longest]
        parameters = SamplingParameters(max_tokens=1, return_context_logits=True)
        logits = llm.generate([ids], parameters)[0].context_logits
        if logits is None:
            raise SystemExit("error: the engine gave no context logits")
        shifted = logits[:-1].astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        chosen = shifted[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(shifted).sum(axis=1))
        total, count = total - float(chosen.sum()), count + len(ids) - 1
    return float(np.exp(total / count))


def main() -> None:
    """Print the table in Markdown."""
    from demo.corpus import held_out_text
    from demo.skills import held_out_questions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=400)
    options = parser.parse_args()
    asked = held_out_questions(options.questions, seed=0)
    texts = held_out_text(options.texts, seed=0)
    expected = [answer for _, _, answer in asked]
    print(f"{len(asked)} held-out questions, {len(texts)} held-out texts\n")
    print("| weights | exact match | same answer as bfloat16 | perplexity | weight error | engine, MB |")
    print("|---|---|---|---|---|---|")
    plain: list[str] = []
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            engine, weight_error = engine_of(Path(folder), variant)
            llm = LLM(engine)
            given = answers(llm, [question for _, question, _ in asked])
            plain = plain or given
            score = Score(np.mean([a == b for a, b in zip(given, expected, strict=True)]).item(),
                          np.mean([a == b for a, b in zip(given, plain, strict=True)]).item(),
                          perplexity(llm, texts), (engine / "rank0.engine").stat().st_size / 1e6, weight_error)
        print(f"| {variant.name} | {score.exact:.1%} | {score.same:.1%} | {score.perplexity:.4f} | "
              f"{score.weight_error} | {score.megabytes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
