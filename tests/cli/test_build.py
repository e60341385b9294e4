"""The build command: the guide's line, every spelling of other versions, contradictions, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tensorwright.builder.options import BuildOptions
from tensorwright.cli import build as verb
from tensorwright.cli.main import run_verb
from tensorwright.cli.options import Parser
from tensorwright.cli.upstream_flags import REFUSED, WITHOUT_EFFECT
from tensorwright.errors import UsageError

GUIDE = """
    --checkpoint_dir /checkpoints/mistral-nemo-checkpoint_v01
    --output_dir /engines/mistral-nemo-engine_v01
    --gemm_plugin float16
    --max_batch_size 16
    --context_fmha enable
    --paged_kv_cache enable
    --profiling_verbosity none
    --use_fused_mlp
    --remove_input_padding enable
    --gpt_attention_plugin float16
    --logits_dtype float16
    --paged_state disable
    --gather_all_token_logits
    --max_num_tokens 4096
    --max_input_len 40000
    --max_seq_len 40000
    --enable_xqa enable
    --workers 4
    --use_paged_context_fmha enable
"""


def options_of(line: str, *, checkpoint: str = "--checkpoint_dir C") -> BuildOptions:
    parser = Parser("trtllm-build")
    verb.configure(parser)
    return verb.make_options(parser.parse_args(shlex.split(f"{checkpoint} {line}")))


@pytest.mark.parametrize("dashes", [False, True])
def test_the_guides_line(dashes: bool, capsys: pytest.CaptureFixture[str]) -> None:
    line = " ".join(word.replace("_", "-") if dashes and word.startswith("--") else word for word in GUIDE.split())
    assert options_of(line, checkpoint="") == BuildOptions(
        checkpoint_dir=Path("/checkpoints/mistral-nemo-checkpoint_v01"),
        output_dir=Path("/engines/mistral-nemo-engine_v01"), max_batch_size=16, profiling_verbosity="none",
        logits_dtype="float16", gather_context_logits=True, gather_generation_logits=True, max_num_tokens=4096,
        max_input_len=40000, max_seq_len=40000, workers=4)
    notes = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert notes == ["--gemm_plugin", "--use_fused_mlp", "--gpt_attention_plugin", "--paged_state", "--enable_xqa",
                     "--use_paged_context_fmha"]


@pytest.mark.parametrize(("line", "expected"), [
    ("--max_decoder_seq_len 512", {"max_seq_len": 512}),
    ("--max_seq 512", {"max_seq_len": 512}),
    ("--max_input_len 100 --max_output_len 28", {"max_input_len": 100, "max_seq_len": 128}),
    ("--max_output_len 28", {"max_seq_len": 1052}),
    ("--max_input_len 100 --max_output_len 28 --max_seq_len 128", {"max_input_len": 100, "max_seq_len": 128}),
    ("--gather_context_logits", {"gather_context_logits": True}),
    ("--gather_generation_logits", {"gather_generation_logits": True}),
    ("--remove_input_padding disable", {"remove_input_padding": False}),
    ("--context_fmha disable", {"context_fmha": False}),
    ("--kv_cache_type paged --paged_kv_cache enable", {}),
    ("--kv_cache_type PAGED", {}),
    ("--paged_kv_cache", {}),
    ("--profiling_verbosity detailed", {"profiling_verbosity": "detailed"}),
    ("--tokens_per_block 32", {"tokens_per_block": 32}),
    ("--max_beam_width 4", {"max_beam_width": 4}),
    ("--opt_num_tokens 8", {"opt_num_tokens": 8}),
    ("--exact", {"exact": True}),
    ("--exact disable", {}),
    ("--no_tune", {"no_tune": True}),
    ("--input_timing_cache a --output_timing_cache b", {"input_timing_cache": Path("a"),
                                                        "output_timing_cache": Path("b")}),
    ("--timing_cache a", {"input_timing_cache": Path("a"), "output_timing_cache": Path("a")}),
    ("--target x86-64-v3 --dry_run", {"target": "x86-64-v3", "dry_run": True}),
    ("--lora_plugin disable --max_draft_len 0 --streamingllm disable --auto_parallel 1", {}),
    ("--max_prompt_embedding_table_size 0 --speculative_decoding_mode none", {})])
def test_spellings_that_mean_something(line: str, expected: dict[str, Any]) -> None:
    assert options_of(line) == BuildOptions(checkpoint_dir=Path("C"), **expected)


@pytest.mark.parametrize("line", [
    "--use_fused_mlp enable", "--use_fused_mlp disable", "--gemm_plugin", "--gemm_plugin auto", "--nccl_plugin disable",
    "--strongly_typed", "--builder_opt 3", "--tp_size 2", "--weight_only_precision int4", "--multi_block_mode",
    "--use_custom_all_reduce disable", "--multiple_profiles enable", "--reduce_fusion enable", "--fast_build",
    "--enable_context_fmha_fp32_acc", "--use_context_fmha_for_generation", "--profile_cache model.cache",
    "--lora_target_modules attn_q attn_k", "--max_lora_rank 64", "--gpus_per_node 8", "--cluster_key L40",
    "--weight_streaming", "--visualize_network", "--monitor_memory", "--moe_plugin auto",
    "--bert_attention_plugin auto",
    "--use_fp8_context_fmha disable", "--user_buffer disable", "--max_encoder_input_len 1024",
    "--enable_debug_output", "--gemm_swiglu_plugin fp8", "--kv_cache_type continuous", "--paged_kv_cache disable"])
def test_spellings_without_effect_say_so_in_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert options_of(line) == BuildOptions(checkpoint_dir=Path("C"))
    printed = capsys.readouterr().err
    assert printed.startswith("note: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("line", [
    "--lora_plugin float16", "--lora_dir A B", "--speculative_decoding_mode medusa", "--max_draft_len 4",
    "--streamingllm enable", "--strip_plan", "--auto_parallel 4", "--model_config X.json", "--model_cls_name Foo",
    "--max_multimodal_len 100", "--gemm_plugin float17", "--context_fmha maybe", "--kv_cache_type ring",
    "--logits_dtype bfloat16", "--profiling_verbosity all", "--log_level loud", "--max_batch_size many",
    "--max_batch_sise 3", "--enable_xqa yes"])
def test_what_is_refused_exits_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options_of(line)
    assert stopped.value.code == 2
    assert line.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(("line", "message"), [
    ("--kv_cache_type continuous --paged_kv_cache enable", "contradicts"),
    ("--kv_cache_type paged --paged_kv_cache disable", "contradicts"),
    ("--kv_cache_type disabled", "disabled is not supported"),
    ("--max_input_len 100 --max_output_len 28 --max_seq_len 200", "which makes it 128"),
    ("--timing_cache a --output_timing_cache b", "contradicts --output_timing_cache b"),
    ("--rebuild_kernels E", "exclude each other")])
def test_contradictions(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options_of(line)


def test_neither_checkpoint_nor_engine() -> None:
    with pytest.raises(UsageError, match="--checkpoint_dir is missing"):
        options_of("", checkpoint="")


def test_rebuilding_kernels_is_in_place_unless_said_otherwise() -> None:
    assert options_of("--rebuild_kernels E", checkpoint="").output_dir == Path("E")
    assert options_of("--rebuild_kernels E --output_dir F", checkpoint="").output_dir == Path("F")


def test_no_flag_is_in_two_tables() -> None:
    flags = [flag for table in (WITHOUT_EFFECT, REFUSED) for names, _, _ in table for flag in names]
    assert len(flags) == len(set(flags))


def test_a_build_config_replaces_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"build_config": {
        "max_input_len": 100, "max_seq_len": 128, "max_batch_size": 3, "max_beam_width": 1, "max_num_tokens": 128,
        "opt_num_tokens": None, "kv_cache_type": "PAGED", "gather_context_logits": True, "strongly_typed": True,
        "exact": True, "speculative_decoding_mode": 1, "max_draft_len": 0,
        "plugin_config": {"tokens_per_block": 32, "remove_input_padding": False, "gemm_plugin": "float16"}}}))
    assert options_of(f"--build_config {path} --max_batch_size 99 --logits_dtype float16") == BuildOptions(
        checkpoint_dir=Path("C"), max_input_len=100, max_seq_len=128, max_batch_size=3, max_num_tokens=128,
        gather_context_logits=True, tokens_per_block=32, remove_input_padding=False, logits_dtype="float16", exact=True)
    assert "2 other settings" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    "no json", "[]", '{"max_batch_size": "8"}', '{"max_batch_size": true}', '{"gather_context_logits": 1}',
    '{"kv_cache_type": "ring"}', '{"max_draft_len": 4}', '{"plugin_config": {"lora_plugin": "float16"}}',
    '{"plugin_config": 3}', '{"profiling_verbosity": "all"}', '{"speculative_decoding_mode": 2}'])
def test_a_bad_build_config_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"b\.json"):
        options_of(f"--build_config {path}")


def test_a_missing_build_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        options_of(f"--build_config {tmp_path}/none.json")


def test_a_missing_checkpoint_is_an_error_and_not_a_traceback(tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    status = run_verb("build", ["--checkpoint_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "e")])
    assert status == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
