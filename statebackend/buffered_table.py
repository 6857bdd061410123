"""The part of a table that is the same wherever its rows end up: checks, the MemTable, the watermark.

Rows are checked before anything is touched, so that a batch which does not fit changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from statebackend.backend import LookupResult, Matches
from statebackend.errors import SchemaMismatchError
from statebackend.keys import canonicalise
from statebackend.memtable import MemTable, null_row_batch
from statebackend.merge import HASH_COLUMN, HashRange, TableLayout
from statebackend.probe import match_rows
from statebackend.tables import TableKind, TableOrder, TableSpec

__all__ = ["BufferHost", "BufferedTable"]


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
        # State below is protected by the backend's lock.
        self.memtable = MemTable(layout)
        self._watermark = watermark

    @property
    def spec(self) -> TableSpec:
        """The declaration of the table."""
        return self.layout.spec

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

    def _probes(self, keys: pa.RecordBatch) -> pa.RecordBatch:
        """The keys to look up in stored form: canonical, with their hash. Raises unless they can be."""
        self._host.check_usable()
        if self.spec.kind is TableKind.APPEND:
            raise ValueError(f"table {self.spec.name!r}: an append table holds several rows of a key: scan it")
        self._check_keys(keys)
        return self._hashed(keys, self.spec.key)

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

    def _answer(self, rows: pa.RecordBatch, place: npt.NDArray[Any]) -> LookupResult:
        hit = place >= 0
        indices = pa.array(np.where(hit, place, 0), mask=~hit)
        names = self.spec.schema.names
        nullable = pa.schema([self.spec.schema.field(n).with_nullable(True) for n in names])
        if not rows.num_rows:
            arrays = [pa.nulls(len(hit), f.type) for f in nullable]
            return LookupResult(pa.RecordBatch.from_arrays(arrays, schema=nullable), pa.array(hit))
        return LookupResult(_nullable(rows.select(names).take(indices)).cast(nullable), pa.array(hit))


def _nullable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same columns, declared nullable: a missing key is a row of nulls."""
    return pa.RecordBatch.from_arrays(batch.columns, schema=pa.schema([f.with_nullable(True) for f in batch.schema]))
