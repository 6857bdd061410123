"""Session windows: rows of a group that follow each other closely are one window.

A session is ``[first, last + gap)``; a row joins it if it is at most ``gap`` away from one of its rows, and a
row between two sessions makes one of them. Batches are buffered by reference; a pass sorts them by group and
time, cuts them into local sessions, aggregates those, and merges them with the stored sessions of the same groups: a
session is a merge of partial states, as any window is. Two tables hold the state:

* ``<id>:sessions``: one row of states per open session, by group and first time; state column ``a0_max``
  is its last time.
* ``<id>:timers``: (end, first time, group) for every end that a session ever had, in the order of the ends.
  When event time passes an end, the sessions that still end there are closed; other timers are stale.

Invariants:

* Sessions in the table do not touch: any two of one group are more than ``gap`` apart.
* A session is emitted once, when the watermark *exceeds* ``last + gap``: until then a row exactly ``gap`` after
  the last one may come and belong to it.
* A row is late if, when its batch comes, the session that it would make or join is closed already. That
  depends on the batch, the table and the watermark alone, so a replay decides the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators.engine import StatelessPlan, Step
from operators.graph import Port, StateNote
from operators.rows import combined, group_codes, segmented_running_max, stable_order
from operators.runtime import BaseOperator, BuildContext, Cursor, Output, user_error
from operators.stateful.tables import keeps_every_value
from operators.stateful.window_aggregate import WINDOW_END, WINDOW_START
from operators.watermark import EventTimeColumn
from operators.windows import MAX_WATERMARK, Int64Array
from statebackend import Aggregation, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["SESSION_TIME", "SessionNode", "SessionWindow", "session_schema", "session_time_type"]

SESSION_TIME = "__session_time"
"""The event time of each row, in the type of the session bounds; the first aggregate is its maximum."""

_LAST = "a0_max"
_PASS_ROWS = 1 << 17
"""Rows per pass: more make fewer sessions to merge per row."""


def session_time_type(schema: pa.Schema, event_time: str) -> pa.DataType:
    """Type of the bounds of sessions: a timestamp of the event time's unit, of milliseconds at least."""
    column = EventTimeColumn(schema, event_time)
    unit = {1: "ms", 1_000: "us", 1_000_000: "ns"}[column.per_ms]
    return pa.timestamp(unit, column.zone)


def session_schema(aggregation: Aggregation, *, grouped: bool) -> pa.Schema:
    """Columns of the result: session start and end, group columns, aggregates."""
    result = aggregation.merger.result_schema
    groups = len(aggregation.merger.key_schema) - 1
    keys = [result.field(i) for i in range(1, 1 + groups)] if grouped else []
    bounds = [result.field(0), pa.field(WINDOW_END, result.field(0).type)]
    return pa.schema([*bounds, *keys, *(result.field(i) for i in range(2 + groups, len(result)))])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionNode:
    """An aggregation over sessions. Output 1: rows that came too late.

    ``keys`` computes the group columns of a batch. ``aggregation`` is over the input columns, `WINDOW_START`
    and `SESSION_TIME`, grouped by `WINDOW_START` and the group columns; an ungrouped one has one constant group.
    """

    operator_id: str
    input: Port
    input_schema: pa.Schema
    event_time: str
    gap: int
    keys: Step
    grouped: bool
    aggregation: Aggregation
    group_by: tuple[str, ...]
    aggregates: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The sessions, and the rows that came too late."""
        return ("", "late")

    @property
    def label(self) -> str:
        """For `explain`."""
        names = session_schema(self.aggregation, grouped=self.grouped).names[2:]
        return f"session {self.operator_id}: {', '.join(names)} with a gap of {self.gap} ms"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """Open sessions and when they end."""
        growth = "one row per open session; a group whose rows never pause keeps its session open"
        endless = keeps_every_value(self.aggregation)
        if endless:
            growth += ", with all its values"
        timers = f"the ends that sessions had in the last {self.gap} ms of event time"
        return (
            StateNote(f"{self.operator_id}:sessions", growth, bounded=not endless),
            StateNote(f"{self.operator_id}:timers", timers, bounded=True),
        )

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "session",
            "event_time": self.event_time,
            "gap_ms": self.gap,
            "group_by": list(self.group_by),
            "aggregates": list(self.aggregates),
        }

    def build(self, context: BuildContext) -> SessionWindow:
        """The operator, restored."""
        return SessionWindow(self, context)


class SessionWindow(BaseOperator):
    """The operator."""

    def __init__(self, node: SessionNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        # Constant after construction.
        merger = node.aggregation.merger
        self._aggregation = node.aggregation
        self._merger = merger
        self._times = EventTimeColumn(node.input_schema, node.event_time)
        self._gap = node.gap * self._times.per_ms
        self._keys = StatelessPlan([node.keys])
        self._time_type: pa.DataType = merger.key_schema.field(0).type
        extra = [pa.field(WINDOW_START, self._time_type), pa.field(SESSION_TIME, self._time_type)]
        self._rows_schema = pa.schema([*node.input_schema, *extra])
        self._result_schema = session_schema(node.aggregation, grouped=node.grouped)
        self._grouped = node.grouped
        self._groups = merger.key_schema.names[1:]
        self._sessions, self._timers = _tables(node, context)
        self._cursor: Cursor = context.cursor
        self.late = Output()
        # Progress of event time; no open session, stored or buffered, has a last time before ``_oldest``.
        self._watermark = context.watermark(node.operator_id)
        self._oldest: int | None = None
        self._buffer: list[pa.RecordBatch] = []
        self._buffered = 0
        for timers in self._timers.scan(columns=[WINDOW_END]):
            self._expect(int(_integers(timers.column(0)).min()) - self._gap)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The sessions, and the rows that came too late."""
        return (self.output, self.late)

    @property
    def watermark(self) -> int | None:
        """The watermark up to which sessions were closed."""
        return self._watermark

    # -- batches

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Buffer the rows; those whose session may be closed already take the slow path."""
        low = int(self._times.values(batch).min())
        if low < self._cutoff:
            self.drain()
            batch = self._without_late(batch)
            if batch.num_rows == 0:
                return
            low = int(self._times.values(batch).min())
        self._expect(low)
        self._buffer.append(batch)
        self._buffered += batch.num_rows
        if self._buffered >= _PASS_ROWS:
            self.drain()

    def on_watermark(self, watermark: int) -> None:
        """Close the sessions that have ended."""
        if self._watermark is None or watermark > self._watermark:
            self._watermark = watermark
            if self._oldest is not None and self._oldest < self._cutoff:
                self.drain()
                self._close_sessions()
        if watermark == MAX_WATERMARK:
            self.late.advance(watermark)
        self.output.advance(watermark)

    def drain(self) -> None:
        """Merge what is buffered into the table."""
        batches, self._buffer, self._buffered = self._buffer, [], 0
        if not batches:
            return
        rows = combined(batches, batches[0].schema)
        times = self._times.values(rows)
        local = _LocalSessions.cut(self._key_columns(rows), times, self._gap)
        bounds = (pa.array(values).view(self._time_type) for values in (local.first[local.session], times))
        rows = pa.RecordBatch.from_arrays([*rows.columns, *bounds], schema=self._rows_schema)
        try:
            states = self._aggregation.partial([rows])
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        self._merge(combined(states, self._merger.state_schema))

    # -- sessions

    def _merge(self, local: pa.RecordBatch) -> None:
        """Merge states of local sessions with the stored sessions that they touch."""
        stored = self._sessions.matches(_distinct(local.select(self._groups))).batch
        states = pa.concat_batches([stored.cast(local.schema), local])
        place = _Merged.of(self._group_arrays(states), self._bounds(states), self._gap)
        touched = np.zeros(place.count, dtype=bool)
        touched[place.session[stored.num_rows :]] = True
        members = touched[place.session]
        first = place.first[place.session]
        absorbed = np.flatnonzero(members[: stored.num_rows] & (first[: stored.num_rows] != self._bounds(stored)[0]))
        moved = self._with_start(states, first).filter(pa.array(members))
        alone = len(np.unique(place.session[members])) == moved.num_rows
        merged = [moved] if alone else self._merger.reduce([moved])
        if len(absorbed):
            self._sessions.delete(stored.select(self._sessions.spec.key).take(pa.array(absorbed)))
        for batch in merged:
            self._sessions.write(batch)
            self._timers.write(self._timer_rows(batch))

    def _close_sessions(self) -> None:
        """Emit and forget the sessions that the watermark has passed."""
        passed = MAX_WATERMARK if self._cutoff == MAX_WATERMARK else self._cutoff + self._gap
        due = combined(self._timers.scan(time_range=(None, passed)), self._timers.spec.schema)
        if due.num_rows:
            found = self._sessions.lookup(due.select(self._sessions.spec.key))
            rows, ends = found.batch.filter(found.hit), due.column(WINDOW_END).filter(found.hit)
            closed = rows.filter(pa.array(_integers(rows.column(_LAST)) + self._gap == _integers(ends)))
            if closed.num_rows:
                self._emit(closed.cast(self._merger.state_schema))
                self._sessions.delete(closed.select(self._sessions.spec.key))
        self._timers.expire(passed)
        self._oldest = self._cutoff

    def _emit(self, states: pa.RecordBatch) -> None:
        groups = len(self._groups)
        for result in self._merger.final([states]):
            end = _integers(result.column(1 + groups)) + self._gap
            shown = result.columns[1 : 1 + groups] if self._grouped else []
            columns = [result.column(0), pa.array(end).view(self._time_type), *shown, *result.columns[2 + groups :]]
            batch = pa.RecordBatch.from_arrays(columns, schema=self._result_schema)
            self.output.emit(batch.take(pa.array(np.argsort(end, kind="stable"))))

    # -- rows behind the watermark

    def _without_late(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Send off the rows whose session is closed already; nothing is buffered."""
        keys = self._key_columns(batch)
        local = _LocalSessions.cut(keys, self._times.values(batch), self._gap)
        kinds = self._merger.key_schema.types[1:]
        arrays = [key.take(pa.array(local.sample)).cast(kind) for key, kind in zip(keys, kinds, strict=True)]
        groups = pa.RecordBatch.from_arrays(arrays, names=self._groups)
        stored = self._sessions.matches(_distinct(groups)).batch
        first, last = self._bounds(stored)
        place = _Merged.of(
            [pa.concat_arrays(pair) for pair in zip(self._group_arrays(stored), arrays, strict=True)],
            (np.concatenate([first, local.first]), np.concatenate([last, local.last])),
            self._gap,
        )
        late = (place.last < self._cutoff)[place.session[stored.num_rows :]][local.session]
        if not late.any():
            return batch
        self.late.emit(batch.filter(pa.array(late)))
        return batch.filter(pa.array(~late))

    # -- helpers

    @property
    def _cutoff(self) -> int:
        """Sessions with a last time before this are closed; far in the past before the first watermark."""
        if self._watermark is None:
            return -MAX_WATERMARK
        return MAX_WATERMARK if self._watermark == MAX_WATERMARK else self._watermark * self._times.per_ms - self._gap

    def _expect(self, last: int) -> None:
        self._oldest = last if self._oldest is None else min(self._oldest, last)

    def _key_columns(self, rows: pa.RecordBatch) -> list[pa.Array]:
        try:
            columns: list[pa.Array] = combined(self._keys.run(rows), self._keys.schema).columns
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        return columns

    def _group_arrays(self, states: pa.RecordBatch) -> list[pa.Array]:
        return [states.column(name) for name in self._groups]

    def _bounds(self, states: pa.RecordBatch) -> tuple[Int64Array, Int64Array]:
        return _integers(states.column(WINDOW_START)), _integers(states.column(_LAST))

    def _with_start(self, states: pa.RecordBatch, first: Int64Array) -> pa.RecordBatch:
        return states.set_column(0, states.schema.field(0), pa.array(first).view(self._time_type))

    def _timer_rows(self, states: pa.RecordBatch) -> pa.RecordBatch:
        end = pa.array(_integers(states.column(_LAST)) + self._gap).view(self._time_type)
        columns = [end, states.column(0), *self._group_arrays(states)]
        return pa.RecordBatch.from_arrays(columns, schema=self._timers.spec.schema)


@dataclass(frozen=True, slots=True)
class _LocalSessions:
    """Rows cut into sessions on their own: per row its session; per session its bounds and one of its rows."""

    session: npt.NDArray[np.intp]
    first: Int64Array
    last: Int64Array
    sample: npt.NDArray[np.intp]

    @classmethod
    def cut(cls, keys: Sequence[pa.Array], times: Int64Array, gap: int) -> _LocalSessions:
        code, bound = group_codes(keys, len(times))
        order = stable_order(code, bound, times)
        ordered, groups = times[order], code[order]
        begins = np.append(True, (groups[1:] != groups[:-1]) | (ordered[1:] - ordered[:-1] > gap))
        starts = np.flatnonzero(begins)
        session = np.empty(len(times), dtype=np.intp)
        session[order] = np.cumsum(begins) - 1
        return cls(session, ordered[starts], ordered[np.append(starts[1:], len(order)) - 1], order[starts])


@dataclass(frozen=True, slots=True)
class _Merged:
    """Sessions joined where they touch: the merged session of each one, and the bounds of the merged ones."""

    session: npt.NDArray[np.intp]
    first: Int64Array
    last: Int64Array

    @property
    def count(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, keys: Sequence[pa.Array], bounds: tuple[Int64Array, Int64Array], gap: int) -> _Merged:
        first, last = bounds
        code, bound = group_codes(keys, len(first))
        order = stable_order(code, bound, first)
        _, groups = np.unique(code[order], return_inverse=True)
        reached = segmented_running_max(groups, last[order])
        begins = np.append(True, (groups[1:] != groups[:-1]) | (first[order][1:] - reached[:-1] > gap))
        session = np.empty(len(first), dtype=np.intp)
        session[order] = np.cumsum(begins) - 1
        starts = np.flatnonzero(begins)
        return cls(session, first[order][starts], np.maximum.reduceat(last[order], starts))


def _tables(node: SessionNode, context: BuildContext) -> tuple[StateTable, StateTable]:
    states = node.aggregation.merger.state_schema
    keys = node.aggregation.merger.key_schema
    sessions = TableSpec(
        name=f"{node.operator_id}:sessions",
        schema=states,
        key=tuple(keys.names),
        kind=TableKind.UPSERT,
        time_field=WINDOW_START,
        aggregation=node.aggregation.declaration,
    )
    timers = TableSpec(
        name=f"{node.operator_id}:timers",
        schema=pa.schema([pa.field(WINDOW_END, keys.field(0).type), *keys]),
        key=(WINDOW_END, *keys.names),
        kind=TableKind.UPSERT,
        order=TableOrder.TIME,
        time_field=WINDOW_END,
    )
    return context.backend.table(sessions), context.backend.table(timers)


def _distinct(groups: pa.RecordBatch) -> pa.RecordBatch:
    """One row of each group."""
    code, _ = group_codes(groups.columns, groups.num_rows)
    return groups.take(pa.array(np.unique(code, return_index=True)[1]))


def _integers(column: pa.Array) -> Int64Array:
    values: Int64Array = column.view(pa.int64()).to_numpy(zero_copy_only=True)
    return values
