"""Prints what `bench` measured: the machine's limits, speeds with their shares of them, and profiles."""

from __future__ import annotations

from dataclasses import dataclass

from tensorwright.cli.bench import Measurement, Speed
from tensorwright.cli.tables import format_bytes, format_seconds, print_table


@dataclass(frozen=True)
class Units:
    """What bytes and operations per second are shown in, and what the multiplied numbers are called by their bits."""

    scale: float
    rate: str
    operations: str
    names: dict[int, str]
    decimals: int


CPU = Units(1e9, "GB/s", "GOP/s", {4: "int4 × int8", 8: "int8 × int8", 16: "int16 × int16", 32: "float32"}, 1)
GPU = Units(1e12, "TB/s", "TFLOP/s", {32: "float16 matrix product"}, 2)


def print_measurement(result: Measurement) -> None:
    """The tables."""
    units = CPU if result.device is None else GPU
    where = f"{result.threads} threads" if result.device is None else result.device
    rates = {units.names[bits]: f"{rate / units.scale:.0f} {units.operations}"
             for bits, rate in (result.arithmetic_operations_s or {}).items()}
    memory = [] if result.device_bytes is None else [("memory taken on the GPU", format_bytes(result.device_bytes))]
    print_table(f"{result.engine_dir}: target {result.target}, {where}, prompts of {result.input_len} tokens, "
                f"{result.output_len} new tokens", [
                    ("load", format_seconds(result.load_s)), ("peak memory", format_bytes(result.peak_rss_bytes)),
                    *memory,
                    ("limit: memory",
                     f"{result.bandwidth_bytes_s / units.scale:.{units.decimals}f} {units.rate} read"),
                    *((f"limit: {name}", rate) for name, rate in rates.items())])
    if not rates:
        print("  This engine has no probe for arithmetic: shares are of memory alone. To mend that: "
              f"tensorwright build --rebuild_kernels {result.engine_dir}")
    prefill = result.prefill
    print_table("", [("prefill", f"{prefill.ttft_ms:.1f}", f"{prefill.tok_s:.0f}", *_rates(prefill, units)),
                     *((f"decode, batch {d.batch}", f"{d.tpot_ms:.2f}", f"{d.tok_s:.1f}", *_rates(d, units))
                       for d in result.decode)],
                header=("", "TTFT or TPOT, ms", "tokens/s", units.rate, units.operations, "of memory",
                        "of arithmetic"))
    for profile in result.profile:
        if result.device is None:
            from tensorwright.cli.profile import print_profile

            print_profile(profile)
        else:
            from tensorwright.cli.gpu_profile import print_gpu_profile

            print_gpu_profile(profile)


def _rates(speed: Speed, units: Units) -> tuple[str, ...]:
    arithmetic = "–" if speed.share_of_arithmetic is None else f"{speed.share_of_arithmetic:.0%}"
    return (f"{speed.bytes_s / units.scale:.{units.decimals}f}",
            f"{speed.operations_s / units.scale:.{units.decimals if units is GPU else 0}f}",
            f"{speed.share_of_bandwidth:.0%}", arithmetic)
