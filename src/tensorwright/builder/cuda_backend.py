"""The builder's side of GPU targets: CUDA C++ through NVRTC into cubins, and launches as data beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tensorwright.builder.backends import Compiled, Report
from tensorwright.builder.passes import PASSES, Pass
from tensorwright.builder.plan import Plan
from tensorwright.builder.tune import CacheFiles, Tuning
from tensorwright.kernels.cuda.compile import compile_modules, nvrtc_version
from tensorwright.kernels.cuda.decode_steps import decode_stretches
from tensorwright.kernels.cuda.launch import GpuSource, to_json
from tensorwright.kernels.cuda.registry import KERNELS
from tensorwright.kernels.cuda.sample import GREEDY, greedy_source
from tensorwright.kernels.cuda.targets import can_overlap, resolve_target
from tensorwright.kernels.interface import Kernel, Target, symbols
from tensorwright.program.program import Program


class CudaBackend:
    """`builder.backends.Backend` for NVIDIA GPUs."""

    kernels: Sequence[Kernel] = KERNELS
    passes: Sequence[tuple[str, Pass]] = PASSES
    rounds_activations = False

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
        sources[GREEDY] = greedy_source(plan.program)
        stretches = decode_stretches(plan.program, plan.target, _layouts(plan))
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
                           "window": s.window, "entry": s.entry} for s in stretches],
            "functions": functions, "entries": {symbol: to_json(source) for symbol, source in sources.items()}})

    def can_measure(self, target: Target) -> bool:
        """Nothing is measured on GPUs yet: tactics go by the kernels' estimates."""
        return False

    def tune(self, programs: Iterable[Program], target: Target, *, measure: bool, files: CacheFiles,
             report: Report) -> Tuning:
        """No times."""
        return Tuning()


def _layouts(plan: Plan) -> dict[str, str]:
    """The layout of each weight: its first op's, as it is packed."""
    layouts: dict[str, str] = {}
    for choice in plan.choices:
        for name in choice.op.weights.values():
            layouts.setdefault(name, choice.tactic.layout)
    return layouts
