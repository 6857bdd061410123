"""Exit codes of the commands and of a job's process, so that a supervisor knows what to do next.

A process that was fenced must not be started again: another one owns the state by now, and two
supervised copies would fence each other for ever.
"""

from __future__ import annotations

import signal
from enum import IntEnum

from operators.report import JobOutcome, JobResult
from statebackend import FencedError

__all__ = ["ExitCode", "exit_code_of", "exit_code_of_result"]


class ExitCode(IntEnum):
    """What a supervisor does next.

    DONE: nothing, also after SIGTERM, for which a job takes its last checkpoint; FAILED: start it again when the cause
    is gone; USAGE; FENCED: leave it; INTERRUPTED by Ctrl-C.
    """

    DONE = 0
    FAILED = 1
    USAGE = 2
    FENCED = 3
    INTERRUPTED = 130


def exit_code_of_result(result: JobResult) -> ExitCode:
    """The exit code of a process whose job ended with this result."""
    asked = result.signal == signal.SIGTERM or result.savepoint is not None
    return ExitCode.DONE if asked or result.outcome is JobOutcome.FINISHED else ExitCode.INTERRUPTED


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code of a process that ends with this error."""
    if isinstance(error, FencedError):
        return ExitCode.FENCED
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.FAILED
