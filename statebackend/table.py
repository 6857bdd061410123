"""One table of an open store: writes go to its MemTable, reads see every piece at one moment.

A read takes, under the store's lock, the pieces of the MemTable, the frozen MemTables and the list
of files; all are immutable, so the rest needs no lock. Files are read on the store's runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from statebackend.backend import LookupResult, Matches
from statebackend.buffered_table import BufferedTable, BufferHost
from statebackend.compaction import KeyRange
from statebackend.memtable import FrozenMemTable
from statebackend.merge import HashRange, TableLayout, key_prefixes
from statebackend.points import KEYS_MAX, Key, NotInMemoryError, PointLookup
from statebackend.probe import Row
from statebackend.ranges import live_rows
from statebackend.sstable import SSTableMeta
from statebackend.sweep import SWEEP_BYTES, ReadCount, Sweep
from statebackend.table_view import FileHost, TableView
from statebackend.tables import TableKind, TableOrder

__all__ = ["LsmTable", "TableHost"]


class TableHost(BufferHost, FileHost, Protocol):
    """What a table needs of the store that it belongs to."""


class LsmTable(BufferedTable):
    """A `StateTable` of the LSM store."""

    def __init__(self, host: TableHost, layout: TableLayout, files: tuple[SSTableMeta, ...], watermark: int | None):
        super().__init__(host, layout, watermark)
        self._store = host
        self._points = PointLookup.of(layout)
        # State below is protected by the store's lock.
        self.frozen: tuple[FrozenMemTable, ...] = ()
        self.files = files
        self.early: tuple[tuple[int, SSTableMeta], ...] = ()  # flushed before their checkpoint, by sequence

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
        with self._view() as view:
            start, end = view.alive(time_range)
            files = [f for f in view.files if f.overlaps(start, end, hash_range)]
            blocks = view.blocks(files, lambda _, index: index.overlapping(start, end, hash_range))
        layout = self.layout
        batches = [b.batch for b in blocks]
        pieces = [p.to_stored(layout) if merged else p.batch for p in view.pieces]
        if merged and self.spec.kind is not TableKind.AGGREGATE and pieces:
            pieces = [layout.merge(pieces)]  # sorted, as blocks are
        batches = [layout.within(layout.alive(b, start, end), hash_range) for b in (*batches, *pieces)]
        if merged and self.spec.kind is TableKind.AGGREGATE:
            batches = [layout.merge(batches, watermark=view.watermark, drop_tombstones=True)]
        elif merged:
            batches = live_rows(layout, batches, view.watermark)
        return [self.layout.to_user(b, columns) for b in batches if b.num_rows]

    def matches(self, keys: pa.RecordBatch, time_range: tuple[int | None, int | None] = (None, None)) -> Matches:
        """All live rows of the given partition keys; see `StateTable.matches`."""
        probes = self._partition_probes(keys, time_range)
        with self._view(ordered=True) as view:
            rows = view.merge_partitions(probes, *view.alive(time_range))
        return self._matches(rows, probes)

    def scan_keys(self, start: bytes | None = None, end: bytes | None = None) -> Iterator[pa.RecordBatch]:
        """Live rows with ``start <= key < end`` in the order of the key, a bounded piece at a time.

        For tables of order ``key``. All pieces show the same moment: that of the first one.
        """
        if self.spec.order is not TableOrder.KEY:
            raise ValueError(f"table {self.spec.name!r}: order {self.spec.order.value!r} has no key ranges")
        with self.sweep() as sweep:
            for keys in sweep.ranges():
                if self._outside(keys, start, end):
                    continue
                for rows in sweep.rows_of(keys, sweep.selection(keys)):
                    if (between := self._between(rows, start, end)).num_rows:
                        yield between

    @contextmanager
    def sweep(
        self,
        predicate: pc.Expression | None = None,
        *,
        count: ReadCount | None = None,
        range_bytes: int = SWEEP_BYTES,
    ) -> Iterator[Sweep]:
        """This moment of the table, to be read in pieces of bounded size until the end of the block.

        ``predicate``: only rows that match it are wanted; it must be applied to what is read all the same. ``count``
        and ``range_bytes`` as in `Sweep.begin`.
        """
        self._host.check_usable()
        with self._view() as view:
            yield Sweep.begin(view, predicate, count, range_bytes)

    def moment(self) -> TableView:
        """Everything at this moment; its files may go any time. The store's lock is held."""
        pieces = (*(piece for f in self.frozen for piece in f.pieces), *self.memtable.pieces())
        files = (*self.files, *(meta for _, meta in self.early))
        return TableView(self.layout, self._store, files, pieces, self._watermark)

    def _outside(self, keys: KeyRange, start: bytes | None, end: bytes | None) -> bool:
        """Whether no key of the range can be asked for, by the first eight bytes."""
        if start is not None and keys.high is not None and int(key_prefixes(pa.array([start]))[0]) >= keys.high[0]:
            return True
        return end is not None and keys.low is not None and int(key_prefixes(pa.array([end]))[0]) < keys.low[0]

    def _between(self, rows: pa.RecordBatch, start: bytes | None, end: bytes | None) -> pa.RecordBatch:
        """The rows of a sorted piece with ``start <= key < end``."""
        keys = rows.column(self.spec.key[0]).cast(pa.binary())
        first = 0 if start is None else pc.search_sorted(keys, pa.scalar(start, pa.binary())).as_py()
        last = len(keys) if end is None else pc.search_sorted(keys, pa.scalar(end, pa.binary())).as_py()
        return rows.slice(first, max(0, last - first))

    def lookup(self, keys: pa.RecordBatch) -> LookupResult:
        """The row of each key; see `StateTable.lookup`."""
        self._check_lookup(keys)
        if self._points is not None and keys.num_rows <= KEYS_MAX:
            rows = self._find(self._points, self._points.keys_of(keys))
            if rows is not None:
                return self._answer_rows(rows)
        probes = self._hashed(keys, self.spec.key)
        with self._view(ordered=True) as view:
            if not self.layout.reduces:
                return self._answer(*view.newest(probes))
            times = self.layout.times(probes)
            span = (None, None) if times is None or not len(times) else (int(times.min()), int(times.max()) + 1)
            states = view.merge_partitions(probes, *view.alive(span))
        return self._answer(states, self._places(states, probes))

    def find(self, keys: Sequence[Key]) -> list[Row | None] | None:
        """The row of each of a few keys; None when it takes a vectorised lookup, or a read, to find them."""
        self._host.check_usable()
        return None if self._points is None else self._find(self._points, keys)

    def _find(self, points: PointLookup, keys: Sequence[Key]) -> list[Row | None] | None:
        try:
            return points.find(self._moment(ordered=True), keys)
        except NotInMemoryError:
            return None

    def freeze(self, sequence: Any) -> None:
        """Swap the MemTable for an empty one; the store's lock is held."""
        pieces = self.memtable.take()
        if pieces:
            self.frozen = (*self.frozen, FrozenMemTable(self.spec.name, sequence, pieces, self._watermark))

    def flushed(self, low_mark: int, files: tuple[SSTableMeta, ...]) -> None:
        """A manifest holds everything up to ``low_mark``; the store's lock is held."""
        self.frozen = tuple(f for f in self.frozen if f.sequence > low_mark)
        self.early = tuple((s, meta) for s, meta in self.early if s > low_mark)
        self.files = files

    def flushed_early(self, sequence: int, meta: SSTableMeta | None) -> None:
        """A frozen MemTable is in a file that no manifest names yet; the store's lock is held."""
        self.frozen = tuple(f for f in self.frozen if f.sequence != sequence)
        if meta is not None:
            self.early = (*self.early, (sequence, meta))

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows that are in no file yet."""
        return self.memtable.nbytes + sum(f.nbytes for f in self.frozen)

    @contextmanager
    def _view(self, *, ordered: bool = False) -> Iterator[TableView]:
        """Everything at this moment; its files stay where they are until the end of the block."""
        with ExitStack() as stack:
            yield self._moment(ordered=ordered, reading=stack)

    def _moment(self, *, ordered: bool, reading: ExitStack | None = None) -> TableView:
        """Everything at this moment; ``ordered``: to look up keys; ``reading``: until its end files are read.

        Pieces are merged without the lock, so that writes and barriers do not wait.
        """
        in_order = ordered or self.spec.kind is TableKind.UPSERT
        if in_order:
            self._sort_memtable()
        with self._host.lock:
            frozen, watermark, fold = self.frozen, self._watermark, self.memtable.begin_fold()
            files = (*self.files, *(meta for _, meta in self.early)) if self.early else self.files
            if reading is not None and files:
                reading.enter_context(self._store.reader.using(files))
        pieces = fold.sorted() if in_order else fold.pieces  # here, what was written since
        if frozen:
            older = (p for f in frozen for p in (f.sorted_pieces(self.layout) if ordered else f.pieces))
            pieces = (*older, *pieces)
        return TableView(self.layout, self._store, files, pieces, watermark)
