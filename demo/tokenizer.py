"""The demo's tokenizer: byte-level BPE, trained on the demo's own corpus.

Knows the special tokens, the chat template and the tokenizer files of a Hugging Face folder.
Knows nothing of the model, except the size of its vocabulary.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo.corpus import BOS, END_INST, EOS, INST, PAD, long_conversation, short_document

UNK = "<unk>"  # never produced, since every byte has a token; it keeps <s> and </s> at 1 and 2
SPECIAL = (UNK, BOS, EOS, INST, END_INST, PAD)
BOS_ID, EOS_ID, PAD_ID = SPECIAL.index(BOS), SPECIAL.index(EOS), SPECIAL.index(PAD)

# Mistral's form.  A system message has no place of its own there: it joins the first user message.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set ns.system = message['content'] | trim + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '[INST]' + ns.system + message['content'] | trim + '[/INST]' }}
{%- set ns.system = '' %}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] | trim + eos_token }}
{%- else %}
{{- raise_exception('Only the roles system, user and assistant are supported.') }}
{%- endif %}
{%- endfor %}
"""


def _training_text(docs: list[str], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    yield from docs
    for _ in range(60_000):
        yield "".join(text for text, _ in short_document(rng))
    for _ in range(500):
        yield "".join(text for text, _ in long_conversation(rng))


def train_tokenizer(docs: list[str], vocab_size: int, seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Single digits: a sum is then learnt digit by digit, whatever its length.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(docs, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """The files that describe the tokenizer, by name."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "additional_special_tokens": [INST, END_INST],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))
