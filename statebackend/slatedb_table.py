"""One table of a SlateDB backend: recent writes in a MemTable, checkpointed rows in a snapshot of the database.

A read takes, under the backend's lock, the snapshot and the pieces that it does not hold; both are
immutable, so what it sees is one moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from statebackend.backend import LookupResult
from statebackend.errors import SchemaMismatchError
from statebackend.keys import canonicalise
from statebackend.memtable import MemTable, Piece, null_row_batch
from statebackend.merge import HASH_COLUMN
from statebackend.probe import probe
from statebackend.slatedb_rows import RowCodec
from statebackend.tables import TableKind, TableSpec

__all__ = ["SlateHost", "SlateTable"]


class SlateHost(Protocol):
    """What a table needs of its backend."""

    lock: Any
    snapshot: Any

    def check_usable(self) -> None:
        """Raise the error that ended the backend, if one did."""

    def get(self, snapshot: Any, keys: Sequence[bytes]) -> list[bytes]:
        """The values of those keys that are there."""

    def scan(self, snapshot: Any, low: bytes, high: bytes) -> list[bytes]:
        """The values of the keys from ``low`` up to ``high``, in their order."""


class SlateTable:
    """A `StateTable` on SlateDB."""

    def __init__(self, host: SlateHost, codec: RowCodec, watermark: int | None) -> None:
        self._host = host
        self.codec = codec
        self.layout = codec.layout
        # State below is protected by the backend's lock.
        self.frozen: dict[int, tuple[Piece, ...]] = {}
        self._memtable = MemTable(codec.layout)
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
        """Upsert, merge or append the rows; raises `SchemaMismatchError` for other columns."""
        self._host.check_usable()
        self.layout.check(batch)
        with self._host.lock:
            self._memtable.append(batch)

    def delete(self, keys: pa.RecordBatch) -> None:
        """Delete the rows of these keys. Columns: the key columns. Upsert tables only."""
        self._host.check_usable()
        if self.spec.kind is not TableKind.UPSERT:
            raise ValueError(f"table {self.spec.name!r}: rows of kind {self.spec.kind.value!r} expire; no delete")
        self._check_keys(keys)
        with self._host.lock:
            self._memtable.append(null_row_batch(self.spec.schema, keys), tombstone=True)

    def expire(self, before: int) -> None:
        """Declare all rows with a time below ``before`` (in the unit of the time column) dead."""
        self._host.check_usable()
        if self.spec.time_field is None:
            raise ValueError(f"table {self.spec.name!r}: no time_field, so nothing can expire")
        with self._host.lock:
            if self._watermark is None or before > self._watermark:
                self._watermark = before
                self._memtable.expire(before)

    def scan(
        self,
        columns: Sequence[str] | None = None,
        time_range: tuple[int | None, int | None] = (None, None),
        *,
        merged: bool = True,
    ) -> list[pa.RecordBatch]:
        """Live rows with ``start <= time < end``; see `StateTable.scan`."""
        self._host.check_usable()
        start, end = time_range
        if self.spec.time_field is None and (start is not None or end is not None):
            raise ValueError(f"table {self.spec.name!r}: a time range needs a time_field")
        if not merged and self.spec.kind is not TableKind.AGGREGATE:
            raise ValueError(f"table {self.spec.name!r}: only partial states can be read unmerged")
        snapshot, pieces, watermark = self._view()
        if watermark is not None and (start is None or start < watermark):
            start = watermark
        stored = self.codec.rows_of(self._host.scan(snapshot, *self.codec.range_of(start, end)))
        batches = [self.layout.alive(b, start, end) for b in (stored, *(p.to_stored(self.layout) for p in pieces))]
        if merged:
            batches = [self.layout.merge(batches, drop_tombstones=True)]
        return [self.layout.to_user(b, columns) for b in batches if b.num_rows]

    def lookup(self, keys: pa.RecordBatch) -> LookupResult:
        """The row of each key; see `StateTable.lookup`."""
        self._host.check_usable()
        if self.spec.kind is TableKind.APPEND:
            raise ValueError(f"table {self.spec.name!r}: an append table holds several rows of a key: scan it")
        self._check_keys(keys)
        probes = canonicalise(keys.select(list(self.spec.key)))
        probes = probes.append_column(HASH_COLUMN, pa.array(self.layout.hash_of(probes)))
        snapshot, pieces, watermark = self._view()
        stored = self.codec.rows_of(self._host.get(snapshot, sorted(set(self.codec.keys_of(probes)))))
        everything = [stored, *(p.to_stored(self.layout) for p in pieces)]
        rows = self.layout.merge(everything, watermark=watermark, drop_tombstones=True)
        place = probe(self.layout, rows, probes, np.arange(probes.num_rows))
        hit = place >= 0
        names = self.spec.schema.names
        found = rows.select(names).take(pa.array(np.where(hit, place, 0), mask=~hit))
        nullable = pa.schema([f.with_nullable(True) for f in found.schema])
        answer = pa.RecordBatch.from_arrays(found.columns, schema=nullable)
        wanted = pa.schema([self.spec.schema.field(n).with_nullable(True) for n in names])
        return LookupResult(answer.cast(wanted), pa.array(hit))

    def freeze(self, sequence: int) -> None:
        """Swap the MemTable for an empty one; the backend's lock is held."""
        if pieces := self._memtable.take():
            self.frozen = {**self.frozen, sequence: pieces}

    def committed(self, low_mark: int) -> None:
        """The database holds everything up to ``low_mark``; the backend's lock is held."""
        self.frozen = {s: p for s, p in self.frozen.items() if s > low_mark}

    def _view(self) -> tuple[Any, list[Piece], int | None]:
        with self._host.lock:
            frozen = [piece for pieces in self.frozen.values() for piece in pieces]
            return self._host.snapshot, [*frozen, *self._memtable.pieces()], self._watermark

    def _check_keys(self, keys: pa.RecordBatch) -> None:
        expected = {k: self.spec.schema.field(k).type for k in self.spec.key}
        found = dict(zip(keys.schema.names, keys.schema.types, strict=True))
        if found != expected:
            raise SchemaMismatchError(f"table {self.spec.name!r}: key columns are {expected}, got {found}")
