"""A small byte-level tokenizer for tests: every byte has a token, and pairs of letters fill the vocabulary.

It knows the tokenizer files of a Hugging Face folder, and nothing of the model.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
"""Special tokens by id: 1 begins a text, 2 ends an answer."""

NUM_BYTE_TOKENS = len(SPECIAL) + 256
"""The smallest vocabulary; larger ones add merged pairs of letters, and past those ids without text."""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '[INST]' + message['content'] + '[/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- message['content'] + eos_token }}
{%- else %}
{{- raise_exception('Only the roles user and assistant are supported.') }}
{%- endif %}
{%- endfor %}
"""

_LETTERS = "etaoinshrdlucmfwygpbvkxqjz"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json. The vocabulary is at least 261."""
    if vocab_size < NUM_BYTE_TOKENS:
        raise ValueError(f"a byte-level vocabulary has at least {NUM_BYTE_TOKENS} tokens, not {vocab_size}")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(product(_LETTERS, _LETTERS))[: vocab_size - NUM_BYTE_TOKENS]
    words = [*SPECIAL, *letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = {"special_tokens_map.json": names,
             "tokenizer_config.json": {**names, "tokenizer_class": "PreTrainedTokenizerFast",
                                       "clean_up_tokenization_spaces": False}}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
