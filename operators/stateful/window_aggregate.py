"""Windowed aggregation: rows become partial states, panes of states become windows.

Batches are buffered by reference. When enough rows are there, or something is due, one pass over
all of them makes partial states per (pane, group), on a worker thread while the job goes on reading;
the states are written into an aggregate table as blind merges. When the watermark passes the end of
windows, the states of their panes are read back, replicated to each window that shares a pane,
merged and finalised; then panes that no open window needs expire.

Invariants:

* All state lies in the table: at a barrier `drain` leaves nothing in the buffer, and what is kept
  beside it (which panes are live) is rebuilt from the table's time column.
* A window is emitted once, when the watermark reaches its end; with ``allowed_lateness`` it is
  emitted again, for the groups that changed, right after each batch that changed it; with
  ``emit_every`` what is open is emitted as it stands whenever the watermark passes a multiple of it.
* What is late depends only on the order of batches and watermarks, so a replay decides the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from operators.graph import Port, StateNote
from operators.rows import combined, ranges
from operators.runtime import BaseOperator, BuildContext, Cursor, Output, user_error
from operators.watermark import EventTimeColumn
from operators.windows import MAX_WATERMARK, Int64Array, Windows
from statebackend import Aggregation, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["WINDOW_END", "WINDOW_START", "WindowAggregate", "WindowNode", "table_spec", "window_schema"]

WINDOW_START = "window_start_time"
WINDOW_END = "window_end_time"

_PARTIAL_ROWS = 1 << 18
"""Rows per pass: fewer make more states to merge, more delay the result; four batches of 64k are best."""
_PARTIALS_MAX = 3
"""Passes under way at once: enough for two cores, few enough to bound the rows held."""
_SPARSE_ROWS = 1 << 13
"""Rows per pass when most rows have a group of their own: then a large pass merges nothing, and sketches
of many groups at once fall out of the caches (four times slower with 64k)."""
_FIRE_ROWS = 1 << 14
_FIRE_ROWS_MIN = 1 << 12
"""Most states finalised in one go when many windows fire together, and fewest that are worth a thread."""
_FINALS_MAX = 2
_BATCH_ROWS_MIN = 1 << 12
"""Smaller batches of states are joined: DataFusion visits every group once per batch."""


def table_spec(operator_id: str, aggregation: Aggregation) -> TableSpec:
    """The table of a window operator: partial states by (pane start, group)."""
    merger = aggregation.merger
    return TableSpec(
        name=operator_id,
        schema=merger.state_schema,
        key=tuple(merger.key_schema.names),
        kind=TableKind.AGGREGATE,
        order=TableOrder.TIME,
        time_field=WINDOW_START,
        aggregation=aggregation.declaration,
    )


def window_schema(aggregation: Aggregation) -> pa.Schema:
    """Columns of the result: window start and end, group columns, aggregates."""
    result = aggregation.merger.result_schema
    return result.insert(1, pa.field(WINDOW_END, result.field(0).type))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowNode:
    """A windowed aggregation. Output 1: rows that came too late."""

    operator_id: str
    input: Port
    input_schema: pa.Schema
    event_time: str
    windows: Windows
    aggregation: Aggregation
    group_by: tuple[str, ...]
    aggregates: tuple[str, ...]
    emit_every: int | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The windows, and the rows that came too late."""
        return ("", "late")

    @property
    def label(self) -> str:
        """For `explain`."""
        result = self.aggregation.merger.result_schema.names[1:]
        early = "" if self.emit_every is None else f", emitted early every {self.emit_every} ms"
        lateness = self.windows.allowed_lateness
        late = f", updated by rows up to {lateness} ms late" if lateness else ""
        return f"{self._verb} {self.operator_id}: {', '.join(result)} over {self.windows.described()}{early}{late}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """Partial states, by pane."""
        span = self.windows.length + self.windows.allowed_lateness
        growth = f"one row per group and pane of the last {span} ms of event time"
        return (StateNote(self.operator_id, growth, bounded=True),)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "window",
            "event_time": self.event_time,
            **self.windows.parameters(),
            "emit_every_ms": self.emit_every,
            "group_by": list(self.group_by),
            "aggregates": list(self.aggregates),
        }

    def build(self, context: BuildContext) -> WindowAggregate:
        """The operator, restored."""
        return self._operator_type()(
            self.operator_id,
            windows=self.windows,
            emit_every=self.emit_every,
            aggregation=self.aggregation,
            input_schema=self.input_schema,
            event_time=self.event_time,
            table=context.backend.table(table_spec(self.operator_id, self.aggregation)),
            watermark=context.watermark(self.operator_id),
            workers=context.workers,
            cursor=context.cursor,
        )

    @property
    def _verb(self) -> str:
        return "window"

    def _operator_type(self) -> type[WindowAggregate]:
        return WindowAggregate


class WindowAggregate(BaseOperator):
    """The operator. ``input_schema`` without the pane column, which it appends itself."""

    def __init__(
        self,
        operator_id: str,
        *,
        windows: Windows,
        emit_every: int | None,
        aggregation: Aggregation,
        input_schema: pa.Schema,
        event_time: str,
        table: StateTable,
        watermark: int | None,
        workers: Executor,
        cursor: Cursor,
    ) -> None:
        super().__init__(operator_id)
        # Constant after construction.
        self._windows = windows
        self._emit_every = emit_every
        self._aggregation = aggregation
        self._merger = aggregation.merger
        self._times = EventTimeColumn(input_schema, event_time)
        self._pane_type = self._merger.key_schema.field(0).type
        self._pane_schema = input_schema.append(pa.field(WINDOW_START, self._pane_type))
        self._result_schema = window_schema(aggregation)
        self._table = table
        self._workers = workers
        self._cursor = cursor
        self.late = Output()
        # What is on its way into the table.
        self._buffer: list[pa.RecordBatch] = []
        self._buffered = 0
        self._partials: deque[Future[list[pa.RecordBatch]]] = deque()
        self._sparse = False
        # Progress of event time, and the live panes with the number of states written for each.
        self._watermark: int | None = None
        self._panes: dict[int, int] = {}
        self._next_end: int | None = None
        self._closed: int | None = None
        self._guard: int | None = None
        self._restore(watermark)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The windows, and the rows that came too late for any of theirs."""
        return (self.output, self.late)

    @property
    def watermark(self) -> int | None:
        """The watermark up to which windows have fired."""
        return self._watermark

    # -- batches

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Buffer the rows; those behind the watermark take the slow path."""
        times = self._times.values(batch)
        if self._windows.has_gaps:
            inside = self._windows.inside(times, self._times.per_ms)
            if not inside.all():
                batch = batch.filter(pa.array(inside))
                times = self._times.values(batch)
        if batch.num_rows == 0:
            return
        low = int(times.min())
        if self._guard is not None and low < self._guard * self._times.per_ms:
            kept = self._process_late(batch)
            if kept.num_rows == 0:
                return
            batch, low = kept, int(self._times.values(kept).min())
        self._await_pane(low // self._times.per_ms)
        self._buffer.append(batch)
        self._buffered += batch.num_rows
        if self._buffered >= _PARTIAL_ROWS:
            self._submit()
            self._collect(_PARTIALS_MAX)

    def announce(self, watermark: int) -> None:
        """Begin to aggregate if the watermark will make windows fire."""
        if self._emits_early(watermark) or (self._next_end is not None and watermark >= self._next_end):
            self.begin_drain()

    def on_watermark(self, watermark: int) -> None:
        """Fire the windows that end at or before the watermark, then let dead panes expire."""
        if self._watermark is None or watermark > self._watermark:
            early = self._emits_early(watermark)
            before, self._watermark = self._watermark, watermark
            if self._next_end is not None and watermark >= self._next_end:
                self.drain()
                self._fire(self._windows.firing(self._panes, before, watermark))
            if early:
                self.drain()
                self._fire(self._windows.firing(self._panes, watermark, MAX_WATERMARK))
            self._move_bounds(watermark)
        if watermark == MAX_WATERMARK:
            self.late.advance(watermark)
        self._hand_on(watermark)

    def _hand_on(self, watermark: int) -> None:
        """The event time of the results: starts of windows that may still come."""
        behind = 0 if watermark == MAX_WATERMARK else self._windows.length + self._windows.allowed_lateness
        self.output.advance(watermark - behind)

    def _emits_early(self, watermark: int) -> bool:
        """Whether this watermark passes a multiple of ``emit_every``."""
        if self._emit_every is None or watermark == MAX_WATERMARK:
            return False
        return self._watermark is None or watermark // self._emit_every > self._watermark // self._emit_every

    def begin_drain(self) -> None:
        """Aggregate what is buffered, in two halves if it is much."""
        if self._buffered >= _PARTIAL_ROWS // 2 and len(self._buffer) > 1:
            half = len(self._buffer) // 2
            rest, self._buffer = self._buffer[half:], self._buffer[:half]
            self._submit()
            self._buffer = rest
        if self._buffer:
            self._submit()

    def drain(self) -> None:
        """Aggregate what is buffered and write it."""
        self.begin_drain()
        self._collect(0)

    # -- rows behind the watermark

    def _process_late(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Send off rows that no window waits for, update windows that have fired; the rest is returned."""
        assert self._closed is not None
        assert self._guard is not None
        times, per_ms = self._times.values(batch), self._times.per_ms
        late = times < self._closed * per_ms
        if late.any():
            self.late.emit(batch.filter(pa.array(late)))
        fired = ~late & (times < self._guard * per_ms)
        if fired.any():
            self._update(batch.filter(pa.array(fired)))
        on_time = ~late & ~fired
        return batch if on_time.all() else batch.filter(pa.array(on_time))

    def _update(self, rows: pa.RecordBatch) -> None:
        """Aggregate rows of windows that have fired, and emit the changed groups of those again."""
        self.drain()
        states = self._partial([rows], str(self._cursor))
        self._write(states)
        touched = combined(states, self._merger.state_schema)
        panes = np.unique(_times_of(touched)).tolist()
        for pane in panes:
            self._await_pane(pane)
        assert self._watermark is not None
        oldest = self._watermark - self._windows.allowed_lateness
        fired = self._windows.firing(panes, oldest, self._watermark)
        at_once = max(1, _FIRE_ROWS // (self._windows.panes_per_window * touched.num_rows))
        for first in range(0, len(fired), at_once):
            changed = self._merger.reduce(self._replicate([touched], fired[first : first + at_once]))
            self._emit(self._merger.final([self._states_of(group) for group in changed]))

    def _states_of(self, groups: pa.RecordBatch) -> pa.RecordBatch:
        """The states, in every live pane, of groups whose first column identifies their window."""
        windows = _times_of(groups)
        starts, ends = self._windows.bounds(windows)
        panes = np.asarray(sorted(self._panes), dtype=np.int64)
        low = np.searchsorted(panes, starts)
        counts = np.searchsorted(panes, ends) - low
        rows = np.repeat(np.arange(len(windows)), counts)
        keys = groups.select(self._merger.key_schema.names).take(pa.array(rows))
        found = self._table.lookup(self._with_start(keys, panes[ranges(low, counts)]))
        hit = found.hit.to_numpy(zero_copy_only=False)
        return self._with_start(found.batch.filter(found.hit), windows[rows[hit]])

    # -- partial states

    def _submit(self) -> None:
        batches, self._buffer, self._buffered = self._buffer, [], 0
        self._partials.append(self._workers.submit(self._partial, batches, str(self._cursor)))

    def _partial(self, batches: Sequence[pa.RecordBatch], where: str) -> list[pa.RecordBatch]:
        rows = [self._with_pane(b) for b in batches]
        passes = _slices(rows, _SPARSE_ROWS) if self._sparse else [rows]
        try:
            states = [state for one in passes for state in self._aggregation.partial(one)]
        except Exception as error:
            raise user_error(self.operator_id, where, error) from error
        total = sum(b.num_rows for b in rows)
        if total >= _SPARSE_ROWS:
            self._sparse = 2 * sum(s.num_rows for s in states) > total
        return states

    def _with_pane(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        starts = self._windows.pane_starts(self._times.values(batch), self._times.per_ms)
        panes = pa.array(starts).view(self._pane_type)
        return pa.RecordBatch.from_arrays([*batch.columns, panes], schema=self._pane_schema)

    def _collect(self, leave: int) -> None:
        """Write finished partial states in the order of their rows, waiting until ``leave`` are under way."""
        while len(self._partials) > leave or (self._partials and self._partials[0].done()):
            self._write(self._partials.popleft().result())

    def _write(self, states: Sequence[pa.RecordBatch]) -> None:
        for batch in states:
            if batch.num_rows:
                self._table.write(batch)
                self._count_panes(_times_of(batch))

    def _count_panes(self, starts: Int64Array) -> None:
        panes, counts = np.unique(starts, return_counts=True)
        for pane, count in zip(panes.tolist(), counts.tolist(), strict=True):
            self._panes[pane] = self._panes.get(pane, 0) + count

    def _await_pane(self, time: int) -> None:
        """A row of this time is there: note when its first open window ends."""
        end = self._windows.next_end(time, self._watermark)
        if end is not None and (self._next_end is None or end < self._next_end):
            self._next_end = end

    # -- windows

    def _fire(self, windows: list[int]) -> None:
        """Finalise on the workers, a few groups of windows at once, and emit in order."""
        finals: deque[Future[list[pa.RecordBatch]]] = deque()
        for group in self._groups(windows):
            finals.append(self._workers.submit(self._finalise, group))
            if len(finals) == _FINALS_MAX:
                self._emit(finals.popleft().result())
        while finals:
            self._emit(finals.popleft().result())

    def _finalise(self, windows: list[int]) -> list[pa.RecordBatch]:
        starts, ends = self._windows.bounds(np.asarray(windows, dtype=np.int64))
        states = self._table.scan(time_range=(int(starts[0]), int(ends.max())), merged=False)
        if not self._windows.single_pane:
            states = self._replicate(states, windows)
        elif len(states) * _BATCH_ROWS_MIN > sum(s.num_rows for s in states):
            states = [combined(states, self._merger.state_schema)]
        return self._merger.final(states)

    def _groups(self, windows: list[int]) -> list[list[int]]:
        """Consecutive windows that are finalised together: two groups at least if there is enough to do,
        each small enough that memory stays bounded."""
        if not windows:
            return []
        panes = np.asarray(sorted(self._panes), dtype=np.int64)
        total = np.asarray([0, *accumulate(self._panes[p] for p in panes.tolist())])
        starts, ends = self._windows.bounds(np.asarray(windows, dtype=np.int64))
        sizes = (total[np.searchsorted(panes, ends)] - total[np.searchsorted(panes, starts)]).tolist()
        limit = min(_FIRE_ROWS, max(_FIRE_ROWS_MIN, sum(sizes) // 2 + 1))
        groups: list[list[int]] = []
        rows = limit
        for window, size in zip(windows, sizes, strict=True):
            if rows + size > limit:
                groups.append([])
                rows = 0
            groups[-1].append(window)
            rows += size
        return groups

    def _replicate(self, states: Sequence[pa.RecordBatch], windows: list[int]) -> list[pa.RecordBatch]:
        """Each state once per window that holds its pane, with what identifies the window as its time."""
        batch = combined(states, self._merger.state_schema)
        panes = _times_of(batch)
        order = np.argsort(panes, kind="stable")
        panes = panes[order]
        ids = np.asarray(windows, dtype=np.int64)
        starts, ends = self._windows.bounds(ids)
        low = np.searchsorted(panes, starts)
        counts = np.searchsorted(panes, ends) - low
        rows = batch.take(pa.array(order[ranges(low, counts)]))
        return [self._with_start(rows, np.repeat(ids, counts))]

    def _with_start(self, batch: pa.RecordBatch, starts: Int64Array) -> pa.RecordBatch:
        return batch.set_column(0, batch.schema.field(0), pa.array(starts).view(self._pane_type))

    def _emit(self, results: Sequence[pa.RecordBatch]) -> None:
        for result in results:
            if result.num_rows == 0:
                continue
            windows = _times_of(result)
            if (windows[1:] < windows[:-1]).any():
                result = result.take(pa.array(np.argsort(windows, kind="stable")))
                windows = _times_of(result)
            bounds = (pa.array(times).view(self._pane_type) for times in self._windows.bounds(windows))
            columns = [*bounds, *result.columns[1:]]
            self._emit_windows(windows, pa.RecordBatch.from_arrays(columns, schema=self._result_schema))

    def _emit_windows(self, windows: Int64Array, rows: pa.RecordBatch) -> None:  # noqa: ARG002
        """Emit results; ``windows`` identifies that of each row."""
        self.output.emit(rows)

    # -- progress

    def _move_bounds(self, watermark: int) -> None:
        """After a watermark: which times are late, which panes are dead, what fires next."""
        closed = min(self._windows.closed_before(watermark), MAX_WATERMARK)
        late = self._windows.allowed_lateness > 0
        self._guard = max(closed, self._windows.fired_before(watermark)) if late else closed
        if self._closed is None or closed > self._closed:
            self._closed = closed
            dead = [pane for pane in self._panes if pane < closed]
            for pane in dead:
                del self._panes[pane]
            if dead:
                self._table.expire(closed)
        if self._next_end is not None and watermark >= self._next_end:
            ends = (self._windows.next_end(pane, watermark) for pane in self._panes)
            self._next_end = min((end for end in ends if end is not None), default=None)

    def _restore(self, watermark: int | None) -> None:
        for batch in self._table.scan(columns=[WINDOW_START], merged=False):
            self._count_panes(_times_of(batch))
        self._watermark = watermark
        if watermark is not None:
            self._move_bounds(watermark)
        for pane in self._panes:
            self._await_pane(pane)


def _times_of(batch: pa.RecordBatch) -> Int64Array:
    """The first column, window or pane starts, as epoch milliseconds."""
    times: Int64Array = batch.column(0).view(pa.int64()).to_numpy(zero_copy_only=True)
    return times


def _slices(batches: Sequence[pa.RecordBatch], rows: int) -> list[list[pa.RecordBatch]]:
    """The same rows in pieces of at most so many."""
    return [[b.slice(at, rows)] for b in batches for at in range(0, b.num_rows, rows)]
