"""What runs: operators that take batches and watermarks and hand them on, in one thread.

A stream is one order of batches, watermarks and barriers. A batch is pushed into `Operator.process`,
which emits to its outputs before it returns; a watermark follows the batches that led to it; at a
barrier every operator is drained, sources first, so that all it was given lies in its tables. An
operator keeps no state outside tables of the backend but what it can rebuild from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from operators.errors import OperatorError, UserFunctionError, shown
from statebackend import StateStoreError

__all__ = ["Cursor", "Operator", "Output", "user_error"]


class Operator(Protocol):
    """One step of a pipeline. All calls come from the job's thread."""

    operator_id: str
    rows_in: int

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Where its rows go; the first is the main one."""

    @property
    def watermark(self) -> int | None:
        """The watermark to commit and restore, for an operator that depends on it."""

    def process(self, batch: pa.RecordBatch) -> None:
        """Take a batch; emit what follows from it."""

    def announce(self, watermark: int) -> None:
        """This watermark is about to come: begin on other threads what it will need, without waiting."""

    def on_watermark(self, watermark: int) -> None:
        """Event time has reached ``watermark``; emit what follows, then hand it on."""

    def begin_drain(self) -> None:
        """A `drain` is about to come: begin on other threads what it will need, without waiting."""

    def drain(self) -> None:
        """Write everything that is held back into the tables."""


@dataclass(slots=True)
class Output:
    """A stream within a job: passes everything to each of its consumers, in order."""

    targets: list[Operator] = field(default_factory=list)
    rows: int = 0

    def emit(self, batch: pa.RecordBatch) -> None:
        """Push a batch into every consumer."""
        rows = batch.num_rows
        if rows == 0:
            return
        self.rows += rows
        for target in self.targets:
            target.rows_in += rows
            target.process(batch)

    def announce(self, watermark: int) -> None:
        """Tell every consumer of a watermark before any of them acts on it, so that they work side by side."""
        for target in self.targets:
            target.announce(watermark)

    def advance(self, watermark: int) -> None:
        """Push a watermark into every consumer."""
        for target in self.targets:
            target.on_watermark(watermark)


@dataclass(slots=True)
class Cursor:
    """Which batch is being processed, for the messages of errors: the position is the one after it."""

    source: str = ""
    position: Any = None
    batches: int = 0

    def __str__(self) -> str:
        return f"{self.source}, batch {self.batches} of this run, which ends at {shown(self.position)}"


def user_error(operator_id: str, where: object, error: Exception) -> Exception:
    """The error to raise when evaluating expressions or calling user code failed.

    Errors with a meaning of their own stay as they are.
    """
    if isinstance(error, (StateStoreError, OperatorError)):
        return error
    return UserFunctionError(operator_id, position=str(where), cause=error)
