"""What runs: operators that take batches and watermarks and hand them on, in one thread.

A stream is one order of batches, watermarks and barriers. A batch is pushed into `Operator.process`,
which emits to its outputs before it returns; a watermark follows the batches that led to it; at a
barrier every operator is drained, inputs first, so that all it was given lies in its tables. An
operator keeps no state outside tables of the backend but what it can rebuild from them.

Event time at an operator with several inputs is the smallest of their watermarks (`Inputs`); an input that
is idle does not hold it back. After a restore every source announces the watermark it was restored with,
so an operator hears of its own watermark again and hands on what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from operators.errors import OperatorError, UserFunctionError, shown
from statebackend import JobState, StateBackend, StateStoreError

__all__ = ["BaseOperator", "BuildContext", "Cursor", "Edge", "Inputs", "Operator", "Output", "user_error"]


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

    @property
    def uses_processing_time(self) -> bool:
        """Whether `on_processing_time` has to be called."""

    @property
    def untimed_inputs(self) -> frozenset[int]:
        """Numbers of the inputs whose event time is not waited for."""

    def process(self, batch: pa.RecordBatch, index: int, /) -> None:
        """Take a batch of input number ``index``; emit what follows from it."""

    def announce(self, watermark: int) -> None:
        """This watermark is about to come: begin on other threads what it will need, without waiting."""

    def on_watermark(self, watermark: int) -> None:
        """Event time has reached ``watermark`` at every input; emit what follows, then hand it on.

        After a restore it is called with the restored watermark again. ``MAX_WATERMARK`` means that no
        input will bring another row; it comes to operators over streams without event time too.
        """

    def on_idle(self) -> None:
        """No input brings rows at present; those that wait for this operator need not wait for its event time."""

    def on_processing_time(self, now_ms: int) -> None:
        """The wall clock shows ``now_ms`` (epoch milliseconds); called now and then, between batches."""

    def begin_drain(self) -> None:
        """A `drain` is about to come: begin on other threads what it will need, without waiting."""

    def drain(self) -> None:
        """Write everything that is held back into the tables."""

    def close(self) -> None:
        """The job has ended, one way or the other: stop threads, release what is held. Emits nothing."""


class BaseOperator:
    """An operator that keeps nothing and hands watermarks on; others replace what they do differently."""

    def __init__(self, operator_id: str) -> None:
        self.operator_id = operator_id
        self.rows_in = 0
        self.output = Output()

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The main output alone."""
        return (self.output,)

    @property
    def watermark(self) -> int | None:
        """None is kept."""
        return None

    @property
    def uses_processing_time(self) -> bool:
        """It does not."""
        return False

    @property
    def untimed_inputs(self) -> frozenset[int]:
        """None: all are waited for."""
        return frozenset()

    def announce(self, watermark: int) -> None:
        """Hand it on."""
        for output in self.outputs:
            output.announce(watermark)

    def on_watermark(self, watermark: int) -> None:
        """Hand it on."""
        for output in self.outputs:
            output.advance(watermark)

    def on_idle(self) -> None:
        """Hand it on."""
        for output in self.outputs:
            output.idle()

    def on_processing_time(self, now_ms: int) -> None:
        """Nothing happens."""

    def begin_drain(self) -> None:
        """Nothing is held back."""

    def drain(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is held."""


class Inputs:
    """The inputs of one operator: its event time is the smallest of those that are not idle."""

    __slots__ = ("_idle", "_marks", "_merged", "_untimed", "operator")

    def __init__(self, operator: Operator, count: int) -> None:
        self.operator = operator
        self._marks: list[int | None] = [None] * count
        self._untimed = operator.untimed_inputs
        self._idle = [index in self._untimed for index in range(count)]
        self._merged: int | None = None

    def announce(self, index: int, watermark: int) -> None:
        """Input ``index`` is about to reach this watermark."""
        if index in self._untimed:
            return
        merged = self._with(index, watermark)
        if merged is not None:
            self.operator.announce(merged)

    def advance(self, index: int, watermark: int) -> None:
        """Input ``index`` has reached this watermark, and is not idle."""
        if index in self._untimed:
            return
        self._idle[index] = False
        self._move(self._with(index, watermark))
        self._marks[index] = watermark

    def idle(self, index: int) -> None:
        """Input ``index`` brings nothing at present; its next watermark ends that."""
        self._idle[index] = True
        if all(self._idle):
            self.operator.on_idle()
        else:
            other = self._idle.index(False)
            mark = self._marks[other]
            self._move(None if mark is None else self._with(other, mark))

    def _move(self, merged: int | None) -> None:
        if merged is not None:
            self._merged = merged
            self.operator.on_watermark(merged)

    def _with(self, index: int, watermark: int) -> int | None:
        """The operator's watermark if this input had that one; None if it is none, or not a new one."""
        low = watermark
        for at, mark in enumerate(self._marks):
            if at != index and not self._idle[at]:
                if mark is None:
                    return None
                low = min(low, mark)
        return low if self._merged is None or low > self._merged else None


@dataclass(frozen=True, slots=True)
class Edge:
    """A consumer of an output, which sees it as its input number ``index``."""

    inputs: Inputs
    index: int


@dataclass(slots=True)
class Output:
    """A stream within a job: passes everything to each of its consumers, in order."""

    targets: list[Edge] = field(default_factory=list)
    rows: int = 0

    def emit(self, batch: pa.RecordBatch) -> None:
        """Push a batch into every consumer."""
        rows = batch.num_rows
        if rows == 0:
            return
        self.rows += rows
        for edge in self.targets:
            operator = edge.inputs.operator
            operator.rows_in += rows
            operator.process(batch, edge.index)

    def announce(self, watermark: int) -> None:
        """Tell every consumer of a watermark before any of them acts on it, so that they work side by side."""
        for edge in self.targets:
            edge.inputs.announce(edge.index, watermark)

    def advance(self, watermark: int) -> None:
        """Push a watermark into every consumer."""
        for edge in self.targets:
            edge.inputs.advance(edge.index, watermark)

    def idle(self) -> None:
        """Tell every consumer not to wait for this stream's event time, until its next watermark."""
        for edge in self.targets:
            edge.inputs.idle(edge.index)


@dataclass(slots=True)
class Cursor:
    """Which batch is being processed, for the messages of errors: the position is the one after it."""

    source: str = ""
    position: Any = None
    batches: int = 0

    def __str__(self) -> str:
        return f"{self.source}, batch {self.batches} of this run, which ends at {shown(self.position)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """What a node needs to make its operator.

    ``job``: the restored state, None for a new job. ``workers``: threads for work beside the job's own.
    ``clock``: wall-clock time in seconds since the epoch.
    """

    backend: StateBackend
    job: JobState | None
    workers: Executor
    cursor: Cursor
    clock: Callable[[], float]

    def watermark(self, operator_id: str) -> int | None:
        """The watermark that was committed for an operator."""
        return None if self.job is None else self.job.watermarks.get(operator_id)


def user_error(operator_id: str, where: object, error: Exception) -> Exception:
    """The error to raise when evaluating expressions or calling user code failed.

    Errors with a meaning of their own stay as they are.
    """
    if isinstance(error, (StateStoreError, OperatorError)):
        return error
    return UserFunctionError(operator_id, position=str(where), cause=error)
