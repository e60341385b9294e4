"""Train the demo model and write it as a Hugging Face folder.

    python -m demo.train --out demo/model --minutes 8

Knows the order of the work, the optimisers and the schedule.  The schedule follows the clock: all
of it takes the given minutes on any machine, and a faster one sees more text.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from demo.evaluate import evaluate
from demo.feed import Feed, start_workers
from demo.muon import Muon
from demo.network import Decoder, Shape
from demo.python_docs import python_docs
from demo.shards import LEARNT, LONG_EVERY, LONG_ROW, SHORT_ROW
from demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, tokenizer_files, train_tokenizer

MATRIX_LR, OTHER_LR, WARM_UP = 0.02, 0.004, 200
# What a user types counts for little.  Its random numbers cannot be predicted, and after "hello"
# the model should rather answer than go on asking.
TYPED_WEIGHT = 0.1
# The last part of the training shakes the weights as 4-bit rounding will (``NoisyLinear``).
NOISE_FROM, NOISE_FULL = 0.5, 0.7


def weighted_loss(model: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
    tokens = (numbers % LEARNT).long()
    weights = torch.where(numbers[:, 1:] >= LEARNT, 1.0, TYPED_WEIGHT).flatten()
    logits = model(tokens)[:, :-1].float().flatten(0, 1)
    losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def train(model: Decoder, feed: Feed, deadline: float, noise: float, log: Callable[[str], None]) -> None:
    """Train until the deadline (on the monotonic clock)."""
    device = feed.device
    inner = [linear.weight for linear in model.linears()]
    held = {id(parameter) for parameter in inner}
    others = [parameter for parameter in model.parameters() if id(parameter) not in held]
    muon = Muon(inner, momentum=0.95, weight_decay=0.05)
    adam = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.01)
    loss_of = torch.compile(weighted_loss, dynamic=False) if device.type == "cuda" else weighted_loss

    def gradients(row: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, feed.batch(row))
        torch.autograd.backward(loss)
        return loss.detach()

    for row in (SHORT_ROW, LONG_ROW):  # compiles, before the clock of the schedule starts
        gradients(row)
    model.zero_grad(set_to_none=True)
    start, step, loss = time.monotonic(), 0, torch.zeros(())
    log(f"the schedule has {deadline - start:.0f} s")
    while (now := time.monotonic()) < deadline:
        progress = (now - start) / (deadline - start)
        rate = min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2
        muon.lr = MATRIX_LR * rate
        adam.param_groups[0]["lr"] = OTHER_LR * rate
        shake = min(1.0, max(0.0, (progress - NOISE_FROM) / (NOISE_FULL - NOISE_FROM)))
        for linear in model.linears():
            linear.noise.fill_(noise * shake)
        new = gradients(LONG_ROW if step % LONG_EVERY == 0 else SHORT_ROW)
        loss = new if step == 0 else loss.lerp(new, 0.02)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            value = loss.item()  # waits for the device: the clock must not run ahead of it
            if step % 400 == 0:
                speed = step * feed.batch_tokens / (time.monotonic() - start)
                log(f"step {step} loss {value:.4f} tokens/s {speed:.0f} repeated {feed.repeats}")
    spent = time.monotonic() - start
    log(f"{step} steps, {step * feed.batch_tokens} tokens in {spent:.0f} s; loss {loss.item():.4f}")


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Each file aside, then renamed: nobody ever sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        aside = folder / f"{name}.part"
        aside.write_bytes(contents)
        aside.replace(folder / name)


def model_files(model: Decoder, tokenizer: Tokenizer, shape: Shape) -> dict[str, bytes]:
    """The Hugging Face folder."""
    state = model.state_dict()
    tensors = {name: value.bfloat16().cpu().contiguous() for name, value in state.items()}
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    texts = {
        "config.json": json.dumps(shape.config(BOS_ID, EOS_ID, PAD_ID), indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        **tokenizer_files(tokenizer, shape.max_positions),
    }
    files = {name: text.encode() for name, text in texts.items()}
    files["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="until the training ends")
    parser.add_argument("--workers", type=int, default=14, help="processes that make text")
    parser.add_argument("--batch-tokens", type=int, default=1 << 17)
    parser.add_argument("--noise", type=float, default=1.0, help="weight noise at the end; 0 for none")
    parser.add_argument("--layers", type=int, default=Shape.layers, help="fewer for a quick trial")
    parser.add_argument("--questions", type=int, default=3800, help="held-out questions to score")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(f"{time.monotonic() - began:6.1f} s  {line}")
        print(lines[-1], flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    shape = Shape(layers=arguments.layers)
    docs = python_docs()
    tokenizer = train_tokenizer(docs, shape.vocab_size, arguments.seed)
    log(f"{len(docs)} pages of documentation; {tokenizer.get_vocab_size()} tokens in the vocabulary")
    model = Decoder(shape).to(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, {"tokenizer.json": tokenizer.to_str().encode()})
        workers = start_workers(folder, arguments.workers, arguments.seed)
        try:
            feed = Feed(folder, arguments.batch_tokens, arguments.seed, device)
            train(model, feed, began + 60 * arguments.minutes, arguments.noise, log)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    write(arguments.out, model_files(model, tokenizer, shape))
    log(f"wrote {arguments.out}")
    reports = {}
    for precision in ("bfloat16", "float16", "int8", "int4"):
        report = evaluate(model, tokenizer, precision, arguments.questions, device)
        reports[precision] = asdict(report)
        log(f"{precision}: exact {report.exact['all']:.4f} chat {report.exact_chat:.4f} "
            f"perplexity {report.perplexity:.4f}")  # fmt: skip
    for skill, share in reports["bfloat16"]["exact"].items():
        log(f"{skill}: {share:.3f}, int4 {reports['int4']['exact'][skill]:.3f}")
    results = json.dumps({"reports": reports, "log": lines}, indent=1) + "\n"
    write(arguments.out.parent, {"results.json": results.encode()})


if __name__ == "__main__":
    main()
