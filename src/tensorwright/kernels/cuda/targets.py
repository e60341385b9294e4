"""The GPUs that engines are built for. It knows compute capabilities; it loads the driver only to ask what is here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorwright.errors import IncompatibleEngineError, UsageError
from tensorwright.kernels.interface import Target

ARCHITECTURE = "cuda"
DEVICE = Path("/dev/nvidia0")
# Shared memory that one block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_BYTES: Mapping[str, int] = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_120": 99 << 10}
# Of the GPUs whose kernels take one block on each for a whole step (H100 and H200 SXM).
PROCESSORS: Mapping[str, int] = {"sm_90": 132}
TARGET_NAMES = tuple(SHARED_BYTES)


def resolve_target(name: str) -> Target:
    """The target of that name; "native" is the GPU of this machine.

    Raises:
        UsageError: no such target, or no GPU here that engines are built for.
    """
    if name == "native":
        name = f"sm_{capability()}"
    if name not in SHARED_BYTES:
        raise UsageError(f"unknown GPU target {name!r}; expected one of {', '.join(TARGET_NAMES)}")
    # From Hopper on, the instructions that speed lives on are in the architecture's own set, "sm_90a".
    own = "a" if int(name[3:]) >= 90 else ""
    return Target(name, ARCHITECTURE, (f"-arch={name}{own}",), (name + own,))


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, found without loading anything."""
    return DEVICE.exists()


def can_overlap(target: Target) -> bool:
    """Whether a kernel may be launched before its predecessor has ended (programmatic dependent launch)."""
    return int(target.name[3:]) >= 90


def check_target(target: str, *, engine: str = "ENGINE_DIR") -> None:
    """Refuse an engine of another GPU before any of it is loaded: cubins run on their own compute capability.

    Raises:
        IncompatibleEngineError: another GPU, or none.
    """
    here = f"sm_{capability()}"
    if here != target:
        raise IncompatibleEngineError(
            f"the engine was built for {target}; this machine's GPU is {here}",
            mend=f"tensorwright build --checkpoint_dir C --output_dir {engine} --target {here}")


def capability() -> str:
    """The first GPU's compute capability, such as "90".

    Raises:
        IncompatibleEngineError: no driver, or no GPU.
    """
    try:
        from cuda.bindings import driver

        error, = driver.cuInit(0)
    except ImportError as missing:
        raise IncompatibleEngineError(f"the package cuda-bindings is not installed: {missing}",
                                      mend="pip install 'tensorwright[cuda]'") from None
    except RuntimeError as missing:  # no libcuda
        raise IncompatibleEngineError(f"this machine has no NVIDIA driver: {missing}",
                                      mend="run it on a machine with a GPU, or build for --target cpu") from None
    found, device = driver.cuDeviceGet(0) if int(error) == 0 else (error, None)
    if int(found) != 0:
        raise IncompatibleEngineError(f"the CUDA driver finds no GPU here ({found!r})", mend="nvidia-smi")
    names = driver.CUdevice_attribute
    numbers = [driver.cuDeviceGetAttribute(attribute, device)[1] for attribute in (
        names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)]
    return "".join(map(str, numbers))
