"""Every error that Tensorwright raises on purpose. It knows messages, and nothing of what raises them.

TensorwrightError
├── UsageError            a command line or an argument that cannot be meant
│   └── LimitError        a request over a limit of the engine; the message holds the numbers
├── ModelError            a Hugging Face folder that cannot be converted
├── CheckpointError       a checkpoint folder that is not whole or not understood
├── ProgramError          a program that breaks a rule of `program.verify`
├── BuildError            the builder or the C++ compiler could not finish
├── EngineError           an engine file that is damaged or not an engine
│   └── IncompatibleEngineError   sound, but for another version, machine or number of ranks
├── RanksError            the number of processes is not the engine's number of ranks
└── ServeError            the server could not be written, started or reached

A message says what was wrong and what was expected. `mend`, where there is one, is the next command to run.
"""

from __future__ import annotations


class TensorwrightError(Exception):
    """Base of all errors here. Shown to users as `message`, then `mend` on a line of its own."""

    def __init__(self, message: str, *, mend: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return self.message if self.mend is None else f"{self.message}\n  try: {self.mend}"


class UsageError(TensorwrightError):
    """A command line or an argument that cannot be meant."""


class LimitError(UsageError):
    """A request over a limit of the engine."""


class ModelError(TensorwrightError):
    """A Hugging Face folder that cannot be converted."""


class CheckpointError(TensorwrightError):
    """A checkpoint folder that is not whole or not understood."""


class ProgramError(TensorwrightError):
    """A program that breaks a rule of the verifier: a defect of a pass, not of the user."""


class BuildError(TensorwrightError):
    """The builder or the C++ compiler could not finish."""


class EngineError(TensorwrightError):
    """An engine file that is damaged or is not an engine."""


class IncompatibleEngineError(EngineError):
    """A sound engine for another version, machine or number of ranks."""


class RanksError(TensorwrightError):
    """The number of processes is not the engine's number of ranks."""


class ServeError(TensorwrightError):
    """The server could not be written, started or reached."""
