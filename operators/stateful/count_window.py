"""Count windows: every ``size`` rows of a group, in the order of their arrival, are one window.

A batch is aggregated by (window, group), where the window of a row follows from its place among the rows of its
group and from how many the group had waiting; full windows are emitted at once, the rest waits.

Invariants:

* The table has one row per group with an unfinished window: its partial states and how many rows are in them.
* At the end of the input unfinished windows are emitted and forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators.engine import StatelessPlan, Step
from operators.graph import Port, StateNote
from operators.rows import combined, group_codes, stable_order
from operators.runtime import BaseOperator, BuildContext, user_error
from operators.windows import MAX_WATERMARK, Int64Array
from statebackend import Aggregation, TableKind, TableSpec

__all__ = ["WINDOW_NUMBER", "CountWindow", "CountWindowNode", "count_window_schema"]

WINDOW_NUMBER = "__window"
"""Which window of its group a row falls into, from the one that was unfinished when its batch came."""

_WAITING = "waiting"


def count_window_schema(aggregation: Aggregation, *, grouped: bool) -> pa.Schema:
    """Columns of the result: group columns, aggregates."""
    result = aggregation.merger.result_schema
    groups = len(aggregation.merger.key_schema) - 1
    return pa.schema([result.field(i) for i in range(1 if grouped else 1 + groups, len(result))])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountWindowNode:
    """An aggregation over every ``size`` rows of a group.

    ``keys`` computes the group columns of a batch. ``aggregation`` is over the input columns and `WINDOW_NUMBER`,
    grouped by that and the group columns; an ungrouped one has one constant group.
    """

    operator_id: str
    input: Port
    input_schema: pa.Schema
    size: int
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
        """The windows."""
        return ("",)

    @property
    def label(self) -> str:
        """For `explain`."""
        names = ", ".join(count_window_schema(self.aggregation, grouped=self.grouped).names)
        return f"count window {self.operator_id}: {names} over {self.size} rows"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """Unfinished windows."""
        growth = f"one row per group that has not had a multiple of {self.size} rows"
        return (StateNote(self.operator_id, growth, bounded=not self.grouped),)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "count window",
            "size": self.size,
            "group_by": list(self.group_by),
            "aggregates": list(self.aggregates),
        }

    def build(self, context: BuildContext) -> CountWindow:
        """The operator, restored."""
        return CountWindow(self, context)


class CountWindow(BaseOperator):
    """The operator."""

    def __init__(self, node: CountWindowNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        merger = node.aggregation.merger
        self._size = node.size
        self._aggregation = node.aggregation
        self._merger = merger
        self._keys = StatelessPlan([node.keys])
        self._groups = merger.key_schema.names[1:]
        self._grouped = node.grouped
        self._rows_schema = node.input_schema.append(pa.field(WINDOW_NUMBER, pa.int64()))
        self._result_schema = count_window_schema(node.aggregation, grouped=node.grouped)
        self._cursor = context.cursor
        states = merger.state_schema.remove(0)
        self._table = context.backend.table(
            TableSpec(
                name=node.operator_id,
                schema=states.append(pa.field(_WAITING, pa.int64())),
                key=tuple(self._groups),
                kind=TableKind.UPSERT,
            )
        )

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Emit the windows that are full now."""
        rows = batch.num_rows
        keys = self._key_columns(batch)
        code, bound = group_codes(keys.columns, rows)
        order = stable_order(code, bound, np.arange(rows))
        begins = np.append(True, code[order][1:] != code[order][:-1])
        starts = np.flatnonzero(begins)
        segment = np.cumsum(begins) - 1
        groups = keys.take(pa.array(order[starts]))
        found = self._table.lookup(groups)
        before = np.asarray(found.batch.column(_WAITING).fill_null(0))
        number = np.empty(rows, dtype=np.int64)
        number[order] = (before[segment] + np.arange(rows) - starts[segment]) // self._size
        counts = before + np.diff(np.append(starts, rows))
        states = [self._stored_states(found.batch.filter(found.hit)), *self._partial(batch, number)]
        self._settle(combined(self._merger.reduce(states), self._merger.state_schema), groups, counts)

    def on_watermark(self, watermark: int) -> None:
        """At the end of the input unfinished windows are emitted."""
        if watermark == MAX_WATERMARK:
            for rest in self._table.scan():
                self._emit(self._stored_states(rest))
                self._table.delete(rest.select(self._groups))
        super().on_watermark(watermark)

    def _settle(self, states: pa.RecordBatch, groups: pa.RecordBatch, counts: Int64Array) -> None:
        """Emit full windows and keep the rest; ``counts``: rows of each group since its last full window before."""
        both = [pa.concat_arrays([groups.column(name), states.column(name)]) for name in self._groups]
        code, _ = group_codes(both, groups.num_rows + states.num_rows)
        by_code = np.argsort(code[: groups.num_rows])
        of = by_code[np.searchsorted(code[by_code], code[groups.num_rows :])]
        number = states.column(0).to_numpy(zero_copy_only=False)
        full = number < counts[of] // self._size
        if full.any():
            self._emit(states.filter(pa.array(full)))
        rest = states.filter(pa.array(~full))
        if rest.num_rows:
            waiting = pa.array(counts[of][~full] % self._size)
            self._table.write(pa.RecordBatch.from_arrays([*rest.columns[1:], waiting], schema=self._table.spec.schema))
        finished = groups.filter(pa.array(counts % self._size == 0))
        if finished.num_rows:
            self._table.delete(finished)

    def _partial(self, batch: pa.RecordBatch, number: Int64Array) -> list[pa.RecordBatch]:
        rows = pa.RecordBatch.from_arrays([*batch.columns, pa.array(number)], schema=self._rows_schema)
        try:
            return self._aggregation.partial([rows])
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error

    def _key_columns(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        try:
            keys = combined(self._keys.run(rows), self._keys.schema)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        kinds = self._merger.key_schema.types[1:]
        arrays = [column.cast(kind) for column, kind in zip(keys.columns, kinds, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, names=self._groups)

    def _stored_states(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Rows of the table as states of the first window."""
        number = pa.array(np.zeros(rows.num_rows, dtype=np.int64))
        return pa.RecordBatch.from_arrays([number, *rows.columns[:-1]], schema=self._merger.state_schema)

    def _emit(self, states: pa.RecordBatch) -> None:
        for result in self._merger.final([states]):
            result = result.take(pa.array(np.argsort(result.column(0).to_numpy(zero_copy_only=False), kind="stable")))
            columns = result.columns[len(result.schema) - len(self._result_schema) :]
            self.output.emit(pa.RecordBatch.from_arrays(columns, schema=self._result_schema))
