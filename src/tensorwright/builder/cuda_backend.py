"""The builder's side of GPU targets: CUDA C++ through NVRTC into cubins, and launches as data beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorwright.builder.backends import Compiled, Report
from tensorwright.builder.clock import Case, Stopwatch, op_cases
from tensorwright.builder.decode_steps import LAYERS, Choice, choose_stretches, step_cases
from tensorwright.builder.passes import PASSES, Pass
from tensorwright.builder.plan import Plan
from tensorwright.builder.tune import CacheFiles, Tuning, tune
from tensorwright.errors import EngineError, IncompatibleEngineError
from tensorwright.kernels.cuda.compile import compile_modules, nvrtc_version, program_text
from tensorwright.kernels.cuda.launch import GpuSource, to_json
from tensorwright.kernels.cuda.linear import FLOAT8_ROWS, FLOAT8_TARGETS
from tensorwright.kernels.cuda.prefill import prefill_stretches
from tensorwright.kernels.cuda.prefill_ranks import rank_prefill_stretches
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.cuda.sample import step_sources
from tensorwright.kernels.cuda.targets import can_overlap, check_target, resolve_target
from tensorwright.kernels.interface import Kernel, Source, Target, symbols
from tensorwright.program.program import Program

SHIPPED = Path(__file__).parent / "timings"  # one file for each GPU that was measured


class CudaBackend:
    """`builder.backends.Backend` for NVIDIA GPUs."""

    kernels: Sequence[Kernel] = KERNELS
    passes: Sequence[tuple[str, Pass]] = PASSES
    rounds_activations = False

    def float8_rows(self, target: Target) -> int:
        """Where steps are bound by products, and a library for them has been measured."""
        return FLOAT8_ROWS if target.name in FLOAT8_TARGETS else 0

    def resolve_target(self, name: str) -> Target:
        """See `kernels.cuda.targets`."""
        return resolve_target(name)

    def facts(self, target: Target) -> Mapping[str, Any]:
        """NVRTC's version."""
        return {"nvrtc": nvrtc_version()}

    def compile(self, plan: Plan) -> Compiled:
        """Cubins one after the other; where each begins, its kernels, and each entry point's launches."""
        sources = {symbol: source for symbol, source in zip(symbols(plan.sources), plan.sources, strict=True)
                   if isinstance(source, GpuSource)}
        sources |= step_sources(plan.program)
        layouts = _layouts(plan)
        choices = choose_stretches(plan.program, plan.target, layouts, plan.tuning.timings)
        stretches = [*(stretch for choice in choices for stretch in choice.stretches),
                     *prefill_stretches(plan.program, plan.target, layouts),
                     *rank_prefill_stretches(plan.program, plan.target, layouts)]
        sources |= {stretch.entry: stretch.source for stretch in stretches}
        modules = compile_modules(sources.values(), plan.target)
        code, starts = b"", []
        for module in modules:
            starts.append(len(code))
            code += module.cubin + b"\0" * (-len(module.cubin) % 64)
        functions = {name: {"module": index, **asdict(function)} for index, module in enumerate(modules)
                     for name, function in module.functions.items()}
        return Compiled(code, {
            "flags": list(plan.target.flags), "nvrtc": nvrtc_version(), "overlap": can_overlap(plan.target),
            "modules": [[start, len(module.cubin)] for start, module in zip(starts, modules, strict=True)],
            "stretches": [{"begin": s.begin, "end": s.end, "tokens": s.tokens, "processors": s.processors,
                           "window": s.window, "least": s.least, "entry": s.entry} for s in stretches],
            "functions": functions, "entries": {symbol: to_json(source) for symbol, source in sources.items()}},
            [_facts(choices, plan)] if choices else [])

    def can_measure(self, target: Target) -> bool:
        """Whether this machine's GPU is the target's, and what runs engines is installed."""
        try:
            check_target(target.name)
        except IncompatibleEngineError:
            return False
        return find_spec("torch") is not None

    def tune(self, programs: Iterable[Program], target: Target, *, measure: bool, files: CacheFiles,
             report: Report) -> Tuning:
        """See `builder.tune`. Builds for another machine's GPU take the times that come with the package.

        A GPU that cannot be measured, such as a full one, costs the times and not the build.
        """
        every, shipped = list(programs), sorted(SHIPPED.glob(f"{target.name}*.json"))
        try:
            return tune(every, target, GpuClock(measure), measure=measure, files=files, report=report, shipped=shipped)
        except (EngineError, RuntimeError) as error:  # of the driver, or of torch
            if not measure:
                raise
            without = tune(every, target, GpuClock(False), measure=False, files=files, report=report, shipped=shipped)
            return replace(without, notes=(*without.notes, f"tactics could not be measured: {error}"))


class GpuClock:
    """`builder.clock.Clock` for this machine's GPU; where nothing is measured, for none."""

    arithmetic_bits: tuple[int, ...] = (32,)

    def __init__(self, measures: bool) -> None:
        self._measures = measures

    def machine(self) -> str:
        """GPU, driver and compiler."""
        from tensorwright.builder.measure_gpu import gpu_name

        return gpu_name()

    def code(self, source: Source) -> str:
        """Headers, compiler, and launches as the manifest holds them."""
        if not isinstance(source, GpuSource):
            return source.function
        return f"{nvrtc_version()} {program_text(source.headers)} {json.dumps(to_json(source))}"

    def cases(self, programs: Iterable[Program], target: Target) -> list[Case]:
        """Ops that have a choice, and decode steps."""
        every, processors = list(programs), 0
        if self._measures:
            from tensorwright.builder.measure_gpu import num_processors

            processors = num_processors()
        return [*op_cases(every, target, KERNELS), *step_cases(every, target, processors)]

    def start(self, cases: Sequence[Case], target: Target) -> Stopwatch:
        """On the current GPU."""
        from tensorwright.builder.measure_gpu import GpuStopwatch

        return GpuStopwatch(cases, target)


def _facts(choices: Sequence[Choice], plan: Plan) -> dict[str, Any]:
    bytes_per_s = None if plan.tuning.limits is None else plan.tuning.limits.bytes_per_s
    return {"name": f"decode step, {LAYERS} layers", "ops": ["step"],
            "picks": [choice.facts(bytes_per_s) for choice in choices]}


def _layouts(plan: Plan) -> dict[str, str]:
    """The layout of each weight: its first op's, as it is packed."""
    layouts: dict[str, str] = {}
    for choice in plan.choices:
        for name in choice.op.weights.values():
            layouts.setdefault(name, choice.tactic.layout)
    return layouts
