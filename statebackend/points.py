"""Lookups of a few keys: plain Python on what is in memory, where one vectorised call would cost more than the keys.

Works for upsert tables whose keys are integers, booleans, strings or bytes, and a time column. Whatever is not in
memory raises `NotInMemoryError`; the vectorised lookup then reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from statebackend.cache import BlockReader
from statebackend.merge import TableLayout
from statebackend.probe import Row, SortedRows
from statebackend.scalar_hash import WordOf, fold_words, word_function
from statebackend.sstable import SSTableMeta
from statebackend.sstable_index import SSTableIndex
from statebackend.table_view import TableView
from statebackend.tables import TableKind, TableOrder

__all__ = ["KEYS_MAX", "Key", "NotInMemoryError", "PointLookup"]

Key: TypeAlias = tuple[Any, ...]
"""Values of the key columns as Python gives them; the time column as an integer in its own unit."""
KEYS_MAX = 16
"""Batches up to this size are looked up key by key."""


class NotInMemoryError(Exception):
    """Something that a key needs has to be read first. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class PointLookup:
    """How single keys of one table are found. ``words``: position in the key and word function of every column
    of the partition key; ``time``: position of the time column.
    """

    layout: TableLayout
    words: tuple[tuple[int, WordOf], ...]
    time: int | None
    by_key: bool
    by_time: bool
    hash_mask: int

    @classmethod
    def of(cls, layout: TableLayout) -> PointLookup | None:
        """None for tables whose keys cannot be found so."""
        spec = layout.spec
        if spec.kind is not TableKind.UPSERT:
            return None
        words = []
        for place, name in enumerate(spec.key):
            if name == spec.time_field:
                continue
            if (function := word_function(layout.canonical.field(name).type)) is None:
                return None
            words.append((place, function))
        time = None if spec.time_field is None else spec.key.index(spec.time_field)
        mask = (1 << 64) - (1 << (64 - layout.hasher.bits))
        return cls(layout, tuple(words), time, spec.order is TableOrder.KEY, spec.order is TableOrder.TIME, mask)

    def keys_of(self, batch: pa.RecordBatch) -> list[Key]:
        """The keys in a batch of the key columns."""
        columns = []
        for place, name in enumerate(self.layout.spec.key):
            column = batch.column(name)
            columns.append((column.view(pa.int64()) if place == self.time else column).to_pylist())
        return list(zip(*columns, strict=True))

    def find(self, view: TableView, keys: Sequence[Key]) -> list[Row | None]:
        """The live row of each key. Raises `NotInMemoryError`."""
        memory, files = view.memory[::-1], view.files[::-1]
        return [self._find(view, memory, files, key) for key in keys]

    def _find(
        self, view: TableView, memory: Sequence[SortedRows], files: Sequence[SSTableMeta], key: Key
    ) -> Row | None:
        """``memory``, ``files``: from newest to oldest."""
        time = None if self.time is None else key[self.time]
        if time is not None and view.watermark is not None and time < view.watermark:
            return None
        hash_ = fold_words([word(key[place]) for place, word in self.words]) & self.hash_mask if self.words else 0
        first = _prefix(key[0]) if self.by_key else hash_
        for rows in memory:
            if (at := self._position(rows, key, first, time)) is not None:
                return None if self._hidden(rows, at, view.watermark) else (rows, at)
        for meta in files:
            if not meta.overlaps(time, None if time is None else time + 1, (first, first + 1)):
                continue
            for rows in self._blocks(view.reader, meta, first, hash_, time):
                if (at := self._position(rows, key, first, time)) is not None:
                    return None if self._hidden(rows, at, view.watermark) else (rows, at)
        return None

    def _hidden(self, rows: SortedRows, at: int, watermark: int | None) -> bool:
        """Whether the newest row of a key is deleted or expired."""
        if rows.dead is not None and rows.dead[at]:
            return True
        if watermark is None or self.time is not None:  # keys below the watermark are not looked for
            return False
        return bool(self.layout.expired(rows.payload.slice(at, 1), watermark).any())

    def _blocks(
        self, reader: BlockReader, meta: SSTableMeta, first: int, hash_: int, time: int | None
    ) -> Iterator[SortedRows]:
        if (file := reader.open_now(meta)) is None:
            raise NotInMemoryError
        if file.filter is not None and not file.filter.may_hold_one(hash_):
            return
        for number in self._numbers(file.index, first, time):
            if (block := reader.block_now(meta, number)) is None:
                raise NotInMemoryError
            yield block

    def _numbers(self, index: SSTableIndex, hash_: int, time: int | None) -> range:
        """Blocks that may hold the key; they are sorted as the rows are."""
        if self.by_time:
            at = np.int64(time or 0)
            return range(int(index.time_max.searchsorted(at)), int(index.time_min.searchsorted(at, "right")))
        of = np.uint64(hash_)
        return range(int(index.hash_max.searchsorted(of)), int(index.hash_min.searchsorted(of, "right")))

    def _position(self, rows: SortedRows, key: Key, hash_: int, time: int | None) -> int | None:
        """The row of the key in a piece."""
        if self.by_key:
            return _ordered_position(rows, key[0], hash_)
        if time is None:
            wanted: Sequence[np.generic] = (np.uint64(hash_),)
        elif self.by_time:
            wanted = (np.int64(time), np.uint64(hash_))
        else:
            wanted = (np.uint64(hash_), np.int64(time))
        low, high = 0, rows.num_rows
        for column, value in zip(rows.columns, wanted, strict=True):
            part = column[low:high]
            low, high = low + int(part.searchsorted(value)), low + int(part.searchsorted(value, "right"))
            if low == high:
                return None
        for at in range(low, high):  # one, unless keys collide
            if all(rows.keys[place][at].as_py() == key[place] for place, _ in self.words):
                return at
        return None


def _ordered_position(rows: SortedRows, key: bytes | str, prefix: int) -> int | None:
    """The row of a key in order ``key``: by its first eight bytes, then by the whole."""
    column, wanted, keys = rows.columns[0], np.uint64(prefix), rows.keys[0]
    low, high = int(column.searchsorted(wanted)), int(column.searchsorted(wanted, "right"))
    end = high
    while low < high:
        middle = (low + high) // 2
        if keys[middle].as_py() < key:
            low = middle + 1
        else:
            high = middle
    return low if low < end and keys[low].as_py() == key else None


def _prefix(key: bytes | str) -> int:
    """The first eight bytes of a key as `merge.key_prefixes` has them."""
    raw = key.encode() if isinstance(key, str) else key
    return int.from_bytes(raw[:8].ljust(8, b"\0"), "big")
