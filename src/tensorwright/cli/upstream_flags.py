"""Flags of `trtllm-build` that this builder accepts without needing them, or refuses, with the reason for each.

It knows names, values and reasons of versions 0.8 to 0.20; what the other flags mean is `cli.build`'s to know.
"""

from __future__ import annotations

from tensorwright.cli.options import SWITCH_CHOICES, Parser

SWITCH = tuple(word for word in SWITCH_CHOICES if not word.isdigit())
DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable", "none")
ANY = ()

_OWN_KERNELS = "kernels are chosen from the checkpoint's dtypes"
_ALWAYS_FUSED = "attention is always fused and accumulates in float32"
_IN_CHECKPOINT = "it is decided when converting, and read from the checkpoint"
_DECODER_ONLY = "only decoder-only language models are built"
_ENGINE_CACHE = "a rebuild with other limits links the engine that is there"

WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    # flags, values (none: any), reason
    (("--gemm_plugin", "--gpt_attention_plugin", "--bert_attention_plugin", "--moe_plugin", "--mamba_conv1d_plugin",
      "--identity_plugin", "--weight_only_quant_matmul_plugin", "--weight_only_groupwise_quant_matmul_plugin",
      "--smooth_quant_gemm_plugin", "--qserve_gemm_plugin", "--layernorm_quantization_plugin",
      "--rmsnorm_quantization_plugin", "--lookup_plugin"), DTYPES, _OWN_KERNELS),
    (("--quantize_per_token_plugin", "--quantize_tensor_plugin"), SWITCH, _OWN_KERNELS),
    (("--gemm_swiglu_plugin", "--low_latency_gemm_plugin", "--low_latency_gemm_swiglu_plugin",
      "--fp8_rowwise_gemm_plugin", "--gemm_allreduce_plugin"), DTYPES, _OWN_KERNELS),
    (("--nccl_plugin",), DTYPES, "ranks on CPUs talk over shared memory or MPI"),
    (("--use_fused_mlp",), SWITCH, "gate and up projections are always joined"),
    (("--enable_xqa", "--attention_qk_half_accumulation", "--bert_context_fmha_fp32_acc",
      "--enable_context_fmha_fp32_acc", "--context_fmha_fp32_acc", "--use_context_fmha_for_generation",
      "--multi_block_mode", "--use_fp8_context_fmha"), SWITCH, _ALWAYS_FUSED),
    (("--use_paged_context_fmha",), SWITCH,
     "prefill always reads the paged KV cache; prefix reuse is chosen at run time"),
    (("--paged_state",), SWITCH, "only recurrent models have such a state"),
    (("--reduce_fusion", "--user_buffer", "--use_custom_all_reduce", "--pp_reduce_scatter", "--norm_quant_fusion"),
     SWITCH, "ranks on CPUs have one way to add up"),
    (("--multiple_profiles",), SWITCH, "one engine runs every number of tokens"),
    (("--tp_size", "--pp_size", "--cp_size", "--weight_only_precision"), ANY, _IN_CHECKPOINT),
    (("--gpus_per_node", "--cluster_key"), ANY, "no GPU is used"),
    (("--max_encoder_input_len",), ANY, _DECODER_ONLY),
    (("--lora_ckpt_source", "--lora_target_modules", "--max_lora_rank"), ANY, "it needs --lora_plugin and --lora_dir"),
    (("--builder_opt", "--profile_cache"), ANY, "every tactic is measured; --timing_cache keeps the times"),
    (("--fast_build", "--manage_weights"), SWITCH, _ENGINE_CACHE),
    (("--strongly_typed",), SWITCH, "programs always are"),
    (("--weight_streaming",), SWITCH, "weights are always used from the mapped engine file, and loaded as needed"),
    (("--weight_sparsity",), SWITCH, "weights are used as the checkpoint has them"),
    (("--enable_debug_output",), SWITCH, "the reference executor shows every buffer of a program"),
    (("--visualize_network",), ANY, "`tensorwright inspect ENGINE --program` prints the network"),
    (("--monitor_memory",), SWITCH, "the memory table is always printed"),
)

REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    # flags, values that leave them off, reason
    (("--lora_plugin",), ("disable", "none"), "LoRA adapters are not built in; merge them into the model and convert"),
    (("--lora_dir",), (), "LoRA adapters are not built in; merge them into the model and convert that"),
    (("--speculative_decoding_mode",), ("none",), "speculative decoding is not built in"),
    (("--max_draft_len",), ("0",), "speculative decoding is not built in"),
    (("--streamingllm", "--pos_shift"), ("disable", "false"),
     "sink attention is not built in (it has nothing to do with streaming tokens, which always works)"),
    (("--max_prompt_embedding_table_size", "--max_multimodal_len"), ("0",),
     "prompt tuning and multimodal inputs are not built in"),
    (("--strip_plan",), ("false", "disable"), "an engine holds its weights"),
    (("--auto_parallel",), ("1", "0"), "convert with --tp_size instead"),
    (("--model_cls_file", "--model_cls_name"), (), "model families are data here: models/families.py"),
    (("--model_config",), (), "an engine needs weights; for random ones: tensorwright convert --model_dir DIR "
                              "--output_dir C --dummy_weights, then build --checkpoint_dir C"),
)


def add_upstream_flags(parser: Parser) -> None:
    """Accept every flag of the tables above."""
    for flags, choices, reason in WITHOUT_EFFECT:
        for flag in flags:
            nargs = "*" if choices is ANY else "?"
            parser.add_without_effect(flag, reason=reason, nargs=nargs, choices=choices or None)
    for flags, allowed, reason in REFUSED:
        for flag in flags:
            parser.add_refused(flag, reason=reason, allowed=allowed, nargs="*")
