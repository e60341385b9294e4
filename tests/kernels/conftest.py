"""The targets of this machine that kernels are tested on."""

from __future__ import annotations

import platform

import pytest

from tensorwright.errors import IncompatibleEngineError
from tensorwright.kernels.cpu.targets import TARGETS, check_target, resolve_target
from tensorwright.kernels.interface import Target

AVX2_VNNI = "AVX2 with VNNI"  # what "native" is on CPUs of that kind
NAMES = ("native", "x86-64-v4", AVX2_VNNI, "x86-64-v3", "portable") if platform.machine() == "x86_64" else \
    ("native", "portable")


@pytest.fixture(scope="session", params=NAMES)
def target(request: pytest.FixtureRequest) -> Target:
    """Each in turn; one that this CPU cannot run is skipped."""
    base = TARGETS["x86-64-v3"]
    found = resolve_target(request.param) if request.param != AVX2_VNNI else \
        Target("native", "x86_64", (*base.flags, "-mavxvnni"), (*base.features, "avx_vnni"))
    try:
        check_target(found)
    except IncompatibleEngineError as error:
        pytest.skip(error.message)
    return found
