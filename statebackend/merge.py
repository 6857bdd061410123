"""Merge rules of the table kinds: what remains of several pieces of one table.

Every piece of a table, in memory or in a file, is a list of *stored* batches: the columns of the
table in canonical form, then ``__hash`` (the 64-bit hash of the partition key: the key without the
time column) and, for upsert tables, ``__tombstone``. `TableLayout` knows these columns; its
`merge` takes pieces from oldest to newest and returns one sorted piece.

Physical order, by ``TableSpec.order``: ``hash`` sorts by (hash, time), ``time`` by (time, hash);
rows that agree in both (another key only if two keys collide) lie together by key, in the order
of their first write. ``key`` sorts by the bytes of the key; there ``__hash`` holds the first eight
of them, big-endian, so that the same statistics and cuts serve. Equality of keys is always decided
on the typed columns, never on the hash.

Invariants:

* Upsert: of the rows of one key the newest remains; tombstones remain unless ``drop_tombstones``,
  which is right only when no older piece exists.
* Aggregate: one row of states per key.
* Append: every row remains, in write order within a key.
* Rows below ``watermark`` never remain. With ``ttl_field`` in an upsert table that is judged of the newest row
  of a key, and as long as older pieces may exist a tombstone takes its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from statebackend.accumulators import StateMerger
from statebackend.errors import SchemaMismatchError
from statebackend.keys import Hasher, canonical_schema, canonicalise, rows_equal
from statebackend.schema_history import SchemaHistory
from statebackend.tables import TableKind, TableOrder, TableSpec

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = [
    "HASH_COLUMN",
    "TOMBSTONE_COLUMN",
    "HashRange",
    "TableLayout",
    "concat",
    "key_prefixes",
    "stable_order",
    "time_values",
]

HASH_COLUMN = "__hash"
TOMBSTONE_COLUMN = "__tombstone"

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
HashRange: TypeAlias = tuple[int | None, int | None]
"""Partition hashes from the first (None: 0) up to, and without, the second (None: 2**64)."""
_HASH_MAX = (1 << 64) - 1
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True, slots=True)
class TableLayout:
    """The stored form of one table and its merge rule.

    ``canonical``: the table's columns in canonical types; ``stored``: those, hash and tombstone; ``answer``: those,
    all nullable.
    """

    spec: TableSpec
    hasher: Hasher
    canonical: pa.Schema
    stored: pa.Schema
    answer: pa.Schema
    merger: StateMerger | None
    history: SchemaHistory

    @classmethod
    def of(
        cls, spec: TableSpec, hasher: Hasher, udafs: Mapping[str, AggregateUDF], history: SchemaHistory | None = None
    ) -> TableLayout:
        """The layout of a table; ``history`` is None for one whose columns never changed.

        Raises `SchemaMismatchError` when its columns are not those of its aggregation.
        """
        merger = StateMerger.from_declaration(spec.aggregation, udafs) if spec.aggregation is not None else None
        if merger is not None and merger.state_schema.names != spec.schema.names:
            raise SchemaMismatchError(
                f"table {spec.name!r}: columns {spec.schema.names} are not those of its aggregation, "
                f"{merger.state_schema.names}"
            )
        return cls.for_reading(spec, hasher, history, merger)

    @classmethod
    def for_reading(
        cls,
        spec: TableSpec,
        hasher: Hasher,
        history: SchemaHistory | None = None,
        merger: StateMerger | None = None,
    ) -> TableLayout:
        """The layout for looking at stored rows, without the functions that merge states."""
        canonical = canonical_schema(spec.schema)
        history = history or SchemaHistory.begin(spec.schema)
        stored = _stored_schema(spec.kind, canonical, history.current.names_of(history.key_ids(spec)))
        answer = pa.schema([f.with_nullable(True) for f in canonical])
        return cls(spec, hasher, canonical, stored, answer, merger, history)

    def stored_as(self, version: int) -> pa.Schema:
        """The stored columns of a file written under this version of the schema."""
        if version == self.history.number:
            return self.stored
        then, keys = self.history.versions[version], self.history.key_ids(self.spec)
        return _stored_schema(self.spec.kind, canonical_schema(then.schema), then.names_of(keys))

    def upgraded(self, batch: pa.RecordBatch, version: int) -> pa.RecordBatch:
        """Canonical or stored rows of a version of the schema as rows of the newest."""
        if version == self.history.number:
            return batch
        arrays = self.history.upgraded(batch, version, self.canonical.types)
        schema = self.stored if HASH_COLUMN in batch.schema.names else self.canonical
        arrays += [batch.column(f.name) for f in list(schema)[len(arrays) :]]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    @property
    def fingerprint(self) -> str | None:
        """What the states of a table look like; None where rows are no states."""
        return None if self.merger is None else self.merger.fingerprint

    @property
    def reduces(self) -> bool:
        """Whether rows of one key are partial states that are merged into one."""
        return self.merger is not None and self.spec.kind is TableKind.AGGREGATE

    @property
    def result_schema(self) -> pa.Schema:
        """The columns as a reader understands them: of states the finalised results."""
        return self.spec.schema if self.merger is None else self.merger.result_schema

    @property
    def inline(self) -> bool:
        """Whether rows are merged and finalised without threads of DataFusion."""
        return self.merger is None or self.merger.simple

    @property
    def partition_key(self) -> list[str]:
        """The key columns that decide where a row lives: all but the time column."""
        return [k for k in self.spec.key if k != self.spec.time_field]

    def to_stored(self, batch: pa.RecordBatch, *, tombstone: bool = False) -> pa.RecordBatch:
        """A canonical batch plus its hash and tombstone columns."""
        arrays = [*batch.columns, pa.array(self.hash_of(batch))]
        if self.spec.kind is TableKind.UPSERT:
            arrays.append(pa.array(np.full(batch.num_rows, tombstone)))
        return pa.RecordBatch.from_arrays(arrays, schema=self.stored)

    def hash_of(self, batch: pa.RecordBatch) -> UInt64s:
        """Hash of the partition key of every row of a canonical batch; in order ``key`` its first bytes."""
        if self.spec.order is TableOrder.KEY:
            return key_prefixes(batch.column(self.spec.key[0]))
        return self.hasher.hash(batch, self.partition_key)

    def filter_hashes(self, batch: pa.RecordBatch) -> UInt64s | None:
        """What a file's filter knows of some rows: hashes of their partition keys; None when there is no such key.

        ``batch``: stored rows, or probes with ``__hash``. In order ``key`` that column is no hash, so it is made here.
        """
        if self.spec.order is TableOrder.KEY:
            return self.hasher.hash(batch, self.spec.key)
        hashes: UInt64s = batch.column(HASH_COLUMN).to_numpy()
        return hashes if self.partition_key else None

    def check(self, batch: pa.RecordBatch) -> None:
        """Raise `SchemaMismatchError` unless the batch has exactly the columns of the table."""
        if batch.schema.names != self.spec.schema.names or batch.schema.types != self.spec.schema.types:
            raise SchemaMismatchError(
                f"table {self.spec.name!r}: batch has columns ({_columns(batch.schema)}), "
                f"expected ({_columns(self.spec.schema)})"
            )
        if self.spec.order is TableOrder.KEY and batch.column(self.spec.key[0]).null_count:
            raise ValueError(f"table {self.spec.name!r}: null in the key column of order 'key'")
        if (time := self.spec.expiry_field) is not None and batch.column(time).null_count:
            role = "time" if time == self.spec.time_field else "ttl"
            raise ValueError(f"table {self.spec.name!r}: null in the {role} column {time!r}")

    def to_user(self, batch: pa.RecordBatch, columns: Sequence[str] | None) -> pa.RecordBatch:
        """The user's columns and types of a stored or canonical batch."""
        names = list(columns) if columns is not None else self.spec.schema.names
        schema = pa.schema([self.spec.schema.field(n) for n in names])
        return batch.select(names).cast(schema) if batch.select(names).schema != schema else batch.select(names)

    def times(self, batch: pa.RecordBatch) -> Int64s | None:
        """Values of the time column as integers in its own unit, or None without one."""
        return None if self.spec.time_field is None else time_values(batch.column(self.spec.time_field))

    def time_range(self, batch: pa.RecordBatch) -> tuple[int, int] | None:
        """Least and greatest value by which rows of a stored batch expire; None if rows do not expire.

        Deletions have none: of nothing else, the least is above the greatest.
        """
        if self.spec.expiry_field is None:
            return None
        column = batch.column(self.spec.expiry_field)
        times = time_values(column.drop_null() if column.null_count else column)
        return (int(times.min()), int(times.max())) if len(times) else (_INT64.max, _INT64.min)

    def time_max(self, batch: pa.RecordBatch) -> int | None:
        """The time above which a watermark makes the whole batch superfluous; None if none does."""
        span = self.time_range(batch) if batch.num_rows and self.spec.expires_by_row else None
        return None if span is None else span[1]

    def expired(self, batch: pa.RecordBatch, watermark: int | None) -> Bools:
        """Which rows of a stored batch are below the watermark; deletions are not."""
        if watermark is None or self.spec.expiry_field is None:
            return np.zeros(batch.num_rows, dtype=bool)
        column = batch.column(self.spec.expiry_field)
        return time_values(column.fill_null(_INT64.max) if column.null_count else column) < watermark

    def hidden(self, batch: pa.RecordBatch, watermark: int | None) -> Bools:
        """Which of the newest rows of their keys are not to be seen: deleted or expired. Upsert tables only."""
        deleted: Bools = batch.column(TOMBSTONE_COLUMN).to_numpy(zero_copy_only=False)
        return deleted | self.expired(batch, watermark)

    def alive(self, batch: pa.RecordBatch, start: int | None, end: int | None) -> pa.RecordBatch:
        """The rows with ``start <= time < end``; the batch itself when that is all of them.

        And where no row may be judged alone (see `TableSpec.expires_by_row`).
        """
        if not self.spec.expires_by_row or (start is None and end is None) or not batch.num_rows:
            return batch
        times = time_values(batch.column(self.spec.expiry_field))
        low, high = int(times.min()), int(times.max())
        if (start is None or start <= low) and (end is None or high < end):
            return batch
        if (start is not None and high < start) or (end is not None and low >= end):
            return batch.slice(0, 0)
        keep = np.ones(len(times), dtype=bool)
        if start is not None:
            keep &= times >= start
        if end is not None:
            keep &= times < end
        return batch.filter(pa.array(keep))

    def within(self, batch: pa.RecordBatch, hash_range: HashRange) -> pa.RecordBatch:
        """The rows with ``low <= hash < high``; the batch itself when that is all of them."""
        low, high = hash_range
        if (low, high) == (None, None) or not batch.num_rows:
            return batch
        if low is not None and low > _HASH_MAX:
            return batch.slice(0, 0)
        # Partial states in memory have no hash yet.
        hashed = HASH_COLUMN in batch.schema.names
        hashes = batch.column(HASH_COLUMN).to_numpy() if hashed else self.hash_of(batch)
        keep = np.ones(len(hashes), dtype=bool)
        if low is not None:
            keep &= hashes >= np.uint64(low)
        if high is not None and high <= _HASH_MAX:
            keep &= hashes < np.uint64(high)
        return batch if keep.all() else batch.filter(pa.array(keep))

    def merge(
        self, pieces: Sequence[pa.RecordBatch], *, watermark: int | None = None, drop_tombstones: bool = False
    ) -> pa.RecordBatch:
        """One sorted piece out of stored batches, from oldest to newest.

        Pieces of an aggregate table need not have their hash yet: merging makes new rows.
        """
        batches = [b for b in (self.alive(p, watermark, None) for p in pieces) if b.num_rows]
        if self.reduces and batches:
            assert self.merger is not None
            states = self.merger.reduce([b.select(self.spec.schema.names) for b in batches])
            batches = [self.to_stored(canonicalise(b, self.spec.key)) for b in states]
        batch = concat(batches, self.stored)
        order, starts = self.sort_order(batch)
        if self.spec.kind is TableKind.UPSERT and len(order):
            # The sort is stable, so the last row of each group of equal keys is the newest.
            order = order[np.append(starts[1:], len(order)) - 1]
            if drop_tombstones:
                order = order[~self.hidden(batch, watermark)[order]]
        merged = batch if _is_identity(order, batch.num_rows) else batch.take(pa.array(order))
        return merged if drop_tombstones or self.spec.expires_by_row else self._bury_expired(merged, watermark)

    def _bury_expired(self, batch: pa.RecordBatch, watermark: int | None) -> pa.RecordBatch:
        """Tombstones in place of the expired rows of a merged batch: they hide what older pieces may hold."""
        if self.spec.ttl_field is None or watermark is None:
            return batch
        expired = self.expired(batch, watermark)
        if not expired.any():
            return batch
        kept = pa.array(np.arange(len(expired)), mask=expired)
        arrays = []
        for field, column in zip(batch.schema, batch.columns, strict=True):
            if field.name == TOMBSTONE_COLUMN:
                arrays.append(pa.array(self.hidden(batch, watermark)))
            else:
                arrays.append(column if field.name in (*self.spec.key, HASH_COLUMN) else column.take(kept))
        return pa.RecordBatch.from_arrays(arrays, schema=self.stored)

    def sort_order(self, batch: pa.RecordBatch) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Stable physical order of the rows, and where in it each group of equal keys begins."""
        if self.spec.order is TableOrder.KEY:
            order = pc.sort_indices(batch.column(self.spec.key[0])).to_numpy().astype(np.intp)
            if not len(order):
                return order, order
            same = self._equal_to_previous(batch, order, np.arange(1, len(order)))
            return order, np.flatnonzero(np.append(True, ~same))
        columns = self.order_columns(batch)
        order = stable_order(columns)
        if not len(order):
            return order, order
        tied = np.ones(len(order) - 1, dtype=bool)
        for column in columns:
            ordered = column[order]
            tied &= ordered[1:] == ordered[:-1]
        if tied.any():
            order = self._group_collisions(batch, order, tied)
            tied[tied] = self._equal_to_previous(batch, order, np.flatnonzero(tied) + 1)
        return order, np.flatnonzero(np.append(True, ~tied))

    def order_columns(self, batch: pa.RecordBatch) -> list[npt.NDArray[Any]]:
        """The columns that the physical order compares, most significant first."""
        hashes = batch.column(HASH_COLUMN).to_numpy()
        times = self.times(batch)
        if times is None:
            return [hashes]
        return [times, hashes] if self.spec.order is TableOrder.TIME else [hashes, times]

    def key_arrays(self, batch: pa.RecordBatch) -> list[pa.Array]:
        """The key columns."""
        return [batch.column(k) for k in self.spec.key]

    def _equal_to_previous(
        self, batch: pa.RecordBatch, order: npt.NDArray[np.intp], at: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.bool_]:
        keys = self.key_arrays(batch)
        here, before = pa.array(order[at]), pa.array(order[at - 1])
        return rows_equal([k.take(here) for k in keys], [k.take(before) for k in keys])

    def _group_collisions(
        self, batch: pa.RecordBatch, order: npt.NDArray[np.intp], tied: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.intp]:
        """Reorder rows that agree in every order column so that equal keys lie together.

        One round per distinct key of a collision: compare every row with the first row that is not
        placed yet. With a 64-bit hash there is practically never more than one round.
        """
        group = np.cumsum(np.append(True, ~tied)) - 1
        code = np.zeros(len(order), dtype=np.int64)
        sizes = np.bincount(group)
        open_rows = np.flatnonzero(sizes[group] > 1)
        keys = self.key_arrays(batch)
        rounds = 0
        while len(open_rows):
            groups = group[open_rows]
            first = np.append(True, groups[1:] != groups[:-1])
            leader = open_rows[np.flatnonzero(first)][np.cumsum(first) - 1]
            rows, leaders = pa.array(order[open_rows]), pa.array(order[leader])
            same = rows_equal([k.take(rows) for k in keys], [k.take(leaders) for k in keys])
            code[open_rows] = rounds
            open_rows = open_rows[~same]
            rounds += 1
        if rounds <= 1:
            return order
        return order[np.lexsort((np.arange(len(order)), code, group))]


def _stored_schema(kind: TableKind, canonical: pa.Schema, keys: Collection[str]) -> pa.Schema:
    extra = [pa.field(HASH_COLUMN, pa.uint64(), nullable=False)]
    if kind is not TableKind.UPSERT:
        return pa.schema([*canonical, *extra])
    # A tombstone holds null in every column outside of the key, also where a row never does.
    columns = [f if f.name in keys else f.with_nullable(True) for f in canonical]
    return pa.schema([*columns, *extra, pa.field(TOMBSTONE_COLUMN, pa.bool_(), nullable=False)])


def time_values(array: pa.Array) -> Int64s:
    """Integers of an int64 or timestamp column without nulls, in its own unit; no copy."""
    values: Int64s = array.view(pa.int64()).to_numpy(zero_copy_only=True)
    return values


def key_prefixes(keys: pa.Array) -> UInt64s:
    """The first eight bytes of every key, big-endian, padded with zeros: ordered as the keys are."""
    binary = keys.cast(pa.binary())
    count = len(binary)
    offsets = np.frombuffer(binary.buffers()[1], dtype=np.int32)[binary.offset : binary.offset + count + 1]
    if not count or offsets[-1] == offsets[0]:
        return np.zeros(count, dtype=np.uint64)
    data = np.frombuffer(binary.buffers()[2], dtype=np.uint8)
    places = offsets[:-1, None].astype(np.int64) + np.arange(8)
    inside = places < offsets[1:, None]
    words = np.where(inside, data[np.where(inside, places, 0)], 0).astype(np.uint8)
    return words.view(">u8").reshape(count).astype(np.uint64)


def stable_order(columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.intp]:
    """Stable argsort by several columns, most significant first; constant columns cost nothing."""
    order: npt.NDArray[np.intp] | None = None
    for column in reversed(columns):
        if len(column) and column[0] == column[-1] and (column == column[0]).all():
            continue
        order = np.argsort(column, kind="stable") if order is None else order[np.argsort(column[order], kind="stable")]
    return np.arange(len(columns[0])) if order is None else order


def _is_identity(order: npt.NDArray[np.intp], rows: int) -> bool:
    return len(order) == rows and bool((order == np.arange(rows)).all())


def concat(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """One batch out of any number, of the given schema."""
    if not batches:
        return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
    if len(batches) == 1:
        return batches[0]
    return pa.concat_batches(batches)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name}: {f.type}" for f in schema)
