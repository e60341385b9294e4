"""A fresh process that opens an engine and gives one token of a 16-token prompt; prints seconds since a given time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tensorwright.runtime.llm import LLM
from tensorwright.runtime.parameters import SamplingParameters


def main(engine: Path, started: float) -> None:
    """`started`: as `time.time()` gave it to the parent, just before this process began."""
    imported = time.time()
    llm = LLM(engine)
    opened = time.time()
    result = llm.generate([list(range(5, 21))], SamplingParameters(max_tokens=1, end_ids=()))[0]
    ended = time.time()
    if result.error is not None:
        raise SystemExit(f"error: {result.error}")
    print(json.dumps({"imports_s": imported - started, "open_s": opened - imported, "first_token_s": ended - opened,
                      "whole_s": ended - started}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
