"""One table of a SlateDB backend: recent writes in a MemTable, checkpointed rows in a snapshot of the database.

A read takes, under the backend's lock, the snapshot and the pieces that it does not hold; both are
immutable, so what it sees is one moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from statebackend.backend import LookupResult, Matches
from statebackend.buffered_table import BufferedTable, BufferHost
from statebackend.memtable import Piece
from statebackend.merge import HASH_COLUMN, HashRange
from statebackend.slatedb_rows import RowCodec
from statebackend.tables import TableKind, TableOrder

__all__ = ["SlateHost", "SlateTable"]


class SlateHost(BufferHost, Protocol):
    """What a table needs of its backend."""

    snapshot: Any

    def get(self, snapshot: Any, keys: Sequence[bytes]) -> list[bytes]:
        """The values of those keys that are there."""

    def scan(self, snapshot: Any, low: bytes, high: bytes) -> list[bytes]:
        """The values of the keys from ``low`` up to ``high``, in their order."""


class SlateTable(BufferedTable):
    """A `StateTable` on SlateDB."""

    def __init__(self, host: SlateHost, codec: RowCodec, watermark: int | None) -> None:
        super().__init__(host, codec.layout, watermark)
        self._backend = host
        self.codec = codec
        # State below is protected by the backend's lock.
        self.frozen: dict[int, tuple[Piece, ...]] = {}

    def scan(
        self,
        columns: Sequence[str] | None = None,
        time_range: tuple[int | None, int | None] = (None, None),
        *,
        merged: bool = True,
        hash_range: HashRange = (None, None),
    ) -> list[pa.RecordBatch]:
        """Live rows with ``start <= time < end``; see `StateTable.scan`."""
        self._check_scan(time_range, hash_range, merged=merged)
        start, end = time_range
        snapshot, pieces, watermark = self._view()
        if self.spec.expires_by_row and watermark is not None and (start is None or start < watermark):
            start = watermark
        stored = self.codec.rows_of(self._backend.scan(snapshot, *self.codec.range_of(start, end, hash_range)))
        batches = [self.layout.alive(b, start, end) for b in (stored, *(p.to_stored(self.layout) for p in pieces))]
        batches = [self.layout.within(b, hash_range) for b in batches]
        if merged:
            batches = [self.layout.merge(batches, watermark=watermark, drop_tombstones=True)]
        return [self.layout.to_user(b, columns) for b in batches if b.num_rows]

    def lookup(self, keys: pa.RecordBatch) -> LookupResult:
        """The row of each key; see `StateTable.lookup`."""
        self._check_lookup(keys)
        probes = self._hashed(keys, self.spec.key)
        snapshot, pieces, watermark = self._view()
        stored = self.codec.rows_of(self._backend.get(snapshot, sorted(set(self.codec.keys_of(probes)))))
        everything = [stored, *(p.to_stored(self.layout) for p in pieces)]
        rows = self.layout.merge(everything, watermark=watermark, drop_tombstones=True)
        return self._answer(rows, self._places(rows, probes))

    def matches(self, keys: pa.RecordBatch, time_range: tuple[int | None, int | None] = (None, None)) -> Matches:
        """All live rows of the given partition keys; see `StateTable.matches`. A range scan for every key."""
        probes = self._partition_probes(keys, time_range)
        start, end = time_range
        snapshot, pieces, watermark = self._view()
        if self.spec.expires_by_row and watermark is not None and (start is None or start < watermark):
            start = watermark
        hashes = np.unique(probes.column(HASH_COLUMN).to_numpy())
        if self.spec.order is TableOrder.TIME:
            values = self._backend.scan(snapshot, *self.codec.range_of(start, end))
        else:
            ranges = (self.codec.range_of(None, None, (h, h + 1)) for h in hashes.tolist())
            values = [value for low, high in ranges for value in self._backend.scan(snapshot, low, high)]
        batches = [self.codec.rows_of(values), *(p.to_stored(self.layout) for p in pieces)]
        alive = [self.layout.alive(b, start, end) for b in batches]
        rows = self.layout.merge(alive, watermark=watermark, drop_tombstones=True)
        return self._matches(rows, probes)

    def freeze(self, sequence: int) -> None:
        """Swap the MemTable for an empty one; the backend's lock is held."""
        if pieces := self.memtable.take():
            self.frozen = {**self.frozen, sequence: pieces}

    def committed(self, low_mark: int) -> None:
        """The database holds everything up to ``low_mark``; the backend's lock is held."""
        self.frozen = {s: p for s, p in self.frozen.items() if s > low_mark}

    def _view(self) -> tuple[Any, list[Piece], int | None]:
        if self.spec.kind is TableKind.UPSERT:
            self._sort_memtable()
        with self._host.lock:
            frozen = [piece for pieces in self.frozen.values() for piece in pieces]
            return self._backend.snapshot, [*frozen, *self.memtable.pieces()], self._watermark
