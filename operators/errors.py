"""The errors of the operators, cut by what the caller does next.

::

    OperatorError
      SourceChangedError      an input is not the one that was read before: restore the file, or start afresh
      SourceNotReplayableError  an input cannot be read again from a position: give it as a factory
      SourceUnavailableError  an input does not answer, or does not let us in: start again when it does
      BadInputError           an input cannot be read at all: mend or remove it; the message names it
      BadEventTimeError       a null or far-future event time: filter the row out, or raise the limit
      SchemaError             columns are missing or of another type: change the query or the data
      UnsupportedQueryError   a part of a SQL query cannot run as a stream: write what the message says
      UserFunctionError       a function of the user raised: mend it; its own error is the cause
      JobMismatchError        the state is that of another program: say what became of its operators, as the message
                              shows, or use another directory (also a SchemaMismatchError)
      SinkOccupiedError       the output directory holds the output of something else: use another one
      OutputVanishedError     committed output is neither staged nor published: it was deleted by someone
      OutputUncertainError    nobody can tell whether committed output was published: look, then say so
      SinkUnavailableError    the place of the output does not answer for too long (also an OSError): it may pass
      SinkRefusedError        the place of the output does not take it: mend what the message says

None of them loses anything: the last committed checkpoint stays as it is, and a job that is
started again goes on from there. Every message names the object, what was expected and what was
found. Wrong arguments are ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from statebackend import SchemaMismatchError

__all__ = [
    "BadEventTimeError",
    "BadInputError",
    "JobMismatchError",
    "OperatorError",
    "OutputUncertainError",
    "OutputVanishedError",
    "SchemaError",
    "SinkOccupiedError",
    "SinkRefusedError",
    "SinkUnavailableError",
    "SourceChangedError",
    "SourceNotReplayableError",
    "SourceUnavailableError",
    "UnsupportedQueryError",
    "UserFunctionError",
    "shown",
]


_RAISED_IN_UDF = re.compile(r"PyErr \{ type: <class '[^']*'>, value: (?P<error>.*?), traceback: ", re.DOTALL)


def shown(position: object) -> str:
    """A source position for people: without the digests in it."""
    if isinstance(position, Mapping):
        return ", ".join(f"{k} {v}" for k, v in position.items() if isinstance(v, (str, int, float)))
    return repr(position)


class OperatorError(Exception):
    """Base of every error that the operators raise on purpose."""


class SourceChangedError(OperatorError):
    """An input vanished, shrank, grew or was rewritten since it was listed or since the checkpoint."""

    def __init__(self, name: str, *, expected: str, found: str) -> None:
        super().__init__(f"{name}: the input changed: expected {expected}, found {found}")
        self.name = name
        self.expected = expected
        self.found = found


class SourceNotReplayableError(OperatorError):
    """A one-shot input was asked to start at a position other than its beginning."""


class SourceUnavailableError(OperatorError):
    """An input that is elsewhere did not answer for as long as it was waited for, or refused."""


class BadInputError(OperatorError):
    """An input that is not there, is empty where it must not be, or cannot be decoded."""


class BadEventTimeError(OperatorError):
    """An event time that is null or too far in the future.

    ``position`` is the position after the batch, ``row`` the row within that batch, from 0.
    """

    def __init__(self, source: str, *, position: object, row: int, value: object, reason: str) -> None:
        super().__init__(
            f"{source}: {reason}: event time {value!r} in row {row} of the batch that ends at {shown(position)}"
        )
        self.source = source
        self.position = position
        self.row = row
        self.value = value


class SchemaError(OperatorError):
    """Columns are missing, or not of the type that was declared."""


class UnsupportedQueryError(OperatorError):
    """A part of a SQL query has no meaning over a stream, or would need all rows at once."""

    def __init__(self, part: str, instead: str) -> None:
        super().__init__(f"SQL over streams: {part}: {instead}")
        self.part = part
        self.instead = instead


class UserFunctionError(OperatorError):
    """A function given by the user raised; ``__cause__`` is its error, with the traceback as text if it was a UDF."""

    def __init__(self, operator_id: str, *, position: object, cause: BaseException) -> None:
        # DataFusion wraps the error of a Python function into text, with the whole traceback quoted.
        wrapped = _RAISED_IN_UDF.search(str(cause))
        raised = wrapped["error"] if wrapped else repr(cause)
        where = shown(position) if isinstance(position, Mapping) else position
        super().__init__(f"{operator_id}: the user's function raised {raised} at {where}")
        self.operator_id = operator_id
        self.position = position


class JobMismatchError(OperatorError, SchemaMismatchError):
    """The state was written by another job, or by a program with other operators than the `Upgrade` speaks of."""


class SinkOccupiedError(OperatorError):
    """The output directory holds files that this job did not write."""


class OutputVanishedError(OperatorError):
    """A committed file is neither staged nor published: something else deleted it."""


class OutputUncertainError(OperatorError):
    """What a sink remembers beside its output does not fit the state: it was lost, or the state went back."""


class SinkUnavailableError(OperatorError, OSError):
    """A broker or server that takes the output did not answer for as long as it was waited for."""


class SinkRefusedError(OperatorError):
    """A broker or server does not take the output, and will not take it when it is asked again."""
