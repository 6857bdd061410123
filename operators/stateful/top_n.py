"""The first n rows of every partition, by an order.

Two operators, by whether event time closes a partition:

* `ClosingTopN`: partitions are windows of event time, or hold the event time among their columns. Each batch is cut to
  what may still be among the first n and appended, blindly, to a table ordered by time; when the watermark has
  passed a partition, its rows are read, cut and emitted, once.
* `TopN`: partitions go on for ever. The first n rows of each are kept in a table by (partition, place); a batch is cut
  to n rows per partition, the kept rows of those partitions are read in one go, both are sorted together and cut
  again, and what changed its place is written. What was in those places before gives the changelog.

Rows that agree in the whole order come as they came in the stream. ``ties=all`` keeps every row that ranks
among the first n, where rows that agree in the order share a rank (SQL's ``rank() <= n``).

Invariants:

* Places of a partition are 1, 2, ... without gaps, in the order of the rows.
* A partition is emitted once by `ClosingTopN`; rows that come after it are late and set aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators.changelog import Emit, changelog_schema, told
from operators.graph import Port, StateNote
from operators.ordering import Bools, Groups, SortTerm, group_rows, order_codes
from operators.rows import combined, ranges
from operators.runtime import BaseOperator, BuildContext, Operator, Output
from operators.stateful.tables import sweep, unused_name
from operators.watermark import EventTimeColumn
from operators.windows import MAX_WATERMARK, Int64Array
from statebackend import StateBackend, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["ClosingTopN", "TopN", "TopNNode", "TopNSpec"]

_BUFFER_ROWS = 1 << 17
"""Rows gathered before partitions are read, where nothing is emitted before the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopNSpec:
    """The first ``n`` rows of ``schema`` per ``partition_by``, in the order of ``order_by``.

    ``closing``: the column of the event time if it closes partitions, with ``window_ms`` the length of the tumbling
    windows that are cut of it, None if it is one of the partition's columns. ``rank``: name of the column with the
    rank, None for none. ``window``: names of the columns with the start and end of the window.
    """

    schema: pa.Schema
    n: int
    partition_by: tuple[str, ...]
    order_by: tuple[SortTerm, ...]
    all_ties: bool
    rank: str | None
    emit: Emit
    closing: str | None = None
    window_ms: int | None = None
    window: tuple[str, str] = ("window_start_time", "window_end_time")

    @property
    def plain_schema(self) -> pa.Schema:
        """Window, input columns, rank."""
        fields = list(self.schema)
        if self.window_ms is not None:
            assert self.closing is not None
            zone = EventTimeColumn(self.schema, self.closing).zone
            fields = [*(pa.field(name, pa.timestamp("ms", zone)) for name in self.window), *fields]
        return pa.schema([*fields, *([] if self.rank is None else [pa.field(self.rank, pa.int64())])])

    @property
    def result_schema(self) -> pa.Schema:
        """Columns of the result."""
        return changelog_schema(self.plain_schema) if self.emit is Emit.CHANGELOG else self.plain_schema

    def grouped(self, rows: pa.RecordBatch, order: Sequence[Int64Array] | None = None) -> Groups:
        """The rows by partition, each in its order; windows are not told apart."""
        columns = [rows.column(name) for name in self.partition_by]
        return group_rows(columns, rows.num_rows, self.codes(rows) if order is None else order)

    def codes(self, rows: pa.RecordBatch) -> list[Int64Array]:
        """The codes of the order."""
        return order_codes(rows, self.order_by)

    def cut(self, groups: Groups, order: Sequence[Int64Array]) -> tuple[Groups, Int64Array]:
        """The first n rows of every group, and the rank of each."""
        starts = np.repeat(groups.starts, groups.sizes)
        ranks = np.arange(len(starts)) - starts + 1
        if self.all_ties and len(ranks):
            differs = ranks == 1
            for codes in order:
                ordered = codes[groups.order]
                differs[1:] |= ordered[1:] != ordered[:-1]
            # Rows that agree with the one before share its rank.
            leader = np.maximum.accumulate(np.where(differs, np.arange(len(ranks)), 0))
            ranks = ranks[leader]
        kept = ranks <= self.n
        sizes = np.add.reduceat(kept, groups.starts) if len(kept) else groups.starts
        return Groups(groups.order[kept], np.cumsum(sizes) - sizes), ranks[kept]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopNNode:
    """The first n rows per partition. Output 1: rows that came too late."""

    operator_id: str
    input: Port
    spec: TopNSpec

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def input_schema(self) -> pa.Schema:
        """Columns of the input, and of the rows that came too late."""
        return self.spec.schema

    @property
    def output_names(self) -> tuple[str, ...]:
        """The first rows, and those that came too late."""
        return ("", "late")

    @property
    def label(self) -> str:
        """For `explain`."""
        spec = self.spec
        partition = [*([] if spec.window_ms is None else [f"{spec.window_ms} ms"]), *spec.partition_by]
        ties = " with all ties" if spec.all_ties else ""
        order = ", ".join(map(str, spec.order_by))
        return f"top_n {self.operator_id}: {spec.n}{ties} per ({', '.join(partition)}) by {order}, {spec.emit}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """Rows that are or may be among the first n."""
        ties = ", and their ties" if self.spec.all_ties else ""
        growth = f"{self.spec.n} rows per partition{ties}"
        if self.spec.closing is not None:
            growth = f"at most {growth}, and batch, until the watermark has passed it"
        return (StateNote(f"{self.operator_id}:rows", growth, bounded=self.spec.closing is not None),)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        spec = self.spec
        return {
            "operator": "top_n",
            "n": spec.n,
            "partition_by": list(spec.partition_by),
            "order_by": [str(term) for term in spec.order_by],
            "ties": "all" if spec.all_ties else "first",
            "closing": spec.closing,
            "window_ms": spec.window_ms,
            "emit": str(spec.emit),
        }

    def build(self, context: BuildContext) -> Operator:
        """The operator, restored."""
        watermark = context.watermark(self.operator_id)
        if self.spec.closing is not None:
            return ClosingTopN(self.operator_id, self.spec, context.backend, watermark)
        return TopN(self.operator_id, self.spec, context.backend, watermark)


class ClosingTopN(BaseOperator):
    """Emits a partition when the watermark has passed it."""

    def __init__(self, operator_id: str, spec: TopNSpec, backend: StateBackend, watermark: int | None) -> None:
        super().__init__(operator_id)
        assert spec.closing is not None
        self.late = Output()
        self._spec = spec
        self._times = EventTimeColumn(spec.schema, spec.closing)
        self._watermark = watermark
        at = unused_name("at", spec.schema.names)
        self._stored = spec.schema.append(pa.field(at, pa.int64()))
        self._table: StateTable = backend.table(
            TableSpec(
                name=f"{operator_id}:rows",
                schema=self._stored,
                key=(at,),
                kind=TableKind.APPEND,
                order=TableOrder.TIME,
                time_field=at,
            )
        )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The first rows, and those that came too late."""
        return (self.output, self.late)

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return self._watermark

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Append what may be among the first n."""
        at = self._at(batch)
        limit = self._limit(self._watermark)
        if limit is not None and batch.num_rows and int(at.min()) < limit:
            late = at < limit
            self.late.emit(batch.filter(pa.array(late)))
            batch, at = batch.filter(pa.array(~late)), at[~late]
        if not batch.num_rows:
            return
        kept, _ = self._cut(batch, at)
        # Rows that agree in the whole order stay as they came.
        taken = batch.take(pa.array(kept.order))
        self._table.write(pa.RecordBatch.from_arrays([*taken.columns, pa.array(at[kept.order])], schema=self._stored))

    def on_watermark(self, watermark: int) -> None:
        """Emit the partitions that the watermark has passed."""
        if self._watermark is None or watermark > self._watermark:
            self._watermark = watermark
            limit = self._limit(watermark)
            if passed := self._table.scan(time_range=(None, limit)):
                self._emit(combined(passed, self._stored))
                assert limit is not None
                self._table.expire(limit)
        if watermark == MAX_WATERMARK:
            self.late.advance(watermark)
            self.output.advance(watermark)
        else:
            self.output.advance(watermark - (self._spec.window_ms or 0))

    def _at(self, batch: pa.RecordBatch) -> Int64Array:
        """Event time of the partition: the start of its window (ms), or the column as it is."""
        times = self._times.values(batch)
        if self._spec.window_ms is None:
            return times
        return np.floor_divide(times, self._spec.window_ms * self._times.per_ms) * self._spec.window_ms

    def _limit(self, watermark: int | None) -> int | None:
        """Partitions with an earlier time get no more rows."""
        if watermark is None or watermark == MAX_WATERMARK:
            return watermark
        if self._spec.window_ms is None:
            return watermark * self._times.per_ms
        return watermark - self._spec.window_ms + 1

    def _cut(self, batch: pa.RecordBatch, at: Int64Array) -> tuple[Groups, Int64Array]:
        spec = self._spec
        columns = [pa.array(at), *(batch.column(name) for name in spec.partition_by)]
        codes = spec.codes(batch)
        return spec.cut(group_rows(columns, batch.num_rows, codes), codes)

    def _emit(self, rows: pa.RecordBatch) -> None:
        spec = self._spec
        at = rows.column(rows.num_columns - 1).to_numpy()
        kept, ranks = self._cut(rows, at)
        by_time = np.argsort(at[kept.order], kind="stable")
        chosen = kept.order[by_time]
        columns = rows.take(pa.array(chosen)).columns[:-1]
        if spec.window_ms is not None:
            kind = spec.plain_schema.field(0).type
            starts = at[chosen]
            columns = [pa.array(starts).view(kind), pa.array(starts + spec.window_ms).view(kind), *columns]
        if spec.rank is not None:
            columns.append(pa.array(ranks[by_time], pa.int64()))
        self.output.emit(pa.RecordBatch.from_arrays(columns, schema=spec.plain_schema))


class TopN(BaseOperator):
    """Keeps the first n rows of partitions that never close."""

    def __init__(self, operator_id: str, spec: TopNSpec, backend: StateBackend, watermark: int | None) -> None:
        super().__init__(operator_id)
        self.late = Output()
        self._spec = spec
        self._watermark = watermark
        names = spec.schema.names
        self._whole = unused_name("partition", names)
        self._place = unused_name("place", names)
        # Without partition columns, a column that is the same everywhere stands for the one partition.
        self._keys = list(spec.partition_by) or [self._whole]
        whole = [] if spec.partition_by else [pa.field(self._whole, pa.bool_())]
        self._table: StateTable = backend.table(
            TableSpec(
                name=f"{operator_id}:rows",
                schema=pa.schema([*spec.schema, *whole, (self._place, pa.int64())]),
                key=(*self._keys, self._place),
                kind=TableKind.UPSERT,
                # Not a time, but what orders the rows of a partition.
                time_field=self._place,
            )
        )
        self._buffer: list[pa.RecordBatch] = []
        self._buffered = 0

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The first rows; nothing is ever late."""
        return (self.output, self.late)

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return self._watermark

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Keep the first rows, and tell at once how they changed unless that is not wanted."""
        if not batch.num_rows:
            return
        if self._spec.emit is not Emit.FINAL:
            self._merge(batch)
            return
        codes = self._spec.codes(batch)
        kept, _ = self._spec.cut(self._spec.grouped(batch, codes), codes)
        # Rows that agree in the whole order stay as they came.
        self._buffer.append(batch.take(pa.array(kept.order)))
        self._buffered += len(kept.order)
        if self._buffered >= _BUFFER_ROWS:
            self.drain()

    def drain(self) -> None:
        """Merge what was gathered."""
        if self._buffer:
            batches, self._buffer, self._buffered = self._buffer, [], 0
            self._merge(combined(batches, self._spec.schema))

    def on_watermark(self, watermark: int) -> None:
        """At the end of the input, emit, if it was not done at once."""
        final = self._spec.emit is Emit.FINAL
        if watermark == MAX_WATERMARK:
            if final and self._watermark != MAX_WATERMARK:
                self.drain()
                for batches in sweep(self._table):
                    self._emit_final(combined(batches, batches[0].schema))
            self.late.advance(watermark)
        self._watermark = watermark
        if not final or watermark == MAX_WATERMARK:
            self.output.advance(watermark)

    def _merge(self, batch: pa.RecordBatch) -> None:
        spec = self._spec
        codes = spec.codes(batch)
        kept, _ = spec.cut(spec.grouped(batch, codes), codes)
        new = batch.take(pa.array(kept.order))
        keys = self._with_whole(new).select(self._keys).take(pa.array(kept.starts))
        stored, number = self._kept_rows(keys)
        rows = pa.concat_batches([stored, new])
        groups = np.concatenate([number, kept.ids])
        codes = spec.codes(rows)
        merged, _ = spec.cut(group_rows((), rows.num_rows, codes, groups), codes)
        self._replace(keys, rows, number, merged, np.bincount(groups[merged.order], minlength=keys.num_rows))

    def _kept_rows(self, keys: pa.RecordBatch) -> tuple[pa.RecordBatch, Int64Array]:
        """The kept rows of some partitions, in the order of their places, with the number of the partition."""
        found = self._table.matches(keys)
        rows = found.batch.select(self._spec.schema.names)
        return pa.RecordBatch.from_arrays(rows.columns, schema=self._spec.schema), found.key_index.to_numpy()

    def _replace(
        self, keys: pa.RecordBatch, rows: pa.RecordBatch, stored: Int64Array, merged: Groups, sizes: Int64Array
    ) -> None:
        """Write what has another place than before, delete the places that are no more, and emit the difference.

        ``rows``: the stored rows, then new ones; ``merged``: those that are kept now, by partition and place.
        """
        places = np.arange(len(merged.order)) - np.repeat(merged.starts, merged.sizes) + 1
        before = np.bincount(stored, minlength=keys.num_rows)
        first = np.cumsum(before) - before
        partition = np.repeat(np.arange(keys.num_rows), sizes)
        had = places <= before[partition]
        old = np.where(had, first[partition] + places - 1, 0)
        moved = ~had | (merged.order != old)
        after = rows.take(pa.array(merged.order[moved]))
        self._table.write(self._with_place(after, places[moved]))
        shrunk = np.maximum(before - sizes, 0)
        if shrunk.any():
            self._delete(keys, np.repeat(np.arange(keys.num_rows), shrunk), ranges(sizes + 1, shrunk))
        if self._spec.emit is not Emit.FINAL:
            self._emit_changes(rows.take(pa.array(old[moved])), had[moved], after, places[moved])

    def _emit_changes(self, before: pa.RecordBatch, had: Bools, after: pa.RecordBatch, places: Int64Array) -> None:
        old, new = self._ranked(before, places), self._ranked(after, places)
        for changed in told(self._spec.emit, old, had, new, np.ones(len(had), dtype=bool)):
            self.output.emit(changed)

    def _emit_final(self, rows: pa.RecordBatch) -> None:
        """All kept rows of some partitions, with their ranks."""
        # By their places, as the table does not keep the order in which rows came; by the order where ranks are shared.
        codes = self._spec.codes(rows) if self._spec.all_ties else [rows.column(self._place).to_numpy()]
        kept, ranks = self._spec.cut(self._spec.grouped(rows, codes), codes)
        self.output.emit(self._ranked(rows.take(pa.array(kept.order)), ranks))

    def _ranked(self, rows: pa.RecordBatch, ranks: Int64Array) -> pa.RecordBatch:
        columns = rows.select(self._spec.schema.names).columns
        if self._spec.rank is not None:
            columns.append(pa.array(ranks, pa.int64()))
        return pa.RecordBatch.from_arrays(columns, schema=self._spec.plain_schema)

    def _with_whole(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        if self._spec.partition_by:
            return rows
        return rows.append_column(self._whole, pa.array(np.ones(rows.num_rows, dtype=bool)))

    def _with_place(self, rows: pa.RecordBatch, places: Int64Array) -> pa.RecordBatch:
        columns = [*self._with_whole(rows).columns, pa.array(places, pa.int64())]
        return pa.RecordBatch.from_arrays(columns, schema=self._table.spec.schema)

    def _delete(self, keys: pa.RecordBatch, partitions: Int64Array, places: Int64Array) -> None:
        gone = keys.take(pa.array(partitions))
        self._table.delete(gone.append_column(self._place, pa.array(places, pa.int64())))
