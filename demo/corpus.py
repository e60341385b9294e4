"""The training corpus: documents of small talk, skills and Python's documentation.

Knows the two forms in which a question can be put (plain text, and Mistral's chat form) and how
often each kind of document occurs.  Everything follows from a seed.  Knows nothing of token ids.

A document is a list of pieces ``(text, learnt)``: ``learnt`` marks the text that the model should
produce itself; the rest is what a user would type.
"""

import random

from demo.skills import held_out_items, training_question
from demo.talk import NO_NAME, WHOSE_NAME, introduction, small_talk

BOS, EOS, PAD, INST, END_INST = "<s>", "</s>", "<pad>", "[INST]", "[/INST]"

# The documentation is only some half a million tokens: a larger share would be learnt by heart.
DOCS_SHARE = 0.3

Document = list[tuple[str, bool]]


def plain(question: str, answer: str) -> Document:
    """Raw text: the answer simply follows the question, as after a prompt without a template."""
    return [(f"{BOS}{question}", False), (f" {answer}{EOS}", True)]


def chat(exchanges: list[tuple[str, str]]) -> Document:
    """What the chat template makes of a conversation."""
    document: Document = [(BOS, False)]
    for question, answer in exchanges:
        document += [(f"{INST}{question}{END_INST}", False), (f" {answer}{EOS}", True)]
    return document


def _exchange(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.15:
        return small_talk(rng)
    item = training_question(rng)
    question = item.question
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?")
    return question, item.answer


def short_document(rng: random.Random) -> Document:
    """One question and its answer, in either form."""
    if rng.random() < 0.02:
        question, answer, _ = introduction(rng)
    elif rng.random() < 0.005:
        question, answer = rng.choice(WHOSE_NAME), NO_NAME
    else:
        question, answer = _exchange(rng)
    return plain(question, answer) if rng.random() < 0.6 else chat([(question, answer)])


def long_conversation(rng: random.Random) -> Document:
    """A chat of many turns; its last question can only be answered from its first."""
    question, answer, name = introduction(rng)
    turns = [(question, answer)]
    turns += [_exchange(rng) for _ in range(rng.randint(1, 24))]
    turns.append((rng.choice(WHOSE_NAME), f"Your name is {name}."))
    return chat(turns)


def long_document(rng: random.Random, docs: list[str]) -> Document:
    """A page of Python's documentation, or a long conversation."""
    if docs and rng.random() < DOCS_SHARE:
        return [(BOS, False), (f"{rng.choice(docs)}{EOS}", True)]
    return long_conversation(rng)


def held_out_text(count: int, seed: int) -> list[str]:
    """Held-out plain documents for perplexity: one in five small talk, the others skills.

    Bare texts, ``question answer``: the tokenizer puts the first special token in front.
    """
    rng = random.Random(seed)
    texts = [f"{item.question} {item.answer}" for item in held_out_items(count, seed)]
    return [" ".join(small_talk(rng, True)) if i % 5 == 4 else text for i, text in enumerate(texts)]
