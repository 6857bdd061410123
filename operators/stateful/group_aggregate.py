"""Group aggregation without windows: one row per group that goes on changing, or one at the end.

Rows become partial states, as in a windowed aggregation; what follows depends on when results are wanted:

* at the end of the input: states are written blindly into an aggregate table, and finalised once;
* as a changelog or as upserts: each batch's states are merged with those that are kept for its groups, and the
  results before and after are compared. The states are read in any case, so the merged ones are
  simply put in their place, one row per group. Results of before and after are matched by number: the same
  aggregates compiled over numbered groups;
* at intervals of event time: states wait in a table of their own, written blindly, until the watermark enters the
  next interval; then they are merged as one batch would be.

A changelog is aggregated by adding what is inserted and subtracting what is taken back (`Aggregation.retract`); a group
of which no row is left is deleted.

Invariants:

* What is emitted together follows from batches and watermarks alone, as all that waits is in tables.
* With a ttl a group is forgotten when the watermark has passed its newest row by the ttl; older rows are late and set
  aside. Nothing is emitted when a group is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.changelog import Emit, changelog_schema, retracts, told
from operators.graph import Port, StateNote
from operators.ordering import Bools, group_rows
from operators.rows import combined
from operators.runtime import BaseOperator, BuildContext, Cursor, Operator, Output, user_error
from operators.stateful.tables import keeps_every_value, sweep
from operators.watermark import EventTimeColumn
from operators.windows import MAX_WATERMARK, Int64Array
from statebackend import Aggregation, StateBackend, StateMerger, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["NEWEST_STATE", "TICK", "GroupAggregate", "GroupAggregateNode", "GroupSpec", "GroupTotals"]

TICK = "tick"
"""Base name of the column with the number of the interval in which a state waits."""

NEWEST_STATE = "a0_max"
"""State column with the newest event time of a group: with a ttl, its maximum is the first aggregate."""

_BEGIN = -(1 << 53)
"""The time before the first watermark."""
_BUFFER_ROWS = 1 << 17
_NUMBER = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """What is aggregated, and how it is told.

    ``aggregation``: by the groups, and with ``every_ms`` by ``tick_name`` before them. ``hidden``: columns of its
    result that are not part of the output; among them ``rows_name``, over a changelog, the number of rows of a group.
    """

    input_schema: pa.Schema
    event_time: str | None
    aggregation: Aggregation
    hidden: frozenset[str]
    emit: Emit
    changelog_input: bool
    rows_name: str | None
    tick_name: str | None
    every_ms: int | None
    ttl_ms: int | None

    @property
    def groups(self) -> pa.Schema:
        """The group columns."""
        keys = self.aggregation.merger.key_schema
        return pa.schema([f for f in keys if f.name != self.tick_name])

    @property
    def plain_schema(self) -> pa.Schema:
        """Group columns and aggregates."""
        hidden = self.hidden | {self.tick_name}
        return pa.schema([f for f in self.aggregation.merger.result_schema if f.name not in hidden])

    @property
    def result_schema(self) -> pa.Schema:
        """Columns of the result."""
        return changelog_schema(self.plain_schema) if self.emit is Emit.CHANGELOG else self.plain_schema


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupAggregateNode:
    """A group aggregation. Output 1: with a ttl, rows that came too late."""

    operator_id: str
    input: Port
    spec: GroupSpec
    group_by: tuple[str, ...]
    aggregates: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def input_schema(self) -> pa.Schema:
        """Columns of the input, and of the rows that came too late."""
        return self.spec.input_schema

    @property
    def output_names(self) -> tuple[str, ...]:
        """The groups, and rows that came too late."""
        return ("", "late")

    @property
    def label(self) -> str:
        """For `explain`."""
        every = "" if self.spec.every_ms is None else f" every {self.spec.every_ms} ms"
        names = ", ".join(self.spec.plain_schema.names)
        return f"aggregate {self.operator_id}: {names}, {self.spec.emit}{every}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """States by group, and those that wait."""
        ttl = self.spec.ttl_ms
        growth = "one row per group" if self.group_by else "one row"
        if ttl is not None:
            growth += f" of the last {ttl} ms of event time"
        endless = keeps_every_value(self.spec.aggregation)
        if endless:
            growth += ", with all its values"
        bounded = (ttl is not None or not self.group_by) and not endless
        notes = [StateNote(f"{self.operator_id}:groups", growth, bounded=bounded)]
        if self.spec.every_ms is not None:
            growth = f"one row per group that changed in the last {self.spec.every_ms} ms of event time"
            notes.append(StateNote(f"{self.operator_id}:waiting", growth, bounded=True))
        return tuple(notes)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored; ``states``: that kept states mean what they did."""
        spec = self.spec
        return {
            "operator": "aggregate",
            "group_by": list(self.group_by),
            "aggregates": list(self.aggregates),
            "emit": str(spec.emit),
            "changelog": spec.changelog_input,
            "every_ms": spec.every_ms,
            "ttl_ms": spec.ttl_ms,
            "states": spec.aggregation.merger.fingerprint,
        }

    def build(self, context: BuildContext) -> Operator:
        """The operator, restored."""
        kind: type[GroupTotals | GroupAggregate] = GroupTotals if self.spec.emit is Emit.FINAL else GroupAggregate
        watermark = context.watermark(self.operator_id)
        return kind(self.operator_id, self.spec, context.backend, watermark, context.cursor)


class _Grouping(BaseOperator):
    """What both have in common: rows to states, watermark, lateness."""

    def __init__(
        self, operator_id: str, spec: GroupSpec, backend: StateBackend, watermark: int | None, cursor: Cursor
    ) -> None:
        super().__init__(operator_id)
        self.late = Output()
        self._spec = spec
        self._backend = backend
        self._groups = spec.groups
        self._watermark = watermark
        self._cursor = cursor

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The groups, and rows that came too late."""
        return (self.output, self.late)

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return self._watermark

    def _states(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Partial states of rows; over a changelog those that are taken back are subtracted."""
        aggregation = self._spec.aggregation
        try:
            if not self._spec.changelog_input:
                return aggregation.partial(batches)
            back = [retracts(batch) for batch in batches]
            states = aggregation.partial([b.filter(pa.array(~r)) for b, r in zip(batches, back, strict=True)])
            gone = [b.filter(pa.array(r)) for b, r in zip(batches, back, strict=True) if r.any()]
            return [*states, *aggregation.retract(gone)] if gone else states
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error

    def _is_left(self, results: pa.RecordBatch) -> pa.BooleanArray | None:
        """Which groups have rows; None where no row is ever taken back."""
        if self._spec.rows_name is None:
            return None
        return pc.greater(results.column(self._spec.rows_name), 0)


class GroupTotals(_Grouping):
    """Emits every group once, at the end of the input."""

    def __init__(
        self, operator_id: str, spec: GroupSpec, backend: StateBackend, watermark: int | None, cursor: Cursor
    ) -> None:
        super().__init__(operator_id, spec, backend, watermark, cursor)
        merger = spec.aggregation.merger
        self._table: StateTable = backend.table(
            TableSpec(
                name=f"{operator_id}:groups",
                schema=merger.state_schema,
                key=tuple(merger.key_schema.names),
                kind=TableKind.AGGREGATE,
                aggregation=spec.aggregation.declaration,
            )
        )
        self._buffer: list[pa.RecordBatch] = []
        self._buffered = 0

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Gather rows until a pass over them is worth it."""
        self._buffer.append(batch)
        self._buffered += batch.num_rows
        if self._buffered >= _BUFFER_ROWS:
            self.drain()

    def drain(self) -> None:
        """Write the states of what was gathered."""
        batches, self._buffer, self._buffered = self._buffer, [], 0
        for states in self._states(batches) if batches else ():
            self._table.write(states)

    def on_watermark(self, watermark: int) -> None:
        """At the end of the input, finalise; before that the result has no event time to hand on."""
        if watermark != MAX_WATERMARK:
            self._watermark = watermark
            return
        if self._watermark != MAX_WATERMARK:
            self._watermark = watermark
            self.drain()
            for states in sweep(self._table, merged=False):
                for results in self._spec.aggregation.merger.final(states):
                    left = self._is_left(results)
                    rows = results if left is None else results.filter(left)
                    self.output.emit(rows.select(self._spec.plain_schema.names))
        self.late.advance(watermark)
        self.output.advance(watermark)


class GroupAggregate(_Grouping):
    """Emits what changed, after each batch or each interval of event time."""

    def __init__(
        self, operator_id: str, spec: GroupSpec, backend: StateBackend, watermark: int | None, cursor: Cursor
    ) -> None:
        super().__init__(operator_id, spec, backend, watermark, cursor)
        merger = spec.aggregation.merger
        self._state_names = merger.state_schema.names[len(merger.key_schema) :]
        self._table_schema = pa.schema(
            [*self._groups, *(f.with_nullable(True) for f in merger.state_schema if f.name in self._state_names)]
        )
        self._table: StateTable = backend.table(
            TableSpec(
                name=f"{operator_id}:groups",
                schema=self._table_schema,
                key=tuple(self._groups.names),
                kind=TableKind.UPSERT,
                ttl_field=None if spec.ttl_ms is None else NEWEST_STATE,
                aggregation=merger.declared(self._groups, spec.plain_schema.names),
            )
        )
        self._by_number: StateMerger = merger.regrouped(pa.schema([(_NUMBER, pa.int64())]))
        self._times = None
        if spec.ttl_ms is not None:
            assert spec.event_time is not None
            self._times = EventTimeColumn(spec.input_schema, spec.event_time)
        self._waiting = None if spec.every_ms is None else self._open_waiting()

    def _open_waiting(self) -> StateTable:
        merger = self._spec.aggregation.merger
        return self._backend.table(
            TableSpec(
                name=f"{self.operator_id}:waiting",
                schema=merger.state_schema,
                key=tuple(merger.key_schema.names),
                kind=TableKind.AGGREGATE,
                order=TableOrder.TIME,
                time_field=self._spec.tick_name,
                aggregation=self._spec.aggregation.declaration,
            )
        )

    # -- batches and watermarks

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Aggregate the rows, and merge them into their groups now or later."""
        batch = self._on_time(batch)
        if not batch.num_rows:
            return
        if self._waiting is None:
            self._apply(self._states([batch]))
            return
        ticks = pa.array(np.full(batch.num_rows, self._tick_of(self._watermark)))
        schema = batch.schema.append(pa.field(self._spec.tick_name, pa.int64()))
        for states in self._states([pa.RecordBatch.from_arrays([*batch.columns, ticks], schema=schema)]):
            self._waiting.write(states)

    def on_watermark(self, watermark: int) -> None:
        """Merge what waited if an interval has ended, and forget what is older than the ttl."""
        before = self._watermark
        if before is None or watermark > before:
            self._watermark = watermark
            tick = self._tick_of(watermark)
            if self._waiting is not None and (tick > self._tick_of(before) or watermark == MAX_WATERMARK):
                for waited in sweep(self._waiting):
                    self._apply([batch.select(self._table_schema.names) for batch in waited])
                self._waiting.expire(tick)
            if (forgotten := self._forgotten) is not None:
                self._table.expire(forgotten)
        super().on_watermark(watermark)

    def _tick_of(self, watermark: int | None) -> int:
        every = self._spec.every_ms
        return 0 if every is None else (_BEGIN if watermark is None else watermark) // every

    @property
    def _forgotten(self) -> int | None:
        """Groups are forgotten whose newest row has a time before this, in the unit of the event time."""
        if self._times is None or self._watermark in (None, MAX_WATERMARK):
            return None
        assert self._watermark is not None
        assert self._spec.ttl_ms is not None
        return self._times.raw_limit(self._watermark - self._spec.ttl_ms)

    def _on_time(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        forgotten = self._forgotten
        if forgotten is None or self._times is None or not batch.num_rows:
            return batch
        late = batch.column(self._times.index).view(pa.int64()).to_numpy() < forgotten
        if not late.any():
            return batch
        self.late.emit(batch.filter(pa.array(late)))
        return batch.filter(pa.array(~late))

    # -- states

    def _apply(self, states: Sequence[pa.RecordBatch]) -> None:
        """Merge the states into their groups, and emit how the results change."""
        schema = self._table_schema
        new = combined([batch.select(schema.names).cast(schema) for batch in states], schema)
        if not new.num_rows:
            return
        new, numbers = self._numbered(new)
        keys = new.select(self._groups.names)
        found = self._table.lookup(keys)
        had = found.hit.to_numpy(zero_copy_only=False)
        old = self._under_number(found.batch.filter(found.hit), np.flatnonzero(had))
        both = self._by_number.reduce([old, self._under_number(*numbers)])
        merged = self._in_order(both, self._by_number.state_schema)
        before = self._results(keys.filter(found.hit), [old])
        after = self._results(keys, [merged])
        left = self._is_left(after)
        has = np.ones(len(had), dtype=bool) if left is None else left.to_numpy(zero_copy_only=False)
        self._keep(keys, merged, had, has)
        self._emit(before, had, after, has)

    def _numbered(self, states: pa.RecordBatch) -> tuple[pa.RecordBatch, tuple[pa.RecordBatch, Int64Array]]:
        """One row per group, whose place is the group's number; and the states with the number of each."""
        if not self._spec.changelog_input:
            # One call of `Aggregation.partial` gives one row per group, and so does a merged table.
            return states, (states, np.arange(states.num_rows))
        groups = group_rows(states.select(self._groups.names).columns, states.num_rows)
        numbers = np.empty(states.num_rows, dtype=np.int64)
        numbers[groups.order] = groups.ids
        return states.take(pa.array(groups.firsts)), (states, numbers)

    def _under_number(self, states: pa.RecordBatch, numbers: Int64Array) -> pa.RecordBatch:
        schema = self._by_number.state_schema
        columns = [pa.array(numbers, pa.int64()), *(states.column(name) for name in self._state_names)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _in_order(self, batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
        rows = combined(batches, schema)
        return rows.take(pa.array(np.argsort(rows.column(0).to_numpy(), kind="stable")))

    def _results(self, keys: pa.RecordBatch, states: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
        """Group columns and all aggregates, hidden ones too, in the order of the numbers."""
        results = self._in_order(self._by_number.final(states), self._by_number.result_schema)
        fields = [*self._groups, *list(self._by_number.result_schema)[1:]]
        return pa.RecordBatch.from_arrays([*keys.columns, *results.columns[1:]], schema=pa.schema(fields))

    def _keep(self, keys: pa.RecordBatch, merged: pa.RecordBatch, had: Bools, has: Bools) -> None:
        columns = [*keys.columns, *(merged.column(name) for name in self._state_names)]
        rows = pa.RecordBatch.from_arrays(columns, schema=self._table_schema)
        if has.all():
            self._table.write(rows)
            return
        self._table.write(rows.filter(pa.array(has)))
        gone = keys.filter(pa.array(had & ~has))
        if gone.num_rows:
            self._table.delete(gone)

    def _emit(self, before: pa.RecordBatch, had: Bools, after: pa.RecordBatch, has: Bools) -> None:
        names = self._spec.plain_schema.names
        places = np.cumsum(had) - 1
        old = before.select(names).take(pa.array(places, mask=~had))
        for changed in told(self._spec.emit, old, had, after.select(names), has):
            self.output.emit(changed)
