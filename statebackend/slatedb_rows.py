"""Rows of a table as keys and values of an ordered key-value store.

::

    key    "t" | length of the table's name, 2 bytes | name | order columns | append only: sequence, row
    value  Arrow IPC record batch message, without its schema: the rows of the key

Numbers are big-endian, times with the sign bit flipped, so that keys sort as the table does: by (hash, time), or by
(time, hash) for ``TableOrder.TIME``. An entry of an upsert or aggregate table holds all rows that agree in its key:
one, unless two keys collide in 64 bits. An append table has an entry for each row, numbered in write order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from statebackend.errors import CorruptionError
from statebackend.memtable import Piece
from statebackend.merge import TOMBSTONE_COLUMN, HashRange, TableLayout, concat
from statebackend.tables import TableKind, TableOrder

__all__ = ["RowCodec"]

Changes = dict[bytes, bytes | None]
"""New value by key; None deletes."""

_PLACE = struct.Struct(">QI")
_SIGN = np.uint64(1 << 63)
_WORD_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RowCodec:
    """Keys and values of one table; pure."""

    layout: TableLayout

    @property
    def prefix(self) -> bytes:
        """What all keys of the table begin with."""
        name = self.layout.spec.name.encode()
        return b"t" + struct.pack(">H", len(name)) + name

    def range_of(self, start: int | None, end: int | None, hash_range: HashRange = (None, None)) -> tuple[bytes, bytes]:
        """First key and end of the keys that may hold times in ``[start, end)`` and hashes in the range."""
        low, high = self.prefix, self.prefix[:-1] + bytes([self.prefix[-1] + 1])
        if self.layout.spec.order is TableOrder.TIME:
            low = low if start is None else self.prefix + _time_key(start)
            high = high if end is None else self.prefix + _time_key(end)
        elif self.layout.spec.order is TableOrder.HASH:
            first, last = hash_range
            low = low if first is None else self.prefix + struct.pack(">Q", min(first, _WORD_MAX))
            high = high if last is None or last > _WORD_MAX else self.prefix + struct.pack(">Q", last)
        return low, high

    def keys_of(self, batch: pa.RecordBatch) -> list[bytes]:
        """The key of every row of a stored batch (key columns and hash are enough)."""
        prefix, words = self.prefix, self._words(batch)
        width, raw = 8 * words.shape[1], words.tobytes()
        return [prefix + raw[at : at + width] for at in range(0, len(raw), width)]

    def rows_of(self, values: Iterable[bytes]) -> pa.RecordBatch:
        """The stored batch of the rows in these values, in their order. Raises `CorruptionError`."""
        try:
            read = [pa.ipc.read_record_batch(pa.py_buffer(v), self.layout.canonical) for v in values]
        except (pa.ArrowException, OSError) as error:
            raise CorruptionError(f"table {self.layout.spec.name!r}: a value is not an Arrow batch: {error}") from error
        return self.layout.to_stored(concat(read, self.layout.canonical))

    def merged(self, pieces: Sequence[Piece]) -> pa.RecordBatch:
        """What one checkpoint writes to an upsert or aggregate table: one stored row per key, deletions among them."""
        return self.layout.merge([p.to_stored(self.layout) for p in pieces])

    def changes(self, existing: pa.RecordBatch, written: pa.RecordBatch, watermark: int | None) -> Changes:
        """The entries after ``written`` (see `merged`), given the rows that are stored under the same keys."""
        changes: Changes = dict.fromkeys(self.keys_of(written))
        rows = self.layout.merge([existing, written], watermark=watermark)
        if self.layout.spec.kind is TableKind.UPSERT:
            rows = rows.filter(pc.invert(rows.column(TOMBSTONE_COLUMN)))
        if rows.num_rows:
            words, plain = self._words(rows), rows.select(self.layout.canonical.names)
            starts = np.flatnonzero(np.append(True, (words[1:] != words[:-1]).any(axis=1)))
            keys = self.keys_of(rows.take(pa.array(starts)))
            for key, start, end in zip(keys, starts, np.append(starts[1:], rows.num_rows), strict=True):
                changes[key] = _encode(plain, int(start), int(end))
        return changes

    def appended(self, pieces: Mapping[int, Sequence[Piece]], watermark: int | None) -> Changes:
        """The entries of rows written to an append table, by sequence; the same again when asked again."""
        changes: Changes = {}
        for sequence, parts in pieces.items():
            rows = concat([p.to_stored(self.layout) for p in parts], self.layout.stored)
            rows = self.layout.alive(rows, watermark, None)
            plain = rows.select(self.layout.canonical.names)
            for row, key in enumerate(self.keys_of(rows)):
                changes[key + _PLACE.pack(sequence, row)] = _encode(plain, row, row + 1)
        return changes

    def _words(self, batch: pa.RecordBatch) -> npt.NDArray[np.void]:
        columns = [c if c.dtype == np.uint64 else c.view(np.uint64) ^ _SIGN for c in self.layout.order_columns(batch)]
        return np.stack(columns, axis=1).astype(">u8")


def _encode(batch: pa.RecordBatch, start: int, end: int) -> bytes:
    data: bytes = batch.slice(start, end - start).serialize().to_pybytes()
    return data


def _time_key(time: int) -> bytes:
    return struct.pack(">Q", min(max(time, -(1 << 63)), (1 << 63) - 1) + (1 << 63))
