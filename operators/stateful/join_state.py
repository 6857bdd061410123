"""Stored rows of one side of a join: which have met a partner, and which can meet none any more.

Rows of a side that come out alone, or at their first partner, are numbered as they come. Which numbers have met a
partner is known in memory, a byte per row, and lies in a small append table of (number, event time), from which it is
rebuilt. It is written once per row; nothing is read, so a pair costs no lookup.

Rows that no future row can match are taken out by event time, in order, a stretch of time ahead of what is due, since
a table in the order of its keys is read whole for any stretch of time. A stretch is complete when it is read: the
watermark has passed it.

Invariants:

* A number belongs to one live row; of two rows with one number, one was dead before the other came.
* Every row is given out once by `due`: up to the bound that follows from the committed watermark they were given out
  before.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pyarrow as pa

from operators.pairs import Bools
from operators.rows import combined
from operators.stateful.join_parts import JoinSide
from operators.windows import Int64Array
from statebackend import StateBackend, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["MatchFlags", "StoredSide"]

_NUMBER = "row"
_TIME = "time"
_STRETCHES = 16
"""Times that a table is read while a row waits in it: so many stretches make up the time that it waits."""
_RESTORED_ROWS = 1 << 16


class MatchFlags:
    """Which numbered rows have met a partner."""

    def __init__(self, table: StateTable, numbers: Int64Array, times: Int64Array) -> None:
        """``numbers`` and ``times``: of the live rows that were restored."""
        self._table = table
        order = np.argsort(numbers)
        self._base = int(numbers[order[0]]) if len(order) else 0
        self._next = int(numbers[order[-1]]) + 1 if len(order) else 0
        self._met: Bools = np.zeros(max(1024, 2 * (self._next - self._base)), dtype=bool)
        # (first number after them, latest time) of rows that came together.
        self._given: deque[tuple[int, int]] = deque()
        for at in range(0, len(order), _RESTORED_ROWS):
            some = order[at : at + _RESTORED_ROWS]
            self._given.append((int(numbers[some[-1]]) + 1, int(times[some].max())))
        for batch in table.scan(columns=[_NUMBER]):
            found = batch.column(0).to_numpy()
            self._met[found[(found >= self._base) & (found < self._next)] - self._base] = True

    def number(self, times: Int64Array) -> Int64Array:
        """Numbers for new rows of these times."""
        first, self._next = self._next, self._next + len(times)
        if self._next - self._base > len(self._met):
            grown = np.zeros(2 * (self._next - self._base), dtype=bool)
            grown[: len(self._met)] = self._met
            self._met = grown
        self._given.append((self._next, int(times.max())))
        return np.arange(first, self._next)

    def met(self, numbers: Int64Array) -> Bools:
        """Which of the rows have met a partner."""
        return self._met[numbers - self._base]

    def mark(self, numbers: Int64Array, times: Int64Array) -> Int64Array:
        """These rows have met a partner; returns the positions, one per row, of those that had not before."""
        fresh = np.flatnonzero(~self.met(numbers))
        if not len(fresh):
            return fresh
        _, first = np.unique(numbers[fresh], return_index=True)
        fresh = np.sort(fresh[first])
        self._met[numbers[fresh] - self._base] = True
        columns = [pa.array(numbers[fresh]), pa.array(times[fresh])]
        self._table.write(pa.RecordBatch.from_arrays(columns, names=[_NUMBER, _TIME]))
        return fresh

    def expire(self, before: int) -> None:
        """Forget rows of earlier times."""
        self._table.expire(before)
        base = self._base
        while self._given and self._given[0][1] < before:
            base = self._given.popleft()[0]
        if base - self._base > len(self._met) // 2:
            kept = self._met[base - self._base : self._next - self._base]
            self._met = np.zeros(max(1024, 2 * len(kept)), dtype=bool)
            self._met[: len(kept)] = kept
            self._base = base


class StoredSide:
    """The rows of one side that wait for partners.

    ``reach``: how many units of event time a row waits at most; None for ever. ``decided``: rows below this time were
    given out by `due` before the restored checkpoint.
    """

    def __init__(
        self, side: JoinSide, backend: StateBackend, name: str, *, reach: int | None, decided: int | None
    ) -> None:
        self.side = side
        self.table = backend.table(side.table_spec(name, TableOrder.HASH))
        self.flags: MatchFlags | None = None
        self._reach = reach
        self._decided = decided
        self._expired = self.table.watermark
        # Rows from `_decided` to `_read_to` that are not given out yet, by time.
        self._ahead = combined([], side.state_schema)
        self._ahead_times: Int64Array = np.empty(0, dtype=np.int64)
        self._read_to = decided
        if side.numbered:
            self.flags = self._restored_flags(backend, name)

    def write(self, rows: pa.RecordBatch, times: Int64Array | None, met: Bools | None = None) -> None:
        """Keep rows; ``met``: which of them have met a partner already."""
        numbers = None
        if self.flags is not None and rows.num_rows:
            times = np.zeros(rows.num_rows, dtype=np.int64) if times is None else times
            numbers = self.flags.number(times)
            if met is not None and met.any():
                self.flags.mark(numbers[met], times[met])
        self.table.write(self.side.to_state(rows, numbers))

    def numbers(self, state: pa.RecordBatch) -> Int64Array:
        """The numbers of stored rows."""
        numbers: Int64Array = state.column(self.side.number_column).to_numpy()
        return numbers

    def due(self, bound: int, complete: int) -> pa.RecordBatch:
        """Rows below ``bound`` that were not given out and have met no partner, as rows, by time.

        No row below ``complete`` will be written any more.
        """
        assert self.flags is not None
        if self._decided is not None and bound <= self._decided:
            return combined([], self.side.rows_schema)
        if self._read_to is None or bound > self._read_to:
            self._read_ahead(bound, max(bound, complete))
        count = int(np.searchsorted(self._ahead_times, bound))
        state, self._ahead = self._ahead.slice(0, count), self._ahead.slice(count)
        self._ahead_times = self._ahead_times[count:]
        self._decided = bound
        alone = ~self.flags.met(self.numbers(state))
        return self.side.from_state(state if alone.all() else state.filter(pa.array(alone)))

    def expire(self, bound: int, *, now: bool = False) -> None:
        """Rows below ``bound`` are dead; they go when it is worth it, or ``now``."""
        if self._expired is not None:
            stretch = 0 if now else (self._reach or 0) // _STRETCHES
            if bound <= self._expired + stretch:
                return
        self._expired = bound
        self.table.expire(bound)
        if self.flags is not None:
            self.flags.expire(bound)

    def _read_ahead(self, bound: int, complete: int) -> None:
        end = max(bound, min(complete, bound + (self._reach or 0) // _STRETCHES))
        found = self.table.scan(time_range=(self._read_to, end))
        batch = combined([self._ahead, *found] if self._ahead.num_rows else found, self.side.state_schema)
        times = self.side.state_times(batch)
        order = np.lexsort((self.numbers(batch), times))
        self._ahead, self._ahead_times = batch.take(pa.array(order)), times[order]
        self._read_to = end

    def _restored_flags(self, backend: StateBackend, name: str) -> MatchFlags:
        spec = TableSpec(
            name=f"{name}_met",
            schema=pa.schema([(_NUMBER, pa.int64()), (_TIME, pa.int64())]),
            key=(_NUMBER, _TIME),
            kind=TableKind.APPEND,
            order=TableOrder.TIME,
            time_field=_TIME,
        )
        columns = [self.side.number_column, *([] if self.side.time is None else [self.side.time])]
        schema = pa.schema([self.side.state_schema.field(column) for column in columns])
        rows = combined(self.table.scan(columns=columns), schema)
        return MatchFlags(backend.table(spec), self.numbers(rows), self.times(rows))

    def times(self, state: pa.RecordBatch) -> Int64Array:
        """Event time of stored rows; zero where the join does not look at time."""
        if self.side.time is None:
            return np.zeros(state.num_rows, dtype=np.int64)
        return self.side.state_times(state)
