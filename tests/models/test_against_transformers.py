"""The reference for models is transformers: logits of every family, in float32 and with rounded weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.engine.engine import Engine
from tensorwright.program.reference import dequantize
from tensorwright.runtime.executor import CpuExecutor
from tensorwright.testing.compare import prompt_batch, relative_error, root_mean_square_error
from tensorwright.testing.engines import Recipe, build_engine
from tensorwright.testing.tiny import TinyModel, write_model

torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (pip install 'tensorwright[dev]')")
transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'tensorwright[dev]')")

PROMPT = [1, 45, 300, 7, 7, 211, 90, 12, 305, 64, 33, 128, 19, 250, 3, 77, 101, 6, 280, 54, 9, 31, 5, 160]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

FAMILIES = {
    "llama 2": TinyModel("llama", num_kv_heads=4),
    "llama 3, tied, rope scaling": TinyModel("llama", tied_embeddings=True, rope_scaling=LLAMA3, rope_theta=500000.0),
    "llama, linear rope, biases": TinyModel("llama", rope_scaling={"rope_type": "linear", "factor": 2.0},
                                            attention_bias=True, mlp_bias=True),
    "llama, yarn": TinyModel("llama", rope_scaling=YARN),
    "mistral, sliding window": TinyModel("mistral", sliding_window=9),
    "mistral-nemo: heads wider than hidden": TinyModel("mistral", head_size=64, rope_theta=1e6),
    "mistral, head of 20, other sizes": TinyModel("mistral", hidden_size=72, num_heads=6, num_kv_heads=3, head_size=20,
                                                  intermediate_size=100, vocab_size=333),
    "qwen2": TinyModel("qwen2"),
    "qwen2, tied, window in later layers": TinyModel("qwen2", tied_embeddings=True, sliding_window=8,
                                                     max_window_layers=1),
    "qwen3": TinyModel("qwen3", head_size=48),
    "qwen3, tied, biases": TinyModel("qwen3", tied_embeddings=True, attention_bias=True, config_style=4),
}


def their_model(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def their_logits(model: Any, token_ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([token_ids])).logits[0].numpy())


def our_logits(engine_dir: Path, token_ids: list[int], chunk: int | None = None) -> NDArray[np.float32]:
    """Logits of every position, the prompt in one piece or in chunks."""
    engine = Engine.open(engine_dir)
    executor = CpuExecutor(engine, num_blocks=8, threads=2)
    parts, done = [], 0
    while done < len(token_ids):
        upto = min(len(token_ids), done + (chunk or len(token_ids)))
        batch = prompt_batch(token_ids[:upto], block_size=engine.tokens_per_block, cached=done, first_block=2)
        parts.append(executor.execute(batch).copy())
        done = upto
    return np.concatenate(parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_logits_agree_to_a_ten_thousandth(name: str, tmp_path: Path) -> None:
    engine_dir = build_engine(Recipe(FAMILIES[name]), tmp_path)
    wanted = their_logits(their_model(tmp_path / "model"), PROMPT)
    assert relative_error(our_logits(engine_dir, PROMPT), wanted) < 1e-4
    assert relative_error(our_logits(engine_dir, PROMPT, chunk=5), wanted) < 1e-4


@pytest.mark.parametrize(("algorithm", "group_size"), [("W8A16", -1), ("W4A16", 32), ("W4A16", 128), ("W4A16", -1)])
def test_rounded_weights_with_int8_activations_agree_to_a_hundredth(
        algorithm: Any, group_size: int, tmp_path: Path) -> None:
    """The reference computes in float32 with the very codes and scales of the engine, multiplied out.

    The model is initialised as transformers initialises one (std 0.02). What remains is the rounding of activations,
    0.6 % in each linear; it grows with the gain of the layers (docs/accuracy.md).
    """
    recipe = Recipe(TinyModel("mistral"), algorithm=algorithm, group_size=group_size)
    _write_initialised(recipe.model, tmp_path / "model")
    engine_dir = build_engine(recipe, tmp_path)
    model = their_model(tmp_path / "model")
    _put_rounded_weights(model, engine_dir)
    assert root_mean_square_error(our_logits(engine_dir, PROMPT), their_logits(model, PROMPT)) < 1e-2


@pytest.mark.parametrize(("algorithm", "group_size"), [("W8A16", -1), ("W4A16", 32), ("W4A16", 128), ("W4A16", -1)])
def test_rounded_weights_with_float32_activations_agree_to_a_ten_thousandth(
        algorithm: Any, group_size: int, tmp_path: Path) -> None:
    """Built with exact: the codes and scales are the only rounding, and transformers computes with the same."""
    recipe = Recipe(TinyModel("mistral"), algorithm=algorithm, group_size=group_size, build={"exact": True})
    engine_dir = build_engine(recipe, tmp_path)
    model = their_model(tmp_path / "model")
    _put_rounded_weights(model, engine_dir)
    wanted = their_logits(model, PROMPT)
    assert relative_error(our_logits(engine_dir, PROMPT), wanted) < 1e-4
    assert relative_error(our_logits(engine_dir, PROMPT, chunk=5), wanted) < 1e-4


def _write_initialised(tiny: TinyModel, folder: Path) -> None:
    write_model(folder, tiny)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def _put_rounded_weights(model: Any, engine_dir: Path) -> None:
    from tensorwright.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(engine_dir.parent / "checkpoint")
    dtype = "int4" if checkpoint.config.quantization.algorithm == "W4A16" else "int8"
    config = checkpoint.config.model
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    for index, layer in enumerate(model.model.layers):
        def plain(name: str, index: int = index) -> Any:
            tensor = checkpoint.tensor(0, f"transformer.layers.{index}.{name}")
            return torch.from_numpy(dequantize(tensor.values, tensor.scales, dtype))

        qkv = plain("attention.qkv").split((q, kv, kv))
        targets = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
                   layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        values = (*qkv, *(plain(n) for n in ("attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")))
        for target, value in zip(targets, values, strict=True):
            target.weight.data = value


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_and_caches_stay_close(dtype: Any, tmp_path: Path) -> None:
    """The same rounded weights in transformers; the 16-bit cache costs up to 2^-8 of a key or value in bfloat16."""
    model = replace(TinyModel("llama"), dtype=dtype)
    engine_dir = build_engine(Recipe(model, dtype=dtype), tmp_path)
    wanted = their_logits(their_model(tmp_path / "model"), PROMPT)
    assert relative_error(our_logits(engine_dir, PROMPT), wanted) < (2e-3 if dtype == "float16" else 1.5e-2)


def test_int8_cache_stays_close(tmp_path: Path) -> None:
    engine_dir = build_engine(Recipe(TinyModel("llama"), int8_kv_cache=True), tmp_path)
    wanted = their_logits(their_model(tmp_path / "model"), PROMPT)
    assert root_mean_square_error(our_logits(engine_dir, PROMPT), wanted) < 2e-2


def test_greedy_tokens_are_equal_in_float32(tmp_path: Path) -> None:
    from tensorwright.runtime.llm import LLM
    from tensorwright.runtime.parameters import SamplingParameters

    engine_dir = build_engine(Recipe(TinyModel("mistral", head_size=64)), tmp_path)
    model = their_model(tmp_path / "model")
    mask = torch.ones(1, len(PROMPT), dtype=torch.long)
    tokens = model.generate(torch.tensor([PROMPT]), attention_mask=mask, max_new_tokens=30, do_sample=False,
                            eos_token_id=None, pad_token_id=0)[0]
    wanted = tokens[len(PROMPT):].tolist()
    given = LLM(engine_dir).generate([PROMPT], SamplingParameters(max_tokens=30, end_ids=()))[0]
    assert list(given.sequences[0].token_ids) == wanted
