"""Every error a user can meet, in one tree, each with the remedy beside the complaint.

FlexrunError
├── ConfigError         a flag, policy or config value that cannot work
├── UnsupportedError    a model, option or format flexrun does not run (never run wrongly)
├── CheckpointError     a damaged, incomplete or mismatching model file
├── TokenizerError      a tokenizer or chat template that cannot be read or applied
├── RequestError        one bad prompt line or request; never fails the batch
├── BudgetError         a tier would exceed its byte budget
└── ExecutionError      a lane failed while a job was running (read error, short read, ...)
"""

from __future__ import annotations


class FlexrunError(Exception):
    """Base class. ``str(error)`` is the complaint; ``error.hint`` is what to do about it."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class ConfigError(FlexrunError):
    pass


class UnsupportedError(FlexrunError):
    pass


class CheckpointError(FlexrunError):
    pass


class TokenizerError(FlexrunError):
    pass


class RequestError(FlexrunError):
    """A request that cannot be served; ``code`` is the short machine-readable reason."""

    def __init__(self, message: str, hint: str | None = None, code: str = "invalid_request"):
        super().__init__(message, hint)
        self.code = code


class BudgetError(FlexrunError):
    pass


class ExecutionError(FlexrunError):
    pass
