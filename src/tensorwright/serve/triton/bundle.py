"""The tritonserver binary inside the package nvidia-pytriton, and what it needs around it. It starts nothing.

pytriton itself is not imported. Its wheel has the server, the Python backend and one stub for each Python version;
the backend wants its stub beside it, and the stub wants the shared libpython of that version.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tensorwright.errors import ServeError

PACKAGE = "nvidia-pytriton"
STUB = "triton_python_backend_stub"
KEPT_VARIABLES = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
INSTALL = "pip install 'tensorwright[triton]'   (Python 3.11 or 3.12)"


@dataclass(frozen=True)
class Bundle:
    """Where the parts lie."""

    server: Path
    libraries: Path  # folder of the shared libraries that the wheel brings
    backend: Path  # folder of the Python backend
    stub: Path  # for the running Python's version


def find_bundle() -> Bundle:
    """The installed bundle.

    Raises:
        ServeError: not installed, not whole, or without a stub for this Python.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ServeError(f"the Triton server is not installed (Python package {PACKAGE})", mend=INSTALL) from None
    root = Path(str(distribution.locate_file("")))
    triton = root / "pytriton" / "tritonserver"
    bundle = Bundle(server=triton / "bin" / "tritonserver", libraries=root / "nvidia_pytriton.libs",
                    backend=triton / "backends" / "python",
                    stub=triton / "python_backend_stubs" / _python_version() / STUB)
    for part in (bundle.server, bundle.libraries, bundle.backend, bundle.stub):
        if not part.exists():
            raise ServeError(f"{PACKAGE} {distribution.version} has no {part}: it is not whole, or not made for Python "
                             f"{_python_version()}", mend=f"{INSTALL} --force-reinstall")
    return bundle


def write_backends(bundle: Bundle, folder: Path) -> None:
    """A backend folder as Triton wants it: the Python backend with this Python's stub beside it."""
    python = folder / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy(bundle.backend / name, python / name)
    shutil.copy(bundle.stub, python / STUB)


def server_environment(bundle: Bundle) -> dict[str, str]:
    """The whole environment of the server: this Python's packages come first on PATH; little else is inherited."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    libraries = [bundle.libraries, *_libpython_folders()]
    return {**kept, "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(str(folder) for folder in libraries)}


def check_python(environment: dict[str, str]) -> None:
    """Refuse a Python that the stub cannot use.

    Raises:
        ServeError: NumPy 2 (this server's backend corrupts inputs with it), no shared libpython, no `python3`.
    """
    version = importlib.metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServeError(f"this Triton server corrupts inputs under NumPy {version}; it needs NumPy below 2",
                         mend="pip install 'numpy<2'   (Python 3.11 or 3.12), or use NVIDIA's current image: "
                              "docs/deploy.md")
    if not (Path(sys.executable).parent / "python3").exists():
        raise ServeError(f"the server looks for `python3`, and there is none beside {sys.executable}",
                         mend="python3 -m venv .venv, and install Tensorwright there")
    library = f"libpython{_python_version()}.so.1.0"
    probe = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({library!r})"]
    if subprocess.run(probe, env=environment, capture_output=True, check=False).returncode != 0:
        raise ServeError(f"the Triton server needs the shared {library}, and this Python has none",
                         mend=f"apt-get install libpython{_python_version()}, or a Python built with --enable-shared")


def _libpython_folders() -> list[Path]:
    folders = [Path(str(sysconfig.get_config_var("LIBDIR"))), Path(sys.base_prefix) / "lib"]
    return [folder for i, folder in enumerate(folders) if folder.is_dir() and folder not in folders[:i]]


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
