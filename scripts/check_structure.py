"""Checks what keeps the code readable: imports between folders, file lengths. `--lines` prints lines per folder."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tensorwright"
MAX_LINES = 400
EVERYTHING = {"program", "quantization", "models", "kernels", "engine", "checkpoint", "builder", "runtime", "serve",
              "cli", "testing"}
ALLOWED: dict[str, set[str]] = {
    "program": set(),
    "quantization": set(),
    "models": {"program"},
    "kernels": {"program"},
    "engine": {"program"},
    "checkpoint": {"models", "quantization"},
    "builder": {"program", "quantization", "models", "kernels", "engine", "checkpoint"},
    "runtime": {"program", "engine", "kernels"},
    "serve": {"runtime", "engine"},
    "cli": EVERYTHING,
    "testing": EVERYTHING,
}
SUFFIXES = (".py", ".h", ".cpp", ".cuh")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def problems(package: Path = PACKAGE) -> list[str]:
    """One line for each import that is not allowed and each file that is too long."""
    found = []
    for path in sorted(package.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > MAX_LINES:
            found.append(f"{path.relative_to(package)}: {length} lines, at most {MAX_LINES}")
        folder = path.relative_to(package).parts[0]
        if path.suffix != ".py" or folder not in ALLOWED:
            continue
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "tensorwright" and len(parts) > 1 and parts[1] in EVERYTHING - ALLOWED[folder] - {folder}:
                found.append(f"{path.relative_to(package)}:{line}: {folder} may not import {parts[1]}")
    return found


def print_lines(package: Path = PACKAGE) -> None:
    """Files, lines and the longest file of each folder."""
    folders = sorted(path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__")
    total = 0
    print(f"{'folder':<14}{'files':>6}{'lines':>8}{'longest':>9}")
    for folder in [*folders, package]:
        files = [p for p in (folder.glob("*") if folder == package else folder.rglob("*")) if p.suffix in SUFFIXES]
        lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
        name = "(top)" if folder == package else folder.name
        print(f"{name:<14}{len(files):>6}{sum(lengths):>8}{max(lengths, default=0):>9}")
        total += sum(lengths)
    print(f"{'all':<14}{'':>6}{total:>8}")


if __name__ == "__main__":
    if "--lines" in sys.argv[1:]:
        print_lines()
    else:
        found = problems()
        print("\n".join(found))
        sys.exit(1 if found else 0)
