"""The valid rows of a stream that corrects itself: at the end, or from time to time.

A changelog or a stream of upserts says, row by row, which row of each key is valid. Kept in a table by key that is
the result itself. `FinalRows` emits it once, at the end of the input. `UpdatesEvery` hands changes on at
intervals of event time: what a key goes through within an interval waits in a table where the newest row of
a key takes the place of the one before; when the watermark enters the next interval, each key that changed is
emitted once, compared with what was emitted before.

Invariant: within a batch only the last row of a key counts, as it tells what holds after the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators.changelog import OP, Emit, Updates, retracts, told
from operators.graph import Port, StateNote
from operators.ordering import group_rows
from operators.runtime import BaseOperator, BuildContext, Operator
from operators.stateful.tables import sweep, unused_name
from operators.windows import MAX_WATERMARK
from statebackend import StateBackend, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["FinalRows", "MaterializeNode", "UpdatesEvery"]

_BEGIN = -(1 << 53)
"""The time before the first watermark."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaterializeNode:
    """The valid rows of ``schema`` by ``updates.key``; ``every_ms``: None at the end of the input."""

    operator_id: str
    input: Port
    input_schema: pa.Schema
    updates: Updates
    every_ms: int | None

    @property
    def schema(self) -> pa.Schema:
        """Columns of the rows themselves."""
        return pa.schema([f for f in self.input_schema if not (self.updates.changelog and f.name == OP)])

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The rows."""
        return ("",)

    @property
    def label(self) -> str:
        """For `explain`."""
        key = ", ".join(self.updates.key)
        if self.every_ms is None:
            return f"final_rows {self.operator_id}: by ({key})"
        return f"updates_every {self.operator_id}: by ({key}) every {self.every_ms} ms"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """The valid rows, and what waits."""
        notes = []
        if self.every_ms is None or self.updates.changelog:
            notes.append(StateNote(f"{self.operator_id}:rows", "one row per key", bounded=False))
        if self.every_ms is not None:
            growth = f"one row per key that changed in the last {self.every_ms} ms of event time"
            notes.append(StateNote(f"{self.operator_id}:waiting", growth, bounded=True))
        return tuple(notes)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        updates = {"key": list(self.updates.key), "changelog": self.updates.changelog}
        return {"operator": "materialize", "every_ms": self.every_ms, **updates}

    def build(self, context: BuildContext) -> Operator:
        """The operator, restored."""
        kind: type[FinalRows | UpdatesEvery] = FinalRows if self.every_ms is None else UpdatesEvery
        return kind(self, context.backend, context.watermark(self.operator_id))


class _Materializing(BaseOperator):
    def __init__(self, node: MaterializeNode, watermark: int | None) -> None:
        super().__init__(node.operator_id)
        self._node = node
        self._key = list(node.updates.key)
        self._schema = node.schema
        self._watermark = watermark

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return self._watermark

    def _rows_spec(self) -> TableSpec:
        return TableSpec(
            name=f"{self.operator_id}:rows", schema=self._schema, key=self._node.updates.key, kind=TableKind.UPSERT
        )

    def _last_rows(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The last row of every key, in the order of the batch."""
        groups = group_rows(batch.select(self._key).columns, batch.num_rows)
        if len(groups.starts) == batch.num_rows:
            return batch
        return batch.take(pa.array(np.sort(groups.lasts)))


class FinalRows(_Materializing):
    """Emits the valid rows once, at the end of the input."""

    def __init__(self, node: MaterializeNode, backend: StateBackend, watermark: int | None) -> None:
        super().__init__(node, watermark)
        self._table: StateTable = backend.table(self._rows_spec())

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Keep what holds after the batch."""
        if not self._node.updates.changelog:
            self._table.write(batch)
            return
        batch = self._last_rows(batch)
        gone = retracts(batch)
        rows = batch.select(self._schema.names)
        self._table.write(rows.filter(pa.array(~gone)))
        if gone.any():
            self._table.delete(rows.select(self._key).filter(pa.array(gone)))

    def on_watermark(self, watermark: int) -> None:
        """At the end of the input, emit; before that the rows have no event time to hand on."""
        if watermark == MAX_WATERMARK:
            if self._watermark != MAX_WATERMARK:
                for batches in sweep(self._table):
                    for batch in batches:
                        self.output.emit(batch)
            self.output.advance(watermark)
        self._watermark = watermark


class UpdatesEvery(_Materializing):
    """Emits each key that changed at most once per interval of event time."""

    def __init__(self, node: MaterializeNode, backend: StateBackend, watermark: int | None) -> None:
        super().__init__(node, watermark)
        assert node.every_ms is not None
        self._every = node.every_ms
        self._tick = unused_name("tick", self._schema.names)
        self._gone = unused_name("gone", self._schema.names)
        # Upserts need no comparison: the newest row of a key is what is emitted.
        self._table = backend.table(self._rows_spec()) if node.updates.changelog else None
        columns = [f.with_nullable(True) for f in self._schema]
        self._waiting: StateTable = backend.table(
            TableSpec(
                name=f"{self.operator_id}:waiting",
                schema=pa.schema([(self._tick, pa.int64()), *columns, (self._gone, pa.bool_())]),
                key=(self._tick, *self._key),
                kind=TableKind.UPSERT,
                order=TableOrder.TIME,
                time_field=self._tick,
            )
        )

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Let what holds after the batch wait for the end of the interval."""
        if not batch.num_rows:
            return
        batch = self._last_rows(batch)
        gone = retracts(batch) if self._table is not None else np.zeros(batch.num_rows, dtype=bool)
        ticks = pa.array(np.full(batch.num_rows, self._tick_of(self._watermark)))
        columns = [ticks, *batch.select(self._schema.names).columns, pa.array(gone)]
        self._waiting.write(pa.RecordBatch.from_arrays(columns, schema=self._waiting.spec.schema))

    def on_watermark(self, watermark: int) -> None:
        """Emit if an interval has ended."""
        before = self._watermark
        if before is None or watermark > before:
            self._watermark = watermark
            if (tick := self._tick_of(watermark)) > self._tick_of(before):
                for waited in sweep(self._waiting):
                    for batch in waited:
                        self._emit(batch)
                self._waiting.expire(tick)
        super().on_watermark(watermark)

    def _tick_of(self, watermark: int | None) -> int:
        return (_BEGIN if watermark is None else watermark) // self._every

    def _emit(self, waited: pa.RecordBatch) -> None:
        rows = pa.RecordBatch.from_arrays(waited.select(self._schema.names).columns, schema=self._schema)
        if self._table is None:
            self.output.emit(rows)
            return
        has = ~waited.column(self._gone).to_numpy(zero_copy_only=False)
        found = self._table.lookup(rows.select(self._key))
        had = found.hit.to_numpy(zero_copy_only=False)
        self._table.write(rows.filter(pa.array(has)))
        gone = rows.select(self._key).filter(pa.array(had & ~has))
        if gone.num_rows:
            self._table.delete(gone)
        for changed in told(Emit.CHANGELOG, found.batch, had, rows, has):
            self.output.emit(changed)
