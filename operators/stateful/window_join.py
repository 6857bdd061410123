"""Join of two streams within windows: rows with equal keys that lie in the same window match.

Rows are stored by event time as they come. When the watermark passes the end of windows, both sides of them are read
back, sorted, matched and emitted; rows that no open window holds expire.

Invariants:

* A window fires once, when the watermark reaches its end, with the rows that had come until then. A row whose windows
  have all fired is late; one whose windows have fired in part counts in the others.
* All state lies in the tables; which panes hold rows is rebuilt from their time columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators.graph import Port, StateNote
from operators.pairs import Bools, key_codes, matching_ranges, pairs_of, take_rows
from operators.rows import combined, ranges, stable_order
from operators.runtime import BaseOperator, BuildContext, Cursor, Output, user_error
from operators.stateful.join_parts import JoinHow, JoinOutput, JoinSide, PairFilter
from operators.windows import MAX_WATERMARK, Int64Array, WindowSpec
from statebackend import TableOrder

__all__ = ["WindowJoin", "WindowJoinNode"]

_PAIRS_AT_ONCE = 1 << 16
"""Pairs that are filtered and emitted in one go: bounds the memory that a frequent key takes."""
_FIRE_ROWS = 1 << 17
"""Rows of windows that are joined in one go, when many fire together."""
_INT64_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowJoinNode:
    """A window join. Outputs 1 and 2: rows of the left and of the right that came too late.

    ``schema``: window start and end, then the columns of ``output``.
    """

    operator_id: str
    inputs: tuple[Port, Port]
    how: JoinHow
    left: JoinSide
    right: JoinSide
    windows: WindowSpec
    output: JoinOutput
    schema: pa.Schema
    pair_filter: PairFilter | None

    @property
    def output_names(self) -> tuple[str, ...]:
        """The joined rows, and those of either side that came too late."""
        return ("", "late_left", "late_right")

    @property
    def label(self) -> str:
        """For `explain`."""
        pairs = " and ".join(f"{a} = {b}" for a, b in zip(self.left.keys, self.right.keys, strict=True)) or "true"
        where = f" and {self.pair_filter.text}" if self.pair_filter else ""
        return f"{self.how} window join {self.operator_id}: {pairs}{where} over {self.windows.described()}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """The rows of both sides that lie in open windows."""
        growth = f"the rows of the last {self.windows.length} ms of event time"
        return tuple(StateNote(f"{self.operator_id}:{s.name}", growth, bounded=True) for s in (self.left, self.right))

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "window_join",
            "how": str(self.how),
            "left": list(self.left.keys),
            "right": list(self.right.keys),
            "event_times": [self.left.time, self.right.time],
            **self.windows.parameters(),
            "filter": None if self.pair_filter is None else self.pair_filter.text,
        }

    def build(self, context: BuildContext) -> WindowJoin:
        """The operator, restored."""
        return WindowJoin(self, context)


@dataclass(slots=True)
class _Held:
    """Rows of one side in some windows, by time; row i of the copies is row ``rows[i]`` in window ``windows[i]``."""

    rows: pa.RecordBatch
    times: Int64Array
    copies: Int64Array
    windows: Int64Array
    first: Int64Array
    """Per window: its first copy minus its first row, so that a row's copy is found from its place."""


class _Input:
    """One side at work."""

    def __init__(self, node: WindowJoinNode, index: int, context: BuildContext) -> None:
        self.side = (node.left, node.right)[index]
        self.index = index
        self.late = Output()
        self.alone = node.how.left_alone if index == 0 else node.how.right_alone
        self.table = context.backend.table(
            self.side.table_spec(f"{node.operator_id}:{self.side.name}", TableOrder.TIME)
        )

    def held(self, starts: Int64Array, length: int) -> _Held:
        """The stored rows of these windows."""
        begin, end = starts * self.side.per_ms, (starts + length) * self.side.per_ms
        found = self.table.scan(time_range=(int(begin[0]), int(end[-1])))
        state = combined(found, self.side.state_schema)
        times = self.side.state_times(state)
        low = np.searchsorted(times, begin)
        counts = np.searchsorted(times, end) - low
        first = np.cumsum(counts) - counts - low
        windows = np.repeat(np.arange(len(starts)), counts)
        return _Held(self.side.from_state(state), times, ranges(low, counts), windows, first)


class WindowJoin(BaseOperator):
    """The operator."""

    def __init__(self, node: WindowJoinNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        # Constant after construction.
        self._how = node.how
        self._windows = node.windows
        self._columns = node.output
        self._schema = node.schema
        self._filter = node.pair_filter
        self._cursor: Cursor = context.cursor
        self._inputs = tuple(_Input(node, index, context) for index in (0, 1))
        # Progress of event time, and the live panes with the number of rows in each.
        self._watermark = context.watermark(node.operator_id)
        self._panes: dict[int, int] = {}
        self._next_end: int | None = None
        self._closed: int | None = None
        self._restore()

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The joined rows, and those of either side that came too late."""
        return (self.output, self._inputs[0].late, self._inputs[1].late)

    @property
    def watermark(self) -> int | None:
        """The watermark up to which windows have fired."""
        return self._watermark

    # -- batches

    def process(self, batch: pa.RecordBatch, index: int, /) -> None:
        """Store the rows; those of closed windows are late."""
        mine = self._inputs[index]
        batch = self._in_windows(mine, batch)
        rows = mine.side.rows(batch)
        if not mine.alone and (hopeless := mine.side.unmatchable(rows)) is not None:
            rows = rows.filter(pa.array(~hopeless))
        if rows.num_rows:
            mine.table.write(mine.side.to_state(rows))
            self._count_panes(mine, mine.side.times(rows))

    def _in_windows(self, mine: _Input, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows that lie in an open window; rows that came too late are sent off."""
        if batch.num_rows == 0:
            return batch
        times = mine.side.input_times(batch)
        if self._windows.has_gaps:
            inside = self._windows.inside(times, mine.side.per_ms)
            if not inside.all():
                batch, times = batch.filter(pa.array(inside)), times[inside]
        if self._closed is not None and len(times) and int(times.min()) < self._closed * mine.side.per_ms:
            late = times < self._closed * mine.side.per_ms
            mine.late.emit(batch.filter(pa.array(late)))
            batch = batch.filter(pa.array(~late))
        return batch

    def _count_panes(self, mine: _Input, times: Int64Array) -> None:
        panes, counts = np.unique(self._windows.pane_starts(times, mine.side.per_ms), return_counts=True)
        for pane, count in zip(panes.tolist(), counts.tolist(), strict=True):
            self._panes[pane] = self._panes.get(pane, 0) + count
            end = self._windows.next_end(pane, self._watermark)
            if end is not None and (self._next_end is None or end < self._next_end):
                self._next_end = end

    # -- windows

    def on_watermark(self, watermark: int) -> None:
        """Fire the windows that end at or before the watermark, then let rows expire that no open window holds."""
        if self._watermark is None or watermark > self._watermark:
            before, self._watermark = self._watermark, watermark
            if self._next_end is not None and watermark >= self._next_end:
                for starts in self._groups(self._windows.firing(self._panes, before, watermark)):
                    self._fire(starts)
            self._move_bounds(watermark)
        if watermark == MAX_WATERMARK:
            for output in self.outputs:
                output.advance(watermark)
        else:
            self.output.advance(watermark - self._windows.length)

    def _groups(self, starts: list[int]) -> Iterator[Int64Array]:
        """Consecutive windows that are joined together: few enough rows that memory stays bounded."""
        panes = np.asarray(sorted(self._panes), dtype=np.int64)
        total = np.cumsum([0, *(self._panes[pane] for pane in panes.tolist())])
        windows = np.asarray(starts, dtype=np.int64)
        sizes = total[np.searchsorted(panes, windows + self._windows.length)] - total[np.searchsorted(panes, windows)]
        group = (np.cumsum(sizes) - 1) // _FIRE_ROWS
        yield from (part for part in np.split(windows, np.flatnonzero(np.diff(group)) + 1) if len(part))

    def _fire(self, starts: Int64Array) -> None:
        """Join the rows of some windows; emit pairs, then rows without a partner, by window."""
        left, right = (mine.held(starts, self._windows.length) for mine in self._inputs)
        met_left, met_right = np.zeros(len(left.copies), dtype=bool), np.zeros(len(right.copies), dtype=bool)
        for copies, there in self._pairs(left, right, starts):
            here, windows = left.copies[copies], left.windows[copies]
            met_left[copies] = True
            met_right[there + right.first[windows]] = True
            if self._how.pairs:
                pair = self._columns.pairs(take_rows(left.rows, here), take_rows(right.rows, there))
                self._emit(starts[windows], pair)
        if self._how is JoinHow.SEMI:
            self._emit_copies(left, starts, met_left, self._columns.left_alone)
        if self._how.left_alone:
            self._emit_copies(left, starts, ~met_left, self._columns.left_alone)
        if self._how.right_alone:
            self._emit_copies(right, starts, ~met_right, self._columns.right_alone)

    def _pairs(self, left: _Held, right: _Held, starts: Int64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Pairs of a left copy and a right row in the window of the copy, for which the filter holds."""
        if not left.rows.num_rows or not right.rows.num_rows:
            return
        mine, other = (each.side for each in self._inputs)
        keys = [
            pa.concat_arrays([left.rows.column(a), right.rows.column(b)])
            for a, b in zip(mine.keys, other.keys, strict=True)
        ]
        codes = key_codes(keys, left.rows.num_rows + right.rows.num_rows)
        here, there = codes[: left.rows.num_rows], codes[left.rows.num_rows :]
        order = stable_order(there + 1, int(there.max()) + 2, right.times)
        low = (starts * other.per_ms)[left.windows]
        high = low + (self._windows.length * other.per_ms - 1)
        first, counts = matching_ranges(here[left.copies], low, high, there[order], right.times[order])
        for copies, found in pairs_of(first, counts, _PAIRS_AT_ONCE):
            partners = order[found]
            if self._filter is not None:
                held = self._held(left, copies, right, partners)
                copies, partners = copies[held], partners[held]
            yield copies, partners

    def _held(self, left: _Held, copies: Int64Array, right: _Held, partners: Int64Array) -> Int64Array:
        assert self._filter is not None
        try:
            return self._filter.holding(left.rows, left.copies[copies], right.rows, partners)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error

    def _emit_copies(self, held: _Held, starts: Int64Array, which: Bools, columns: Any) -> None:
        if which.any():
            rows = take_rows(held.rows, held.copies[which])
            self._emit(starts[held.windows[which]], columns(rows))

    def _emit(self, starts: Int64Array, columns: list[pa.Array]) -> None:
        kind = self._schema.field(0).type
        bounds = [pa.array(times).view(kind) for times in (starts, starts + self._windows.length)]
        self.output.emit(pa.RecordBatch.from_arrays([*bounds, *columns], schema=self._schema))

    # -- progress

    def _move_bounds(self, watermark: int) -> None:
        """After a watermark: which times are late, which rows are dead, what fires next."""
        closed = min(self._windows.closed_before(watermark), MAX_WATERMARK)
        if self._closed is None or closed > self._closed:
            self._closed = closed
            dead = [pane for pane in self._panes if pane < closed]
            for pane in dead:
                del self._panes[pane]
            if dead:
                for mine in self._inputs:
                    mine.table.expire(min(closed * mine.side.per_ms, _INT64_MAX))
        if self._next_end is not None and watermark >= self._next_end:
            ends = (self._windows.next_end(pane, watermark) for pane in self._panes)
            self._next_end = min((end for end in ends if end is not None), default=None)

    def _restore(self) -> None:
        for mine in self._inputs:
            time = mine.side.time
            assert time is not None
            for batch in mine.table.scan(columns=[time]):
                self._count_panes(mine, mine.side.state_times(batch))
        if self._watermark is not None:
            self._move_bounds(self._watermark)
