"""Results in files: token ids, log probabilities, logits. It knows the forms that scripts around run.py read.

Missing parent folders are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwright.cli.files import check_place, write_whole
from tensorwright.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tensorwright.engine.limits import Limits
    from tensorwright.runtime.results import Result


@dataclass(frozen=True)
class Files:
    """The files asked for; None is not asked for."""

    csv: Path | None = None
    npy: Path | None = None
    logits: Path | None = None  # base name of two files
    log_probs: Path | None = None
    cum_log_probs: Path | None = None

    @property
    def replaces_text(self) -> bool:
        """Whether token ids go to a file, so that no text is printed."""
        return self.csv is not None or self.npy is not None

    def check(self, limits: Limits) -> None:
        """Raise, before anything runs, when a file cannot be written or the engine keeps no logits."""
        if self.logits is not None and not (limits.gather_context_logits or limits.gather_generation_logits):
            raise UsageError(
                "--output_logits_npy needs an engine that keeps logits, and this one was built without",
                mend="tensorwright build --checkpoint_dir C --output_dir E --gather_all_token_logits",
            )
        for path in (self.csv, self.npy, self.logits and _logits_file(self.logits, "context"), self.log_probs,
                     self.cum_log_probs):
            if path is not None:
                check_place(path)


def write_files(files: Files, results: Sequence[Result], pad_id: int) -> list[str]:
    """Write what was asked for; returns a line for each file.

    Token files: a row of int32 per sequence, prompt and output, padded with `pad_id` to the longest. Log probabilities:
    float32 [prompts, sequences, longest output], padded with 0. Logits: float32, `<base>_context.npy` [tokens of all
    prompts, vocabulary] and `<base>_generation.npy` [sequences, longest output, vocabulary], padded with 0.
    """
    import numpy as np

    written: list[str] = []

    def save(path: Path, array: NDArray[Any], what: str) -> None:
        write_whole(path, lambda file: np.save(file, array))
        written.append(f"{what}: {path} {list(array.shape)}")

    if files.replaces_text:
        rows = _padded([[*r.prompt_token_ids, *s.token_ids] for r in results for s in r.sequences], pad_id, "int32")
        if files.csv is not None:
            text = "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
            write_whole(files.csv, lambda file: file.write(text.encode()))
            written.append(f"token ids: {files.csv} {list(rows.shape)}")
        if files.npy is not None:
            save(files.npy, rows, "token ids")
    if files.log_probs is not None:
        log_probs = _padded([list(s.log_probs or ()) for r in results for s in r.sequences], 0, "float32")
        save(files.log_probs, log_probs.reshape(len(results), -1, log_probs.shape[1]), "log probabilities")
    if files.cum_log_probs is not None:
        sums = np.array([[s.cumulative_log_prob for s in r.sequences] for r in results], np.float32)
        save(files.cum_log_probs, sums, "cumulative log probabilities")
    if files.logits is not None:
        for name, array in _logits(results).items():
            save(_logits_file(files.logits, name), array, f"{name} logits")
    return written


def _logits_file(base: Path, name: str) -> Path:
    return base.with_name(f"{base.name}_{name}.npy")


def _logits(results: Sequence[Result]) -> dict[str, NDArray[Any]]:
    import numpy as np

    context = [r.context_logits for r in results if r.context_logits is not None]
    generated = [s.generation_logits for r in results for s in r.sequences if s.generation_logits is not None]
    found = {"context": np.concatenate(context).astype(np.float32)} if context else {}
    if generated:
        longest = max(len(rows) for rows in generated)
        found["generation"] = np.zeros((len(generated), longest, generated[0].shape[1]), np.float32)
        for target, rows in zip(found["generation"], generated, strict=True):
            target[: len(rows)] = rows
    return found


def _padded(rows: Sequence[Sequence[float]], pad: int, dtype: str) -> NDArray[Any]:
    import numpy as np

    table = np.full((len(rows), max(map(len, rows), default=0)), pad, dtype)
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return table
