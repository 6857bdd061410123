"""Operators that only direct rows: union, split, another event time. They keep no table.

`Union` has no state: the smallest watermark of its inputs is made by `operators.runtime.Inputs`. `EventTime` keeps
the watermark that it makes, which is committed; nothing else here outlives a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.changelog import settle
from operators.engine import StatelessPlan, Step
from operators.graph import Port, StateNote
from operators.rows import combined
from operators.runtime import BaseOperator, BuildContext, Cursor, Output, user_error
from operators.watermark import BadRows, EventTimeSpec, WatermarkTracker
from operators.windows import MAX_WATERMARK

__all__ = ["EventTimeNode", "ProcessingTimeNode", "SplitNode", "UnionNode"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnionNode:
    """All rows of several streams of one schema."""

    operator_id: str
    inputs: tuple[Port, ...]
    schema: pa.Schema
    output_names: tuple[str, ...] = ("",)
    state: tuple[StateNote, ...] = ()

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"union {self.operator_id} of {len(self.inputs)} streams"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {"operator": "union", "inputs": len(self.inputs)}

    def build(self, context: BuildContext) -> Union:  # noqa: ARG002
        """The operator."""
        return Union(self.operator_id, self.schema)


class Union(BaseOperator):
    """The operator."""

    def __init__(self, operator_id: str, schema: pa.Schema) -> None:
        super().__init__(operator_id)
        self._schema = schema

    def process(self, batch: pa.RecordBatch, _index: int, /) -> None:
        """Hand the rows on."""
        self.output.emit(pa.RecordBatch.from_arrays(batch.columns, schema=self._schema))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplitNode:
    """Sends each row to the first branch whose predicate holds, or to the last output, the rest.

    ``predicates`` computes one boolean column per branch. Of a ``changelog`` each branch is one too: a row that an
    update leads from one branch to another is deleted here and inserted there.
    """

    operator_id: str
    input: Port
    branches: tuple[str, ...]
    predicates: Step
    texts: tuple[str, ...]
    changelog: bool = False
    state: tuple[StateNote, ...] = ()

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The branches; the last holds the rest."""
        return (*self.branches, "rest")

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"split {self.operator_id} into {', '.join(self.branches)} and the rest"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {"operator": "split", "branches": dict(zip(self.branches, self.texts, strict=True))}

    def build(self, context: BuildContext) -> Split:
        """The operator."""
        return Split(self, context.cursor)


class Split(BaseOperator):
    """The operator."""

    def __init__(self, node: SplitNode, cursor: Cursor) -> None:
        super().__init__(node.operator_id)
        self._plan = StatelessPlan([node.predicates])
        self._emit = _emit_settled if node.changelog else _emit_some
        self._branches = tuple(Output() for _ in node.output_names)
        self._cursor = cursor

    @property
    def outputs(self) -> tuple[Output, ...]:
        """One per branch, and the rest."""
        return self._branches

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Each row goes to one branch."""
        try:
            columns = combined(self._plan.run(batch), self._plan.schema).columns
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        free = np.ones(batch.num_rows, dtype=bool)
        for output, column in zip(self._branches, columns, strict=False):
            here = free & pc.fill_null(column, False).to_numpy(zero_copy_only=False)
            free &= ~here
            self._emit(output, batch, here)
        self._emit(self._branches[-1], batch, free)


def _emit_some(output: Output, batch: pa.RecordBatch, keep: Any) -> None:
    if keep.all():
        output.emit(batch)
    elif keep.any():
        output.emit(batch.filter(pa.array(keep)))


def _emit_settled(output: Output, batch: pa.RecordBatch, keep: Any) -> None:
    if keep.any():
        output.emit(settle(batch, keep))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventTimeNode:
    """Follows event time anew, in another column. Output 1: rows with a bad event time."""

    operator_id: str
    input: Port
    schema: pa.Schema
    event_time: EventTimeSpec
    output_names: tuple[str, ...] = ("", "bad")
    state: tuple[StateNote, ...] = ()

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"event time {self.operator_id}: {self.event_time.column}"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {"operator": "event time", **self.event_time.describe()}

    def build(self, context: BuildContext) -> EventTime:
        """The operator, restored."""
        return EventTime(self, context)


class EventTime(BaseOperator):
    """The operator: makes watermarks from the rows and takes none but the last one from its input."""

    def __init__(self, node: EventTimeNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        self.bad = Output()
        self._tracker = WatermarkTracker(node.event_time, node.schema, context.clock)
        self._tracker.restore(context.watermark(node.operator_id))
        self._cursor = context.cursor
        self._resumed = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The rows, and those with a bad event time."""
        return (self.output, self.bad)

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return self._tracker.watermark

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Hand the rows on, then the watermark to which they lead."""
        self._resume()
        reached = self._tracker.observe(batch)
        if isinstance(reached, BadRows):
            batch = self._set_aside(reached)
            reached = self._tracker.observe(batch)
            assert not isinstance(reached, BadRows)
        self.output.emit(batch)
        if reached is not None and self._tracker.advance(reached):
            self.output.announce(reached)
            self.output.advance(reached)

    def announce(self, watermark: int) -> None:
        """Another event time than this one."""

    def on_watermark(self, watermark: int) -> None:
        """Only the end of the input counts here."""
        self._resume()
        if watermark == MAX_WATERMARK:
            self._tracker.advance(watermark)
            super().on_watermark(watermark)

    def _resume(self) -> None:
        """Let those downstream know the restored watermark before anything else."""
        if not self._resumed and self._tracker.watermark is not None:
            self.output.advance(self._tracker.watermark)
        self._resumed = True

    def _set_aside(self, found: BadRows) -> pa.RecordBatch:
        if (error := found.refused(self._tracker.spec, self.operator_id, self._cursor.position)) is not None:
            raise error
        self.bad.emit(found.bad)
        return found.good


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProcessingTimeNode:
    """Appends the time at which a row is processed, and makes it the event time."""

    operator_id: str
    input: Port
    schema: pa.Schema
    output_names: tuple[str, ...] = ("",)
    state: tuple[StateNote, ...] = ()

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"processing time {self.operator_id}: {self.schema.names[-1]}"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {"operator": "processing time", "column": self.schema.names[-1]}

    def build(self, context: BuildContext) -> ProcessingTime:
        """The operator, restored."""
        return ProcessingTime(self, context.clock, context.watermark(self.operator_id))


@dataclass(slots=True)
class _Clock:
    """The wall clock in milliseconds, which never goes back, not even over a restart."""

    read: Callable[[], float]
    latest: int | None = field(default=None)

    def tick(self) -> int:
        now = int(self.read() * 1000)
        self.latest = now if self.latest is None else max(now, self.latest)
        return self.latest


class ProcessingTime(BaseOperator):
    """The operator. Event time is the clock, also while no rows come."""

    def __init__(self, node: ProcessingTimeNode, clock: Callable[[], float], watermark: int | None) -> None:
        super().__init__(node.operator_id)
        self._schema = node.schema
        self._clock = _Clock(clock, watermark)

    @property
    def watermark(self) -> int | None:
        """The latest time that was handed on."""
        return self._clock.latest

    @property
    def uses_processing_time(self) -> bool:
        """It does."""
        return True

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Stamp the rows."""
        now = self._clock.tick()
        stamps = pa.repeat(pa.scalar(now, pa.timestamp("ms", "UTC")), batch.num_rows)
        self.output.emit(pa.RecordBatch.from_arrays([*batch.columns, stamps], schema=self._schema))

    def announce(self, watermark: int) -> None:
        """Another event time than this one."""

    def on_watermark(self, watermark: int) -> None:
        """Only the end of the input counts here."""
        if watermark == MAX_WATERMARK:
            super().on_watermark(watermark)

    def on_idle(self) -> None:
        """The clock goes on."""

    def on_processing_time(self, now_ms: int) -> None:
        """The watermark is the clock: a row that comes later has a later time, or the same."""
        del now_ms
        self.output.advance(self._clock.tick())
