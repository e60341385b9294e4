"""Flags of `examples/run.py` of any version that do nothing here, or are refused. It knows names and reasons only.

docs/run.md tells the meaning of the others.
"""

from __future__ import annotations

from tensorwright.cli.options import SWITCH_CHOICES, Parser

_ONE_RUNTIME = "there is one runtime"
_GPU = "it chooses between GPU kernels"
_DECODER_ONLY = "only decoder-only text models are run"
_LORA = "LoRA adapters are not applied; merge them into the model and convert that"
_PROMPT_TABLE = "prompt tables are not supported"
_DRAFT = "speculative decoding is not built in; leave it out, the tokens are the same"
_NO_IMAGES = "only text models are run"

SWITCHES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--use_py_session", "--debug_mode"), _ONE_RUNTIME),
    (("--hf_device_map_auto",), "no Hugging Face model is loaded"),
    (("--no_prompt_template",), "no template is applied unless --chat is given"),
    (("--enable_chunked_context",), "long prompts always go in chunks"),
    (("--enable_context_fmha_fp32_acc",), "attention always accumulates in float32"),
    (("--cuda_graph_mode", "--multi_block_mode"), _GPU),
    (("--fail_fast_on_attention_window_too_large",), "the window is the model's"),
)
VALUES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--hf_data_type",), "no Hugging Face model is loaded"),
    (("--tokenizer_type",), "tokenizer.json says what it is"),
    (("--beam_search_diversity_rate",), "no version ever used it"),
    (("--cross_kv_cache_fraction",), _DECODER_ONLY),
    (("--gpu_weights_percent",), "weights are used from the mapped engine file"),
    (("--lora_ckpt_source",), "it needs --lora_dir"),
    (("--eagle_posterior_threshold",), "it needs --eagle_choices"),
)
REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    # flags, values that leave them off, reason
    (("--lora_dir",), (), _LORA),
    (("--lora_task_uids",), ("-1",), _LORA),
    (("--prompt_table_path", "--prompt_tasks", "--num_prepend_vtokens"), (), _PROMPT_TABLE),
    (("--input_token_extra_ids", "--input_token_extra_ids_file"), (), _PROMPT_TABLE),
    (("--multimodal_input_file",), (), _NO_IMAGES),
    (("--language_task_uids", "--language_adapter_uids"), (), _DECODER_ONLY),
    (("--medusa_choices", "--eagle_choices", "--lookahead_config", "--draft_engine_dir"), (), _DRAFT),
    (("--draft_target_model_config", "--prompt_lookup_config"), (), _DRAFT),
    (("--sink_token_length",), ("0",), "attention sinks are not built in"),
    (("--vocab_file",), (), "sentencepiece files are not read; give --tokenizer_dir a folder with tokenizer.json"),
)


def add_upstream_flags(parser: Parser) -> None:
    """Accept every flag of the tables."""
    for flags, reason in SWITCHES:
        for flag in flags:
            parser.add_without_effect(flag, reason=reason, nargs="?", choices=SWITCH_CHOICES)
    for flags, reason in VALUES:
        for flag in flags:
            parser.add_without_effect(flag, reason=reason, nargs=1)
    for flags, allowed, reason in REFUSED:
        for flag in flags:
            parser.add_refused(flag, reason=reason, allowed=allowed, nargs="*")
