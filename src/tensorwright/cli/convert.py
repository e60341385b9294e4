"""`tensorwright convert` and `convert_checkpoint.py`: what the flags of all versions mean, and what is printed.

The work is done by `checkpoint.convert`; here the C++ quantiser is compiled and handed in.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwright.cli.options import Parser, note
from tensorwright.errors import BuildError, EngineError, UsageError

if TYPE_CHECKING:
    from tensorwright.checkpoint.convert import Conversion, ConvertOptions, ConvertReport
    from tensorwright.quantization.scheme import Caster, Quantizer

_PRECISIONS = {"int8": "W8A16", "int4": "W4A16"}
_FP8 = "FP8_PER_CHANNEL_PER_TOKEN"
_SUPPORTED = ("supported are plain 16 and 32 bit, --use_weight_only with --weight_only_precision int8 or int4, and "
              "--use_fp8_rowwise")
_SHAPE_FLAGS = {  # flag: (type, default, config.json's field), for a model given by its shape alone
    "n_layer": (int, 32, "num_hidden_layers"), "n_head": (int, 32, "num_attention_heads"),
    "n_kv_head": (int, None, "num_key_value_heads"), "n_embd": (int, 4096, "hidden_size"),
    "inter_size": (int, 11008, "intermediate_size"), "vocab_size": (int, 32000, "vocab_size"),
    "n_positions": (int, 2048, "max_position_embeddings"), "hidden_act": (str, "silu", "hidden_act"),
    "rotary_base": (float, 10000.0, "rope_theta"), "rms_norm_eps": (float, 1e-6, "rms_norm_eps"),
}


def configure(parser: Parser) -> None:
    """All flags of every version of `convert_checkpoint.py`, and our own."""
    parser.add_argument("--model_dir", type=Path, help="Hugging Face model folder")
    parser.add_argument("--output_dir", type=Path, default=Path("tllm_checkpoint"), help="checkpoint folder to write")
    parser.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto",
                        help="of unquantised weights and scales; auto is the model's own, with float16 for float32")
    parser.add_argument("--tp_size", type=int, default=1, help="ranks for tensor parallelism")
    parser.add_argument("--use_weight_only", action="store_true", help="quantise the layers' matrices")
    parser.add_argument("--weight_only_precision", nargs="?", const="int8", metavar="int8|int4",
                        help="with --use_weight_only (default: int8)")
    parser.add_argument("--group_size", type=int, choices=(32, 64, 128, -1),
                        help="inputs per int4 scale; -1 is one scale per output channel (default: 128)")
    parser.add_argument("--use_fp8_rowwise", action="store_true",
                        help="float8 for the layers' matrices, one scale per channel, and for activations, one per "
                             "token (GPUs)")
    parser.add_argument("--use_fp8", action="store_true", help="the same as --use_fp8_rowwise, which is more accurate")
    parser.add_argument("--quantize_lm_head", action="store_true",
                        help="lm_head too: float8 with --use_fp8_rowwise, else int8")
    parser.add_argument("--int8_kv_cache", action="store_true", help="keep keys and values as int8 while running")
    parser.add_argument("--fp8_kv_cache", action="store_true",
                        help="keep keys and values as float8 while running, unscaled (GPUs)")
    parser.add_argument("--dummy_weights", action="store_true",
                        help="random weights from config.json alone, for sizing and benchmarks")
    parser.add_argument("--seed", type=int, default=0, help="of --dummy_weights")
    parser.add_argument("--save_config_only", action="store_true", help="write config.json and no weights")
    shape = parser.add_argument_group("shape of a model without --model_dir (Llama; config.json only, or with "
                                      "--dummy_weights)")
    for name, (kind, default, _) in _SHAPE_FLAGS.items():
        shape.add_argument(f"--{name}", type=kind, help=f"default: {default or 'n_head'}")
    _add_upstream(parser)


def _add_upstream(parser: Parser) -> None:
    for flag in ("--per_channel", "--per_token", "--per_group"):
        parser.add_without_effect(flag, reason="weight-only codes have scales per output channel or group, and "
                                  "activations none; it belongs to SmoothQuant")
    for flag in ("--load_by_shard", "--load_model_on_cpu"):
        parser.add_without_effect(flag, reason="weights are always streamed from the files, block by block")
    parser.add_without_effect("--workers", nargs=1, reason="one process uses all processors, rank after rank")
    for flag in ("--calib_dataset", "--calib_size", "--calib_max_seq_length"):
        parser.add_without_effect(flag, nargs=1, reason="nothing here is calibrated; int8 KV scales are dynamic, fp8's "
                                  "is 1")
    parser.add_without_effect("--use_parallel_embedding", reason="every rank keeps the whole embedding table")
    parser.add_without_effect("--embedding_sharding_dim", nargs=1, reason="every rank keeps the whole embedding table")
    parser.add_without_effect("--use_embedding_sharing", reason="tied embeddings are seen in config.json")
    parser.add_without_effect("--disable_weight_only_quant_plugin", reason="there are no plugins")
    parser.add_without_effect("--log_level", nargs=1, reason="notes are one line each")
    for flag in ("--multiple_of", "--ffn_dim_multiplier"):
        parser.add_without_effect(flag, nargs=1, reason="give --inter_size")
    for flag in ("--pp_size", "--cp_size"):
        parser.add_refused(flag, allowed=("1",), reason="ranks are cut by --tp_size only")
    for flag in ("--moe_tp_size", "--moe_ep_size", "--moe_num_experts", "--moe_top_k", "--moe_renorm_mode"):
        parser.add_refused(flag, allowed=("-1", "0", "1"), reason="models with experts are not supported")
    parser.add_refused("--meta_ckpt_dir", reason="Meta's own files are not read; give the Hugging Face upload")
    parser.add_refused("--remove_duplicated_kv_heads", reason="give an upload without repeated heads")
    parser.add_refused("--quant_ckpt_path", reason=f"quantised checkpoints are not read; {_SUPPORTED}")
    parser.add_refused("--smoothquant", "-sq", "--use_meta_fp8_rowwise_recipe", "--use_qserve", reason=_SUPPORTED)


def main(arguments: argparse.Namespace) -> int:
    """Convert, and say how far the quantised weights are from the model's."""
    from tensorwright import __version__
    from tensorwright.cli.tables import format_clock

    started = time.monotonic()
    print(f"tensorwright {__version__}")
    options = make_options(arguments)
    if arguments.model_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape_config(arguments)), encoding="utf-8")
            options = replace(options, dummy_weights=True)
            _convert(Path(folder), arguments.output_dir, options, arguments.save_config_only
                     or not arguments.dummy_weights)
    else:
        given = [f"--{name}" for name in _SHAPE_FLAGS if getattr(arguments, name) is not None]
        if given:
            note(f"{', '.join(given)}: no effect with --model_dir, whose config.json counts")
        _convert(arguments.model_dir, arguments.output_dir, options, arguments.save_config_only)
    print(f"Total time of converting checkpoints: {format_clock(time.monotonic() - started)}")
    return 0


def make_options(arguments: argparse.Namespace) -> ConvertOptions:
    """What the options mean together. Raises UsageError for what is not supported, with what is."""
    from tensorwright.checkpoint.config import Quantization
    from tensorwright.checkpoint.convert import ConvertOptions

    precision = arguments.weight_only_precision or "int8"
    if precision not in _PRECISIONS:
        raise UsageError(f"--weight_only_precision {precision} is not supported; {_SUPPORTED}",
                         mend="--use_weight_only --weight_only_precision int4")
    algorithm: Any = _algorithm(arguments, _PRECISIONS[precision])
    if arguments.weight_only_precision and not arguments.use_weight_only:
        note("--weight_only_precision has no effect without --use_weight_only: the weights are not quantised")
    if arguments.group_size is not None and algorithm != "W4A16":
        note("--group_size has no effect here: only int4 weights have groups")
    if arguments.int8_kv_cache and arguments.fp8_kv_cache:
        note("--int8_kv_cache has no effect beside --fp8_kv_cache")
    kv_cache: Any = "FP8" if arguments.fp8_kv_cache else "INT8" if arguments.int8_kv_cache else None
    quantization = Quantization(algorithm, arguments.group_size or 128, kv_cache, arguments.quantize_lm_head)
    return ConvertOptions(arguments.dtype, quantization, arguments.tp_size, arguments.dummy_weights, arguments.seed)


def _algorithm(arguments: argparse.Namespace, weight_only: str) -> str | None:
    """Upstream's order: the first that applies."""
    fp8 = [flag for flag in ("use_fp8", "use_fp8_rowwise") if getattr(arguments, flag)]
    if arguments.use_weight_only:
        if fp8:
            note(f"--{fp8[0]} has no effect beside --use_weight_only")
        return weight_only
    if fp8 == ["use_fp8"]:
        note("--use_fp8 is done as --use_fp8_rowwise: a scale per channel costs no time and is more exact")
    return _FP8 if fp8 else None


def shape_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """A config.json from the shape flags."""
    values: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    for name, (_, default, field) in _SHAPE_FLAGS.items():
        given = getattr(arguments, name)
        values[field] = default if given is None else given
    return values


def _convert(model_dir: Path, output_dir: Path, options: ConvertOptions, config_only: bool) -> None:
    from tensorwright.checkpoint.convert import prepare, run
    from tensorwright.cli.progress import Progress

    if config_only:
        _write_config_only(prepare(model_dir, replace(options, dummy_weights=True)), output_dir)
        return
    conversion = prepare(model_dir, options)
    _announce(conversion, output_dir)
    if not options.dummy_weights:
        quantizer, caster = make_quantizer()
        conversion = replace(conversion, options=replace(options, quantizer=quantizer, caster=caster))
    started = time.monotonic()
    with Progress("convert", conversion.report_bytes) as progress:
        report = run(conversion, output_dir, progress.advance)
    _print_result(conversion, report, time.monotonic() - started)


def make_quantizer() -> tuple[Quantizer, Caster]:
    """The C++ quantiser where there is a compiler, else the NumPy reference: the same bits, more slowly."""
    from tensorwright.kernels.cpu.compile import compile_shared
    from tensorwright.kernels.cpu.load import load_library
    from tensorwright.kernels.cpu.targets import resolve_target
    from tensorwright.quantization import native, reference

    try:
        source = native.SOURCE.read_text(encoding="utf-8")
        quantizer = native.NativeQuantizer(load_library(compile_shared(source, resolve_target("native"))))
    except (BuildError, EngineError, UsageError) as cause:
        note(f"weights are quantised by NumPy, about twenty times slower than compiled C++: {cause.message}")
        return reference.quantize, reference.cast
    return quantizer, quantizer.cast


def _write_config_only(conversion: Conversion, output_dir: Path) -> None:
    from tensorwright.checkpoint.convert import write_config

    output_dir.mkdir(parents=True, exist_ok=True)
    if next(output_dir.glob("rank*.safetensors"), None):
        raise UsageError(f"{output_dir} holds weights, which another config.json would not describe",
                         mend=f"--output_dir {output_dir}-config")
    write_config(conversion.plan.config, output_dir)
    print(f"Wrote {output_dir / 'config.json'} and no weights.")


def _announce(conversion: Conversion, output_dir: Path) -> None:
    from tensorwright.cli.tables import format_bytes

    plan = conversion.plan
    model, quantization = plan.config.model, plan.config.quantization
    groups = f", groups of {quantization.group_size}" if quantization.group_size != -1 else ""
    print(f"{model.architecture}, {model.num_layers} layers, {model.dtype}, {quantization.algorithm or 'not quantised'}"
          f"{groups}: {format_bytes(plan.num_bytes)} in {plan.config.tp_size} file(s) to {output_dir}")


def _print_result(conversion: Conversion, report: ConvertReport, elapsed_s: float) -> None:
    import resource

    from tensorwright.cli.tables import format_bytes, format_seconds, print_table

    rows = error_rows(report)
    if rows:
        print_table("Relative error of the weights, |w - q| / |w|", rows, header=("matrix", "all", "worst", "layer"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = conversion.report_bytes / max(elapsed_s, 1e-9)
    print(f"Wrote {format_bytes(report.num_bytes)} in {format_seconds(elapsed_s)} "
          f"({rate / 1e6:.0f} MB/s {'written' if conversion.options.dummy_weights else 'of weights read'}), "
          f"peak memory {format_bytes(peak)}.")


def error_rows(report: ConvertReport) -> list[tuple[str, ...]]:
    """Per kind of matrix: its relative error over all layers, and the worst layer's."""
    from tensorwright.checkpoint.transfer import Distance

    rows: list[tuple[str, ...]] = []
    for kind in dict.fromkeys(kind for kind, _ in report.distances):
        layers = {layer: distance for (name, layer), distance in report.distances.items() if name == kind}
        worst, distance = max(layers.items(), key=lambda item: item[1].relative)
        total = sum(layers.values(), Distance()).relative
        rows.append((kind, f"{total:.5f}", f"{distance.relative:.5f}", "" if worst is None else str(worst)))
    return rows
