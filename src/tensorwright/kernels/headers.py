"""Kernel headers written out into one source file, which then compiles by itself. It knows no compiler."""

from __future__ import annotations

import re
from pathlib import Path


def inlined(folder: Path, name: str, seen: set[str]) -> str:
    """The text of the folder's header with its own includes written out, each once; `seen` takes what was written."""
    if name in seen:
        return ""
    seen.add(name)
    lines = [f'#line 1 "{name}"\n']
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        if include := re.fullmatch(r'\s*#include "([\w./]+)".*', line):
            lines.append(f'{inlined(folder, include.group(1), seen)}#line {number + 1} "{name}"\n')
        else:
            lines.append("\n" if line.strip() == "#pragma once" else f"{line}\n")
    return "".join(lines)
