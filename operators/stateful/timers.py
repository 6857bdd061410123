"""Timers of keys: a table of (time, key) in the order of time.

Invariants:

* A timer fires once. What is due is taken out before it fires, so that a timer set meanwhile is another one.
* Times that have passed already never reach the table, whose watermark is how far timers have fired; they are
  handed back to be fired at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from operators.rows import combined
from operators.stateful.tables import unused_name
from operators.windows import Int64Array
from statebackend import StateBackend, TableKind, TableOrder, TableSpec

__all__ = ["Timers"]


class Timers:
    """The timers of one operator. ``keys``: the columns of a key."""

    def __init__(self, backend: StateBackend, name: str, keys: pa.Schema) -> None:
        time = unused_name("time", keys.names)
        self._names = keys.names
        self._table = backend.table(
            TableSpec(
                name=name,
                schema=pa.schema([pa.field(time, pa.int64(), nullable=False), *keys]),
                key=(time, *keys.names),
                kind=TableKind.UPSERT,
                order=TableOrder.TIME,
                time_field=time,
            )
        )
        times = [_times(b) for b in self._table.scan(columns=[time])]
        self._next: int | None = min((int(t.min()) for t in times if len(t)), default=None)

    @property
    def schema(self) -> pa.Schema:
        """Columns of a timer: time and key."""
        return self._table.spec.schema

    @property
    def passed(self) -> int | None:
        """Timers before this time have fired."""
        return self._table.watermark

    def set(self, times: Int64Array, keys: pa.RecordBatch) -> pa.RecordBatch:
        """Set timers (times in epoch ms, a key for each); those whose time has passed are returned as rows, unset."""
        rows = self._rows(times, keys)
        late = times < self.passed if self.passed is not None else np.zeros(len(times), dtype=bool)
        coming = rows.filter(pa.array(~late))
        if coming.num_rows:
            self._table.write(coming)
            first = int(_times(coming).min())
            self._next = first if self._next is None else min(first, self._next)
        return rows.filter(pa.array(late))

    def delete(self, times: Int64Array, keys: pa.RecordBatch) -> None:
        """Forget these timers, where there are any."""
        if len(times):
            self._table.delete(self._rows(times, keys))

    def take_due(self, before: int) -> pa.RecordBatch:
        """Take out the timers with a time below ``before``, in the order of time: rows of time and key."""
        schema = self._table.spec.schema
        if self._next is None or self._next >= before:
            return combined([], schema)
        due = combined(self._table.scan(time_range=(None, before)), schema)
        self._table.expire(before)
        self._next = before
        return due.take(pa.array(np.argsort(_times(due), kind="stable")))

    def split(self, due: pa.RecordBatch) -> tuple[Int64Array, pa.RecordBatch]:
        """Times and keys of rows that were returned by `set` or `take_due`."""
        return _times(due), due.select(self._names)

    def _rows(self, times: Int64Array, keys: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([pa.array(times), *_columns(keys)], schema=self._table.spec.schema)


def _columns(keys: pa.RecordBatch) -> Sequence[pa.Array]:
    columns: Sequence[pa.Array] = keys.columns
    return columns


def _times(rows: pa.RecordBatch) -> Int64Array:
    times: Int64Array = rows.column(0).to_numpy(zero_copy_only=False)
    return times
