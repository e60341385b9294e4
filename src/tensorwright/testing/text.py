"""Small real tokenizers, trained here in milliseconds: the two kinds whose decoders differ. They know no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS_ID, END_ID = 1, 2
SENTENCES = ("hi how are you? I'm doing well, thank you.", "héllo wörld 你好 🙂 def f(x):\n    return x + 1\n") * 8
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2, Llama 3, Qwen and Mistral-Nemo have it: any token may be part of a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def metaspace_tokenizer(*, legacy: bool = True, vocab_size: int = 420) -> tokenizers.Tokenizer:
    """Sentencepiece-like BPE with byte fallback: Llama 2's form (`legacy`), or the one with a Metaspace decoder."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token=SPECIAL_TOKENS[0], fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    tokenizer.decoder = decoders.Sequence(steps)
    return _trained(tokenizer, vocab_size, special=[f"<0x{byte:02X}>" for byte in range(256)])


def write_tokenizer(directory: Path, backend: tokenizers.Tokenizer | None = None, **settings: Any) -> Path:
    """A tokenizer's files in `directory`; `settings` go to tokenizer_config.json beside the usual ones."""
    directory.mkdir(parents=True, exist_ok=True)
    (backend or byte_level_tokenizer()).save(str(directory / "tokenizer.json"))
    usual = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps({**usual, **settings}), encoding="utf-8")
    return directory


def _trained(
    tokenizer: tokenizers.Tokenizer,
    vocab_size: int,
    *,
    initial_alphabet: list[str] | None = None,
    special: list[str] | None = None,
) -> tokenizers.Tokenizer:
    """Trained so that no token spans words. Tokens in `special` get low ids, but are ordinary tokens of the model."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *(special or ())],
        initial_alphabet=initial_alphabet or [],
        show_progress=False,
    )
    words = [word for text in SENTENCES for word in text.split(" ")]
    tokenizer.train_from_iterator(words if special else SENTENCES, trainer)
    if special:
        tokenizer = _as_ordinary(tokenizer, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def _as_ordinary(tokenizer: tokenizers.Tokenizer, tokens: list[str]) -> tokenizers.Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in set(tokens)]
    changed: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    return changed
