"""Exit codes of the commands and of a job's process, so that a supervisor knows what to do next.

A process that was fenced must not be started again: another one owns the state by now, and two
supervised copies would fence each other for ever.
"""

from __future__ import annotations

from enum import IntEnum

from statebackend import FencedError

__all__ = ["ExitCode", "exit_code_of"]


class ExitCode(IntEnum):
    """DONE; FAILED: start it again when the cause is gone; USAGE; FENCED: leave it; INTERRUPTED by Ctrl-C."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    FENCED = 3
    INTERRUPTED = 130


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code of a process that ends with this error."""
    if isinstance(error, FencedError):
        return ExitCode.FENCED
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.FAILED
