"""Makes a Llama shape with random weights, and exports it to OpenVINO: int4 symmetric in groups of 128, lm_head int8.

    python export_openvino.py config.json openvino_folder

The way is the one that OpenVINO's users go: transformers, optimum-intel, nncf. It takes about five bytes of memory for
each weight. The tokenizer is one of single bytes, because the pipeline wants one; measurements use token ids.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import openvino
import openvino_tokenizers
import tokenizers
import torch
import transformers
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                                unk_token="<unk>")


def export(config_file: Path, output: Path) -> None:
    """The whole folder; it appears under its name when it is complete."""
    aside = output.with_name(f".{output.name}.part")
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(config_file.parent)
    scheme = OVWeightQuantizationConfig(bits=4, sym=True, group_size=128, ratio=1.0)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        model = OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, quantization_config=scheme)
        model.save_pretrained(aside)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(aside)
    for name, part in zip(("tokenizer", "detokenizer"),
                          openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True), strict=True):
        openvino.save_model(part, aside / f"openvino_{name}.xml")
    aside.replace(output)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
