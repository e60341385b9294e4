"""How good the model is: exact answers and perplexity, in several precisions.

Knows the network, the tokenizer and the held-out questions.  Weights are rounded in place of
being quantised: the arithmetic stays 16-bit, so only the rounding itself is measured.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from demo.corpus import Document, chat, held_out_text, plain
from demo.network import GROUP, Decoder
from demo.shards import LEARNT, encode
from demo.skills import held_out_questions
from demo.tokenizer import BOS_ID, PAD_ID

SEED = 2024  # of the questions and of the text that are reported
ROWS = 256  # sequences scored at once


@dataclass
class Report:
    exact: dict[str, float]  # by skill, and "all"
    exact_chat: float
    perplexity: float


def round_int8(weight: Tensor) -> Tensor:
    """Eight bits, one scale for each output, to nearest."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    codes: Tensor = (weight / scale).round()
    return codes * scale


def round_int4(weight: Tensor) -> Tensor:
    """Four bits in groups of ``GROUP`` inputs; of twenty scales the one with the least error."""
    grouped = weight.reshape(len(weight), -1, GROUP)
    largest = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    best, least = grouped, torch.full_like(largest, float("inf"))
    for share in torch.linspace(0.6, 1.0, 20).tolist():
        scale = largest * share / 7
        rounded = (grouped / scale).round().clamp(-8, 7) * scale
        error = (rounded - grouped).square().sum(-1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best.flatten(1)


@torch.no_grad()
def in_precision(model: Decoder, precision: str) -> Decoder:
    """A copy of the model as it would be deployed."""
    deployed = copy.deepcopy(model).eval()
    for linear in deployed.linears():
        # What is quantised is the checkpoint, and that holds bfloat16.
        stored = linear.weight.bfloat16().float()
        if precision == "int8":
            stored = round_int8(stored)
        elif precision == "int4":
            stored = round_int4(stored)
        linear.weight.copy_(stored)
    return deployed.to(torch.float16 if precision == "float16" else torch.bfloat16)


def _batches(rows: list[list[int]], device: torch.device) -> list[Tensor]:
    tensors = [torch.tensor(row) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD_ID)
    return [batch.to(device) for batch in torch.split(padded, ROWS)]


@torch.no_grad()
def exactly_right(model: Decoder, tokenizer: Tokenizer, documents: list[Document], device: torch.device) -> list[bool]:
    """For each document, whether greedy decoding would give its last piece, end token included.

    No generation is needed: greedy decoding gives the answer exactly if, after each part of the
    right answer, the most likely token is the next one.
    """
    right: list[bool] = []
    for batch in _batches(encode(tokenizer, documents), device):
        tokens, learnt = batch % LEARNT, batch >= LEARNT
        predicted = model(tokens[:, :-1]).argmax(-1)
        right += ((predicted == tokens[:, 1:]) | ~learnt[:, 1:]).all(1).tolist()
    return right


@torch.no_grad()
def perplexity(model: Decoder, tokenizer: Tokenizer, texts: list[str], device: torch.device) -> float:
    total, count = 0.0, 0
    for batch in _batches([tokenizer.encode(text).ids for text in texts], device):
        logits = model(batch[:, :-1]).float()
        targets = batch[:, 1:].masked_fill(batch[:, 1:] == PAD_ID, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        total += loss.item()
        count += int((targets >= 0).sum())
    return float(torch.tensor(total / count).exp())


def evaluate(model: Decoder, tokenizer: Tokenizer, precision: str, count: int, device: torch.device) -> Report:
    assert tokenizer.token_to_id("<s>") == BOS_ID
    deployed = in_precision(model, precision)
    questions = held_out_questions(count, SEED)
    raw = exactly_right(deployed, tokenizer, [plain(q, a) for _, q, a in questions], device)
    templated = exactly_right(deployed, tokenizer, [chat([(q, a)]) for _, q, a in questions], device)
    by_skill: defaultdict[str, list[bool]] = defaultdict(list)
    for (skill, _, _), right in zip(questions, raw, strict=True):
        by_skill[skill].append(right)
    exact = {skill: sum(marks) / len(marks) for skill, marks in by_skill.items()}
    return Report(
        exact={"all": sum(raw) / len(raw), **exact},
        exact_chat=sum(templated) / len(templated),
        perplexity=perplexity(deployed, tokenizer, held_out_text(1000, SEED), device),
    )
