"""The part of a table that is the same wherever its rows end up: checks, the MemTable, the watermark.

Rows are checked before anything is touched, so that a batch which does not fit changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from statebackend.backend import LookupResult, Matches
from statebackend.errors import SchemaMismatchError
from statebackend.keys import canonicalise
from statebackend.manifest import TableCut
from statebackend.memtable import Fold, MemTable, Piece, null_row_batch
from statebackend.merge import HASH_COLUMN, HashRange, TableLayout, concat
from statebackend.probe import Probes, Row, SortedRows, locate, match_rows
from statebackend.tables import TableKind, TableOrder, TableSpec

__all__ = ["BufferHost", "BufferedTable"]


_TAKE_BYTES = 64 << 20


class BufferHost(Protocol):
    """What a table needs of the backend that it belongs to."""

    lock: Any

    def check_usable(self) -> None:
        """Raise the error that ended the backend, if one did."""

    def relieve(self) -> None:
        """Called after every write, without the lock: flush early, or wait, when memory is short."""


class BufferedTable:
    """Writes, deletes and expiry of a `StateTable`."""

    def __init__(self, host: BufferHost, layout: TableLayout, watermark: int | None) -> None:
        self._host = host
        self.layout = layout
        self._folding = threading.Lock()  # taken before the backend's lock, never while that is held
        # State below is protected by the backend's lock.
        self.memtable = MemTable(layout)
        self._watermark = watermark
        self._accepted_schema: pa.Schema | None = None  # of the keys that were looked up last; any thread's will do
        # Constant: what answers look like.
        self._answer_schema = pa.schema([f.with_nullable(True) for f in layout.spec.schema])
        self._nothing = pa.RecordBatch.from_arrays([pa.nulls(1, f.type) for f in layout.answer], schema=layout.answer)

    @property
    def spec(self) -> TableSpec:
        """The declaration of the table."""
        return self.layout.spec

    def cut(self) -> TableCut:
        """What a barrier says of the table; the backend's lock is held."""
        layout = self.layout
        return TableCut(
            spec=layout.spec, history=layout.history, fingerprint=layout.fingerprint, watermark=self._watermark
        )

    @property
    def watermark(self) -> int | None:
        """Rows with a time below this are dead and hidden; None before the first `expire`."""
        return self._watermark

    def write(self, batch: pa.RecordBatch) -> None:
        """Upsert, merge or append the rows, by the kind of the table.

        Raises `SchemaMismatchError` when the columns differ from the table's.
        """
        self._host.check_usable()
        self.layout.check(batch)
        with self._host.lock:
            self.memtable.append(batch)
            crowded = self.memtable.is_crowded
        if crowded and self._folding.acquire(blocking=False):  # else somebody is at it
            try:
                self._fold(Fold.reduced)
            finally:
                self._folding.release()
        self._host.relieve()

    def delete(self, keys: pa.RecordBatch) -> None:
        """Delete the rows of these keys. Columns: the key columns. Upsert tables only."""
        self._host.check_usable()
        if self.spec.kind is not TableKind.UPSERT:
            raise ValueError(
                f"table {self.spec.name!r}: rows of kind {self.spec.kind.value!r} expire; no delete by key"
            )
        self._check_keys(keys)
        with self._host.lock:
            self.memtable.append(null_row_batch(self.spec.schema, keys), tombstone=True)
        self._host.relieve()

    def expire(self, before: int) -> None:
        """Declare all rows with a time (or ttl) below ``before``, in the unit of that column, dead."""
        self._host.check_usable()
        if self.spec.expiry_field is None:
            raise ValueError(f"table {self.spec.name!r}: no time_field and no ttl_field, so nothing can expire")
        with self._host.lock:
            if self._watermark is None or before > self._watermark:
                self._watermark = before
                self.memtable.expire(before)

    def _sort_memtable(self) -> None:
        """Merge what was written since the last time, without the backend's lock."""
        if not self.memtable.is_sorted:
            with self._folding:
                self._fold(Fold.sorted)

    def _fold(self, merge: Callable[[Fold], Sequence[Piece]]) -> None:
        with self._host.lock:
            fold = self.memtable.begin_fold()
        pieces = merge(fold)
        with self._host.lock:
            self.memtable.adopt(fold, pieces)

    def _check_times(self, time_range: tuple[int | None, int | None]) -> None:
        if self.spec.time_field is None and time_range != (None, None):
            raise ValueError(f"table {self.spec.name!r}: a time range needs a time_field")

    def _check_scan(
        self, time_range: tuple[int | None, int | None], hash_range: HashRange = (None, None), *, merged: bool
    ) -> None:
        """Raise unless the table can be scanned so."""
        self._host.check_usable()
        self._check_times(time_range)
        if self.spec.order is TableOrder.KEY and hash_range != (None, None):
            raise ValueError(f"table {self.spec.name!r}: order 'key' has no hash ranges")
        if any(bound is not None and not 0 <= bound <= 1 << 64 for bound in hash_range):
            raise ValueError(f"table {self.spec.name!r}: hash range {hash_range} is not within 0 and 2**64")
        if not merged and self.spec.kind is not TableKind.AGGREGATE:
            raise ValueError(f"table {self.spec.name!r}: only partial states can be read unmerged")

    def _check_lookup(self, keys: pa.RecordBatch) -> None:
        """Raise unless the keys can be looked up."""
        self._host.check_usable()
        if self.spec.kind is TableKind.APPEND:
            raise ValueError(f"table {self.spec.name!r}: an append table holds several rows of a key: scan it")
        if keys.schema != self._accepted_schema:
            self._check_keys(keys)
            self._accepted_schema = keys.schema

    def _partition_probes(self, keys: pa.RecordBatch, time_range: tuple[int | None, int | None]) -> pa.RecordBatch:
        """The partition keys to match in stored form. Raises unless the table can be asked so."""
        self._host.check_usable()
        self._check_times(time_range)
        names = self.layout.partition_key
        if self.spec.order is TableOrder.KEY or not names:
            raise ValueError(f"table {self.spec.name!r}: only tables of order 'hash' or 'time' with a key match keys")
        self._check_keys(keys, names)
        return self._hashed(keys, names)

    def _hashed(self, keys: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The keys in stored form: canonical, with their hash."""
        keys = canonicalise(keys.select(list(names)))
        return keys.append_column(HASH_COLUMN, pa.array(self.layout.hash_of(keys)))

    def _check_keys(self, keys: pa.RecordBatch, names: Sequence[str] | None = None) -> None:
        expected = {k: self.spec.schema.field(k).type for k in names or self.spec.key}
        found = dict(zip(keys.schema.names, keys.schema.types, strict=True))
        if found != expected:
            raise SchemaMismatchError(f"table {self.spec.name!r}: key columns are {expected}, got {found}")

    def _matches(self, rows: pa.RecordBatch, probes: pa.RecordBatch) -> Matches:
        """The merged ``rows`` that answer the probes."""
        positions, key_index = match_rows(self.layout, rows, probes)
        return Matches(self.layout.to_user(rows.take(pa.array(positions)), None), pa.array(key_index))

    def _places(self, rows: pa.RecordBatch, probes: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """For each probe its row in one merged piece, or -1."""
        sorted_probes = Probes.of(self.layout, probes)
        place = np.full(probes.num_rows, -1, dtype=np.int64)
        found = locate(self.layout, SortedRows.of(self.layout, rows), sorted_probes)
        place[sorted_probes.rows] = found
        return place

    def _answer(self, rows: pa.RecordBatch, place: npt.NDArray[np.int64]) -> LookupResult:
        """For each probe the row in its place, or nulls where that is -1."""
        hit = place >= 0
        if not rows.num_rows:
            rows, place = self._nothing, np.zeros(len(place), dtype=np.int64)
        rows, places = rows.select(self.spec.schema.names), pa.array(place, mask=None if hit.all() else ~hit)
        # Arrow reserves memory for as many rows of average size as are taken, those that are null included.
        step = max(1, _TAKE_BYTES * rows.num_rows // max(1, rows.nbytes))
        parts = [rows.take(places.slice(start, step)) for start in range(0, max(1, len(places)), step)]
        return LookupResult(self._as_answer(parts[0] if len(parts) == 1 else pa.concat_batches(parts)), pa.array(hit))

    def _answer_rows(self, rows: Sequence[Row | None]) -> LookupResult:
        """The same for a few rows, of different pieces."""
        slices = [self._nothing if row is None else row[0].payload.slice(row[1], 1) for row in rows]
        batch = slices[0] if len(slices) == 1 else concat(slices, self.layout.answer)
        return LookupResult(self._as_answer(batch), pa.array([row is not None for row in rows], pa.bool_()))

    def _as_answer(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The user's types; nullable, since a missing key is a row of nulls."""
        if batch.schema == self._answer_schema:
            return batch
        return pa.RecordBatch.from_arrays(batch.columns, schema=self.layout.answer).cast(self._answer_schema)
