"""Writes a Llama or Mistral shape with random weights as GGUF: Q4_0, and Q8_0 for lm_head. Needs `gguf`, no model.

    python write_gguf.py config.json model.gguf

Blocks are drawn as the file stores them, so that nothing has to be quantised; time does not depend on their values.
All tensors of a kind begin with the same blocks: one buffer serves them all. There is no tokenizer, only token ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

BLOCK = 32  # weights to a scale
CODE_BYTES = {gguf.GGMLQuantizationType.Q4_0: 16, gguf.GGMLQuantizationType.Q8_0: 32}
STEP = {gguf.GGMLQuantizationType.Q4_0: 4e-3, gguf.GGMLQuantizationType.Q8_0: 2.5e-4}  # weights of about 0.02


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every matrix, in llama.cpp's words."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "token_embd", config["vocab_size"], hidden
    for layer in range(config["num_hidden_layers"]):
        for name, outputs, inputs in (("attn_q", heads * head, hidden), ("attn_k", kv_heads * head, hidden),
                                      ("attn_v", kv_heads * head, hidden), ("attn_output", hidden, heads * head),
                                      ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
                                      ("ffn_down", hidden, inner)):
            yield f"blk.{layer}.{name}", outputs, inputs
    yield "output", config["vocab_size"], hidden


def random_blocks(kind: gguf.GGMLQuantizationType, num_weights: int) -> npt.NDArray[np.uint8]:
    """Blocks of 32 weights: a 16-bit scale and the codes, [blocks, bytes of a block]."""
    blocks = np.empty((num_weights // BLOCK, 2 + CODE_BYTES[kind]), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(STEP[kind]).tobytes(), np.uint8)
    blocks[:, 2:] = np.random.default_rng(0).integers(0, 256, (len(blocks), CODE_BYTES[kind]), np.uint8)
    return blocks


def write(config: dict[str, Any], output: Path) -> None:
    """The whole file; it appears under its name when it is complete."""
    writer = gguf.GGUFWriter(aside := output.with_name(f".{output.name}.part"), "llama")
    _add_facts(writer, config)
    matrices = list(shapes(config))
    largest = max(outputs * inputs for _, outputs, inputs in matrices)
    kinds = {name: gguf.GGMLQuantizationType.Q8_0 if name == "output" else gguf.GGMLQuantizationType.Q4_0
             for name, _, _ in matrices}
    buffers = {kind: random_blocks(kind, largest) for kind in CODE_BYTES}
    for name, outputs, inputs in matrices:
        rows = buffers[kinds[name]][:outputs * inputs // BLOCK].reshape(outputs, -1)
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=kinds[name])
    ones = np.ones(config["hidden_size"], np.float32)
    for layer in range(config["num_hidden_layers"]):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.replace(output)


def _add_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
