"""What the joins have in common: kinds, sides, the distance of two event times, and the columns of the result.

A side is seen in three forms. *Input* batches have the user's columns. *Rows* have the columns that the join needs,
its keys in plain types (dictionaries decoded, one kind of string), so that keys of both sides can be compared.
*State* has the same columns as a table wants them: event time as a timestamp with at least milliseconds, a number
per row if the join has to remember which rows have met a partner, and a key of one value where there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import pyarrow as pa
from datafusion import Expr, SessionContext, lit

from operators.engine import column_named, plan_step
from operators.pairs import Bools, null_columns, take_rows
from operators.watermark import EventTimeColumn
from operators.windows import Int64Array
from statebackend import PreparedPlan, TableKind, TableOrder, TableSpec

__all__ = ["JoinHow", "JoinOutput", "JoinSide", "PairFilter", "TimeDistance", "free_name", "plain_type"]

_MAX = (1 << 63) - 1
_MIN = -(1 << 63)
_UNIT = {1: "ms", 1_000: "us", 1_000_000: "ns"}


class JoinHow(StrEnum):
    """Which rows come out: pairs, pairs and rows without a partner, or the left rows with (without) a partner."""

    INNER = "inner"
    LEFT = "left"
    RIGHT = "right"
    FULL = "full"
    SEMI = "semi"
    ANTI = "anti"

    @property
    def pairs(self) -> bool:
        """Whether pairs come out."""
        return self not in (JoinHow.SEMI, JoinHow.ANTI)

    @property
    def left_alone(self) -> bool:
        """Whether left rows without a partner come out."""
        return self in (JoinHow.LEFT, JoinHow.FULL, JoinHow.ANTI)

    @property
    def right_alone(self) -> bool:
        """Whether right rows without a partner come out."""
        return self in (JoinHow.RIGHT, JoinHow.FULL)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type in which a key is compared: without encodings, views and large offsets."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def free_name(word: str, taken: Sequence[str]) -> str:
    """The word, or the word with as many underscores as it takes to be none of the taken names."""
    while word in taken:
        word += "_"
    return word


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSide:
    """One input of a join.

    ``kept``: the columns that the join needs, keys and event time among them, in the order of the input.
    ``time``: the event time column, None if the join does not look at time. ``numbered``: whether rows have numbers.

    Derived: the columns of rows and of the table, the key columns of the table, the column of the numbers, and the
    event time of rows as integers.
    """

    name: str
    schema: pa.Schema
    keys: tuple[str, ...]
    time: str | None
    kept: tuple[str, ...]
    numbered: bool = False

    rows_schema: pa.Schema = field(init=False)
    state_schema: pa.Schema = field(init=False)
    key_columns: tuple[str, ...] = field(init=False)
    number_column: str = field(init=False)
    _times: EventTimeColumn | None = field(init=False)
    _input_times: EventTimeColumn | None = field(init=False)

    def __post_init__(self) -> None:
        kept = [self.schema.field(name) for name in self.kept]
        rows = pa.schema([pa.field(f.name, plain_type(f.type) if f.name in self.keys else f.type) for f in kept])
        times = None if self.time is None else EventTimeColumn(rows, self.time)
        state = rows
        if times is not None:
            state = state.set(times.index, pa.field(times.name, pa.timestamp(_UNIT[times.per_ms], times.zone)))
        key_columns = self.keys or (free_name("every", self.kept),)
        number = free_name("row", self.kept)
        if not self.keys:
            state = state.append(pa.field(key_columns[0], pa.int8()))
        if self.numbered:
            state = state.append(pa.field(number, pa.int64()))
        derived = {
            "rows_schema": rows,
            "state_schema": state,
            "key_columns": key_columns,
            "number_column": number,
            "_times": times,
            "_input_times": None if self.time is None else EventTimeColumn(self.schema, self.time),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def per_ms(self) -> int:
        """Units of event time to the millisecond."""
        return 1 if self._times is None else self._times.per_ms

    def table_spec(self, name: str, order: TableOrder, kind: TableKind = TableKind.APPEND) -> TableSpec:
        """The table of its rows, by (key, event time)."""
        time = () if self.time is None else (self.time,)
        return TableSpec(
            name=name,
            schema=self.state_schema,
            key=(*self.key_columns, *time),
            kind=kind,
            order=order,
            time_field=self.time,
        )

    def times(self, rows: pa.RecordBatch) -> Int64Array:
        """Event time of rows, in units of ``1/per_ms`` milliseconds."""
        assert self._times is not None
        return self._times.values(rows)

    def rows(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Input as rows."""
        columns = [_as_type(batch.column(f.name), f.type) for f in self.rows_schema]
        return pa.RecordBatch.from_arrays(columns, schema=self.rows_schema)

    def keys_of(self, rows: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The keys of rows under other names: those of the table that is asked for them."""
        columns = [rows.column(name) for name in self.keys] or [_same_key(rows.num_rows)]
        return pa.RecordBatch.from_arrays(columns, names=list(names))

    def to_state(self, rows: pa.RecordBatch, numbers: Int64Array | None = None) -> pa.RecordBatch:
        """Rows as the table has them."""
        columns = list(rows.columns)
        if self._times is not None:
            at, kind = self._times.index, self.state_schema.field(self._times.index).type
            if columns[at].type != kind:
                columns[at] = pa.array(self._times.values(rows)).view(kind)
        if not self.keys:
            columns.append(_same_key(rows.num_rows))
        if self.numbered:
            columns.append(pa.array(numbers))
        return pa.RecordBatch.from_arrays(columns, schema=self.state_schema)

    def from_state(self, state: pa.RecordBatch) -> pa.RecordBatch:
        """Rows out of what a table returned."""
        columns = [_as_type(state.column(f.name), f.type) for f in self.rows_schema]
        return pa.RecordBatch.from_arrays(columns, schema=self.rows_schema)

    def state_times(self, state: pa.RecordBatch) -> Int64Array:
        """Event time of what a table returned, in units of ``1/per_ms`` milliseconds."""
        assert self.time is not None
        times: Int64Array = state.column(self.time).view(pa.int64()).to_numpy(zero_copy_only=True)
        return times

    def input_times(self, batch: pa.RecordBatch) -> Int64Array:
        """Event time of an input batch, in units of ``1/per_ms`` milliseconds."""
        assert self._input_times is not None
        return self._input_times.values(batch)

    def late(self, batch: pa.RecordBatch, watermark: int | None) -> Bools | None:
        """Which rows of an input batch are behind the watermark (milliseconds); None if none is."""
        if self._input_times is None or watermark is None or batch.num_rows == 0:
            return None
        times, limit = self._input_times.values(batch), watermark * self.per_ms
        return None if int(times.min()) >= limit else times < limit

    def unmatchable(self, rows: pa.RecordBatch) -> Bools | None:
        """Which rows have a null in the key and so match nothing; None if no row has."""
        keys = [rows.column(name) for name in self.keys]
        if not any(key.null_count for key in keys):
            return None
        found: Bools = np.zeros(rows.num_rows, dtype=bool)
        for key in keys:
            found |= key.is_null().to_numpy(zero_copy_only=False)
        return found


def _same_key(rows: int) -> pa.Array:
    return pa.array(np.zeros(rows, dtype=np.int8))


def _as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if column.type == kind:
        return column
    return column.dictionary_decode().cast(kind) if pa.types.is_dictionary(column.type) else column.cast(kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeDistance:
    """Which event times match: ``lower <= left - right <= upper``, None for no bound.

    The bounds are in units of ``1/per_ms`` milliseconds, the finer unit of both sides.
    """

    lower: int | None
    upper: int | None
    per_ms: int

    def partners(
        self, times: Int64Array, index: int, own_per_ms: int, other_per_ms: int
    ) -> tuple[Int64Array | None, Int64Array | None]:
        """The first and last time of the other side that matches each time of side ``index``; None for no bound."""
        fine = _scaled(times, self.per_ms // own_per_ms)
        below, above = (self.upper, self.lower) if index == 0 else (self.lower, self.upper)
        sign = -1 if index == 0 else 1
        coarse = self.per_ms // other_per_ms
        low = None if below is None else _shifted(_shifted(fine, sign * below), coarse - 1) // coarse
        high = None if above is None else _shifted(fine, sign * above) // coarse
        return low, high

    def dead_before(self, watermark: int, index: int, per_ms: int) -> int | None:
        """Rows of side ``index`` below this time match no row that is still to come; None: every row may.

        ``watermark`` in milliseconds, the result in units of ``1/per_ms`` milliseconds.
        """
        bound = self.lower if index == 0 else self.upper
        if bound is None:
            return None
        fine = watermark * self.per_ms + (bound if index == 0 else -bound)
        return max(_MIN, min(_MAX, -(-fine // (self.per_ms // per_ms))))

    def reach(self, index: int) -> int | None:
        """How many milliseconds a row of side ``index`` waits for partners at most; None for ever."""
        bound = self.lower if index == 0 else self.upper
        if bound is None:
            return None
        return max(0, -(-(-bound if index == 0 else bound) // self.per_ms))


def _scaled(times: Int64Array, factor: int) -> Int64Array:
    """Times in a finer unit; what does not fit becomes the largest or smallest that does."""
    return times if factor == 1 else np.clip(times, -(_MAX // factor), _MAX // factor) * factor


def _shifted(times: Int64Array, by: int) -> Int64Array:
    """Times later by so much; what does not fit becomes the largest or smallest that does."""
    by = max(_MIN + 1, min(_MAX, by))
    if by == 0:
        return times
    return (np.minimum(times, _MAX - by) if by > 0 else np.maximum(times, _MIN - by)) + by


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOutput:
    """The columns of a join's result: those of the left rows, then those of the right rows.

    ``merged``: key columns of one name on both sides, which come once. ``both``: whether right columns come at all.
    """

    left: pa.Schema
    right: pa.Schema
    merged: tuple[str, ...]
    both: bool

    @property
    def right_names(self) -> list[str]:
        """Columns that come from the right alone."""
        return [n for n in self.right.names if n not in self.merged] if self.both else []

    @property
    def schema(self) -> pa.Schema:
        """Columns of the result."""
        fields = [*self.left, *(self.right.field(n) for n in self.right_names)]
        return pa.schema([pa.field(f.name, f.type) for f in fields])

    def pairs(self, left: pa.RecordBatch, right: pa.RecordBatch) -> list[pa.Array]:
        """Row i of the left with row i of the right."""
        return [*(left.column(n) for n in self.left.names), *(right.column(n) for n in self.right_names)]

    def left_alone(self, rows: pa.RecordBatch) -> list[pa.Array]:
        """Left rows without a partner."""
        nulls = null_columns(pa.schema([self.right.field(n) for n in self.right_names]), rows.num_rows)
        return [*(rows.column(n) for n in self.left.names), *nulls.columns]

    def right_alone(self, rows: pa.RecordBatch) -> list[pa.Array]:
        """Right rows without a partner; merged keys have their values."""
        columns = [
            rows.column(field.name) if field.name in self.merged else pa.nulls(rows.num_rows, field.type)
            for field in self.left
        ]
        return [*columns, *(rows.column(n) for n in self.right_names)]


class PairFilter:
    """A condition over pairs, in columns of both sides, as one plan that is made once.

    Raises `SchemaError`, with ``what`` in it, for a condition that cannot be evaluated over these columns.
    """

    def __init__(self, what: str, schema: pa.Schema, condition: Expr | str) -> None:
        self.text = condition if isinstance(condition, str) else condition.canonical_name()
        plan_step(f"{what}({self.text})", schema, lambda frame: frame.filter(condition))
        try:
            self._prepare(_columns_of(schema, condition), schema, condition)
        except Exception:  # noqa: BLE001  (the optimiser simplified away what the condition names)
            self._prepare(schema.names, schema, condition)

    def _prepare(self, columns: list[str], schema: pa.Schema, condition: Expr | str) -> None:
        self.columns = columns
        position = free_name("pair", columns)
        self._schema = pa.schema([*(schema.field(n) for n in columns), pa.field(position, pa.int64())])
        number = column_named(position)
        self._plan = PreparedPlan(self._schema, lambda _, frame: frame.filter(condition).select(number))

    def holding(
        self, left: pa.RecordBatch, left_rows: Int64Array, right: pa.RecordBatch, right_rows: Int64Array
    ) -> Int64Array:
        """The numbers of the pairs for which it holds; pair i is of row ``left_rows[i]`` and ``right_rows[i]``.

        A name of both sides means the left column: it is a key that both have in common.
        """
        here = [n for n in self.columns if n in left.schema.names]
        there = [n for n in self.columns if n not in left.schema.names]
        taken = dict(zip(here, take_rows(left.select(here), left_rows).columns, strict=True)) if here else {}
        if there:
            taken |= zip(there, take_rows(right.select(there), right_rows).columns, strict=True)
        columns = [taken[n] for n in self.columns]
        pairs = pa.RecordBatch.from_arrays([*columns, pa.array(np.arange(len(left_rows)))], schema=self._schema)
        found = [batch.column(0).to_numpy() for batch in self._plan.run([pairs])]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _columns_of(schema: pa.Schema, condition: Expr | str) -> list[str]:
    """The columns that a condition looks at: those that the optimiser leaves in the scan."""
    session = SessionContext()
    session.register_record_batches("pairs", [[pa.RecordBatch.from_pylist([], schema=schema)]])
    plan = session.table("pairs").filter(condition).select(lit(1)).optimized_logical_plan()
    while plan.inputs():
        plan = plan.inputs()[0]
    scanned = {name for _, name in getattr(plan.to_variant(), "projection", list)()}
    return [name for name in schema.names if name in scanned]
