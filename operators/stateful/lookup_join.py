"""Join of a stream with rows that are looked up: in a table that does not change, or by a function, behind a cache.

Nothing is kept as state. The rows of a table are indexed once when the job starts. A function is asked for the keys of
a batch that the cache does not know, each once; that a key has no row is remembered too.

The cache has two generations, each indexed like a state table. Rows go into the young one; when that holds half of
what is allowed it becomes the old one, and what is asked for in the old one moves to the young one. So the keys that
are asked for again and again stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from operators.errors import SchemaError
from operators.graph import Port, StateNote
from operators.pairs import distinct_keys, key_codes, matching_ranges, pairs_of, take_or_null
from operators.rows import combined
from operators.runtime import BaseOperator, BuildContext, user_error
from operators.stateful.join_parts import JoinHow, JoinOutput, JoinSide, free_name
from operators.windows import Int64Array
from statebackend import MemoryStateBackend, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["CachedLookup", "LookupFunction", "LookupJoin", "LookupJoinNode"]

LookupFunction: TypeAlias = Callable[[pa.RecordBatch], pa.RecordBatch | pa.Table]
"""From distinct keys without nulls to all rows that have them, in any order, with the keys among their columns."""

_PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedLookup:
    """A function and how much of its answers is remembered: so many rows, for so many milliseconds of the clock."""

    function: LookupFunction
    cache_rows: int
    cache_ttl_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookupJoinNode:
    """A lookup join. ``rows``: the table, or the function to ask."""

    operator_id: str
    input: Port
    how: JoinHow
    left: JoinSide
    right: JoinSide
    rows: pa.Table | CachedLookup
    output: JoinOutput

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The joined rows."""
        return ("",)

    @property
    def label(self) -> str:
        """For `explain`."""
        pairs = " and ".join(f"{a} = {b}" for a, b in zip(self.left.keys, self.right.keys, strict=True))
        if isinstance(self.rows, CachedLookup):
            ttl = "" if self.rows.cache_ttl_ms is None else f" for {self.rows.cache_ttl_ms} ms"
            where = f"a function, {self.rows.cache_rows} rows cached{ttl}"
        else:
            where = f"a table of {self.rows.num_rows} rows"
        return f"{self.how} lookup join {self.operator_id}: {pairs} in {where}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """None: what is cached can be looked up again."""
        return ()

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "lookup_join",
            "how": str(self.how),
            "left": list(self.left.keys),
            "right": list(self.right.keys),
        }

    def build(self, context: BuildContext) -> LookupJoin:
        """The operator, with an empty cache."""
        return LookupJoin(self, context)


class _Lookup(Protocol):
    """Finds the rows of keys: columns of the right side, and the number of the key of each, ascending."""

    def rows_of(self, keys: pa.RecordBatch) -> tuple[pa.RecordBatch, Int64Array]: ...


class LookupJoin(BaseOperator):
    """The operator."""

    def __init__(self, node: LookupJoinNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        self._how = node.how
        self._left, self._right = node.left, node.right
        self._columns = node.output
        self._schema = node.output.schema
        self._cursor = context.cursor
        self._lookup: _Lookup
        if isinstance(node.rows, CachedLookup):
            self._lookup = _Cache(node.operator_id, node.right, node.rows, context.clock)
        else:
            self._lookup = _Indexed(node.right, node.rows)

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Emit the rows with what was found for their keys, in their order."""
        rows = self._left.rows(batch)
        codes, keys = distinct_keys(self._left.keys_of(rows, self._right.key_columns))
        try:
            found, key_index = self._lookup.rows_of(keys)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        first, counts = matching_ranges(codes, None, None, key_index, None)
        alone = counts == 0
        if self._how.left_alone and alone.any():
            # A row without a partner has one pair, with nothing: place -1.
            first, counts = np.where(alone, -1, first), np.where(alone, 1, counts)
        for here, there in pairs_of(first, counts, _PAIRS_AT_ONCE):
            pair = self._columns.pairs(rows.take(pa.array(here)), take_or_null(found, there))
            self.output.emit(pa.RecordBatch.from_arrays(pair, schema=self._schema))


class _Indexed:
    """A table that does not change."""

    def __init__(self, side: JoinSide, rows: pa.Table) -> None:
        self._side = side
        self._table = MemoryStateBackend().table(side.table_spec("rows", TableOrder.HASH))
        for batch in rows.select(list(side.kept)).combine_chunks().to_batches():
            self._table.write(side.to_state(side.rows(batch)))

    def rows_of(self, keys: pa.RecordBatch) -> tuple[pa.RecordBatch, Int64Array]:
        found = self._table.matches(keys)
        return self._side.from_state(found.batch), found.key_index.to_numpy()


class _Cache:
    """Answers of a function. A key that was asked for has an entry per row, or one that says that there is none."""

    def __init__(self, operator_id: str, side: JoinSide, lookup: CachedLookup, clock: Callable[[], float]) -> None:
        self._operator_id = operator_id
        self._side = side
        self._function = lookup.function
        self._rows_max = lookup.cache_rows // 2
        self._ttl_ms = lookup.cache_ttl_ms
        self._clock = clock
        names = side.state_schema.names
        self._asked, self._present = free_name("asked", names), free_name("present", names)
        self._schema = side.state_schema.append(pa.field(self._asked, pa.int64()))
        self._schema = self._schema.append(pa.field(self._present, pa.bool_()))
        self._young, self._old = self._generation(), self._generation()
        self._rows = 0

    def rows_of(self, keys: pa.RecordBatch) -> tuple[pa.RecordBatch, Int64Array]:
        now = int(self._clock() * 1000)
        numbers = np.arange(keys.num_rows)
        entries: list[pa.RecordBatch] = []
        places: list[Int64Array] = []
        for table in (self._young, self._old):
            if not len(numbers):
                break
            since = None if self._ttl_ms is None else now - self._ttl_ms
            found = table.matches(keys.take(pa.array(numbers)), (since, None))
            index = found.key_index.to_numpy()
            entries.append(found.batch)
            places.append(numbers[index])
            if table is self._old:
                self._remember(found.batch)
            numbers = np.delete(numbers, index)
        if len(numbers):
            fetched, index = self._fetch(keys.take(pa.array(numbers)), now)
            entries.append(fetched)
            places.append(numbers[index])
            self._remember(fetched)
        return self._sorted(combined(entries, self._schema), np.concatenate([np.empty(0, dtype=np.int64), *places]))

    def _sorted(self, entries: pa.RecordBatch, places: Int64Array) -> tuple[pa.RecordBatch, Int64Array]:
        order = np.argsort(places, kind="stable")
        order = order[entries.column(self._present).to_numpy(zero_copy_only=False)[order]]
        return self._side.from_state(entries.take(pa.array(order))), places[order]

    def _fetch(self, keys: pa.RecordBatch, now: int) -> tuple[pa.RecordBatch, Int64Array]:
        """Ask the function; entries for every key, by its number."""
        rows = self._side.rows(self._answer(keys))
        columns = [pa.concat_arrays([keys.column(n), rows.column(n)]) for n in self._side.keys]
        codes = key_codes(columns, keys.num_rows + rows.num_rows)
        number = np.full(int(codes.max(initial=-1)) + 2, -1)
        number[codes[: keys.num_rows]] = np.arange(keys.num_rows)
        places = number[codes[keys.num_rows :]]  # -1 for a key that nobody asked for
        missing = np.setdiff1d(np.arange(keys.num_rows), places)
        asked = np.flatnonzero(places >= 0)
        found = self._entries(self._side.to_state(rows).take(pa.array(asked)), now, present=True)
        empty = [
            keys.column(f.name).take(pa.array(missing)) if f.name in self._side.keys else pa.nulls(len(missing), f.type)
            for f in self._side.state_schema
        ]
        none = pa.RecordBatch.from_arrays(empty, schema=self._side.state_schema)
        entries = combined([found, self._entries(none, now, present=False)], self._schema)
        return entries, np.concatenate([places[asked], missing])

    def _answer(self, keys: pa.RecordBatch) -> pa.RecordBatch:
        rows = self._function(keys)
        schema = self._side.schema
        if not isinstance(rows, (pa.RecordBatch, pa.Table)):
            raise SchemaError(
                f"{self._operator_id}: a lookup returns a RecordBatch or a Table, not {type(rows).__name__}"
            )
        if rows.schema.names != schema.names or rows.schema.types != schema.types:
            raise SchemaError(f"{self._operator_id}: the lookup returned columns\n{rows.schema}\nexpected\n{schema}")
        if isinstance(rows, pa.RecordBatch):
            return rows
        return combined(rows.to_batches(), rows.schema)

    def _entries(self, state: pa.RecordBatch, now: int, *, present: bool) -> pa.RecordBatch:
        extra = [pa.array(np.full(state.num_rows, now)), pa.array(np.full(state.num_rows, present))]
        return pa.RecordBatch.from_arrays([*state.columns, *extra], schema=self._schema)

    def _remember(self, entries: pa.RecordBatch) -> None:
        if self._rows + entries.num_rows > self._rows_max and self._rows:
            self._young, self._old, self._rows = self._generation(), self._young, 0
        if 0 < entries.num_rows <= self._rows_max:
            self._young.write(entries)
            self._rows += entries.num_rows

    def _generation(self) -> StateTable:
        spec = TableSpec(
            name="cache",
            schema=self._schema,
            key=(*self._side.key_columns, self._asked),
            kind=TableKind.APPEND,
            order=TableOrder.HASH,
            time_field=self._asked,
        )
        return MemoryStateBackend().table(spec)
