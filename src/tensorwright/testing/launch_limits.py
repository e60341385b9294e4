"""What a GPU block may have, against what the launches of an engine ask for and the assembler said of their kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorwright.kernels.cuda.launch import Launch, from_json, is_library_call
from tensorwright.kernels.cuda.targets import SHARED_BYTES

THREADS, REGISTERS, REGISTERS_AT_ONCE = 1024, 65536, 256  # of a block; so many of a warp's are given at once
DECLARED_BYTES = 48 << 10  # of shared memory, beside what a launch asks for
FEW_BYTES = 64  # that a kernel may put aside before its loop


def over_limits(facts: Mapping[str, Any], target: str) -> list[str]:
    """What breaks a limit of the target, of a manifest's "kernels"; kernels that no launch names, too."""
    launches = {launch for entry in facts["entries"].values() for launch in from_json(entry).launches
                if not is_library_call(launch.function)}
    unused = set(facts["functions"]) - {launch.function for launch in launches}
    return [*(f"{name} is never launched" for name in sorted(unused)),
            *(f"{launch.function}: {what}" for launch in launches
              for what in _broken(launch, facts["functions"][launch.function], SHARED_BYTES[target]))]


def _broken(launch: Launch, function: Mapping[str, int], shared_bytes: int) -> list[str]:
    of_a_warp = -(-function["registers"] * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    amounts = {"threads": (launch.threads, THREADS), "registers": (of_a_warp * -(-launch.threads // 32), REGISTERS),
               "bytes put aside": (function["spilled_bytes"], FEW_BYTES),
               "declared bytes": (function["shared_bytes"], DECLARED_BYTES),
               "bytes of shared memory": (function["shared_bytes"] + launch.shared_bytes, shared_bytes)}
    return [f"{amount} {what} of {limit}" for what, (amount, limit) in amounts.items() if amount > limit]
