"""One table of an open store: writes go to its MemTable, reads see every piece at one moment.

A read takes, under the store's lock, the pieces of the MemTable, the frozen MemTables and the list
of files; all are immutable, so the rest needs no lock. Files are read on the store's runtime.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from statebackend.backend import LookupResult, Matches
from statebackend.buffered_table import BufferedTable, BufferHost
from statebackend.cache import BlockReader, BlockSelector
from statebackend.compaction import KeyRange, plan_ranges
from statebackend.memtable import FrozenMemTable, Piece
from statebackend.merge import HASH_COLUMN, HashRange, TableLayout, concat, key_prefixes
from statebackend.probe import candidates, probe
from statebackend.sstable import SSTableIndex, SSTableMeta
from statebackend.tables import TableOrder, TableSpec

__all__ = ["LsmTable", "TableHost"]

T = TypeVar("T")

_SCAN_ROWS = 1 << 17
"""Rows that a scan in key order merges at once."""


class TableHost(BufferHost, Protocol):
    """What a table needs of the store that it belongs to."""

    reader: BlockReader

    def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a read on the store's runtime and wait for it."""


@dataclass(frozen=True, slots=True)
class _View:
    """Everything of one table at one moment, from oldest to newest."""

    files: tuple[SSTableMeta, ...]
    pieces: tuple[Piece, ...]
    watermark: int | None


class LsmTable(BufferedTable):
    """A `StateTable` of the LSM store."""

    def __init__(self, host: TableHost, layout: TableLayout, files: tuple[SSTableMeta, ...], watermark: int | None):
        super().__init__(host, layout, watermark)
        self._store = host
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
            start, end = self._alive(view, time_range)
            files = [f for f in view.files if f.overlaps(start, end, hash_range)]
            batches = self._read_blocks(files, lambda index: index.overlapping(start, end, hash_range))
        batches += [p.to_stored(self.layout) if merged else p.batch for p in view.pieces]
        batches = [self.layout.within(self.layout.alive(b, start, end), hash_range) for b in batches]
        if merged:
            batches = [self.layout.merge(batches, watermark=view.watermark, drop_tombstones=True)]
        return [self.layout.to_user(b, columns) for b in batches if b.num_rows]

    def matches(self, keys: pa.RecordBatch, time_range: tuple[int | None, int | None] = (None, None)) -> Matches:
        """All live rows of the given partition keys; see `StateTable.matches`."""
        probes = self._partition_probes(keys, time_range)
        with self._view(ordered=True) as view:
            start, end = self._alive(view, time_range)
            rows = self._merge_candidates(probes, view, start, end)
        return self._matches(rows, probes)

    def scan_keys(self, start: bytes | None = None, end: bytes | None = None) -> Iterator[pa.RecordBatch]:
        """Live rows with ``start <= key < end`` in the order of the key, a bounded piece at a time.

        For tables of order ``key``. All pieces show the same moment: that of the first one.
        """
        self._host.check_usable()
        if self.spec.order is not TableOrder.KEY:
            raise ValueError(f"table {self.spec.name!r}: order {self.spec.order.value!r} has no key ranges")
        with self._view() as view:
            memory = self.layout.merge([p.to_stored(self.layout) for p in view.pieces])
            indexes = self._store.read(lambda: self._indexes(view.files))
            for keys in plan_ranges(self.spec, indexes, _SCAN_ROWS):
                if self._outside(keys, start, end):
                    continue
                pieces = self._read_blocks(view.files, partial(_in_range, self.spec, keys))
                ranges = [p[keys.select(self.layout.order_columns(p))] for p in (*pieces, memory)]
                rows = self.layout.merge(ranges, watermark=view.watermark, drop_tombstones=True)
                rows = self._between(rows, start, end)
                if rows.num_rows:
                    yield self.layout.to_user(rows, None)

    async def _indexes(self, files: Sequence[SSTableMeta]) -> list[SSTableIndex]:
        return [await self._store.reader.index(meta) for meta in files]

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
        probes = self._probes(keys)
        with self._view(ordered=True) as view:
            if self.layout.merger is not None:
                return self._lookup_states(probes, view)
            return self._lookup_newest(probes, view)

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
    def _view(self, *, ordered: bool = False) -> Iterator[_View]:
        """Everything at this moment; its files stay where they are until the end of the block.

        ``ordered``: the pieces are sorted.
        """
        with ExitStack() as stack:
            with self._host.lock:
                frozen, watermark = self.frozen, self._watermark
                recent = self.memtable.sorted_pieces() if ordered else self.memtable.pieces()
                files = (*self.files, *(meta for _, meta in self.early))
                if files:
                    stack.enter_context(self._store.reader.using(files))
            older = [p for f in frozen for p in (f.sorted_pieces(self.layout) if ordered else f.pieces)]
            yield _View(files, (*older, *recent), watermark)

    def _read_blocks(self, files: Sequence[SSTableMeta], select: BlockSelector) -> list[pa.RecordBatch]:
        """The selected blocks of every file, oldest first; on the runtime only if some are not in memory."""
        if not files:
            return []
        reader = self._store.reader
        found = [reader.cached(meta, select) for meta in files]
        absent = [meta for meta, blocks in zip(files, found, strict=True) if blocks is None]
        if absent:
            read = iter(self._store.read(lambda: _gather(reader.read(self.layout, meta, select) for meta in absent)))
            found = [next(read) if blocks is None else blocks for blocks in found]
        return [block for blocks in found for block in blocks or ()]

    def _merge_candidates(
        self, probes: pa.RecordBatch, view: _View, start: int | None, end: int | None
    ) -> pa.RecordBatch:
        """What all pieces together hold of the partition keys and times: only that is merged."""
        hashes = np.unique(probes.column(HASH_COLUMN).to_numpy())
        if not len(hashes):
            return concat([], self.layout.stored)
        span = (int(hashes[0]), int(hashes[-1]) + 1)
        files = [f for f in view.files if f.overlaps(start, end, span)]
        pieces = self._read_blocks(files, lambda index: index.holding(hashes, start, end))
        pieces += [p.to_stored(self.layout) for p in view.pieces]
        met = [candidates(self.layout, p, hashes, start, end) for p in pieces]
        return self.layout.merge(met, watermark=view.watermark, drop_tombstones=True)

    def _alive(self, view: _View, time_range: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
        """The part of the range that is not below the watermark, unless rows below it hide others."""
        start, end = time_range
        if self.spec.expires_by_row and view.watermark is not None and (start is None or start < view.watermark):
            start = view.watermark
        return start, end

    def _files_newest_first(
        self, probes: pa.RecordBatch, view: _View
    ) -> list[Callable[[npt.NDArray[np.intp]], pa.RecordBatch]]:
        """For every file that may hold a key, newest first: read what may hold the given rows of ``probes``."""
        hashes, times = probes.column(HASH_COLUMN).to_numpy(), self.layout.times(probes)

        def reader_of(meta: SSTableMeta) -> Callable[[npt.NDArray[np.intp]], pa.RecordBatch]:
            def read(rows: npt.NDArray[np.intp]) -> pa.RecordBatch:
                wanted = np.sort(hashes[rows])
                start, end = (None, None) if times is None else (int(times[rows].min()), int(times[rows].max()) + 1)
                return concat(self._read_blocks([meta], lambda i: i.holding(wanted, start, end)), self.layout.stored)

            return read

        return [reader_of(meta) for meta in reversed(view.files)]

    def _lookup_newest(self, probes: pa.RecordBatch, view: _View) -> LookupResult:
        missing = np.arange(probes.num_rows)
        if view.watermark is not None and (times := self.layout.times(probes)) is not None:
            missing = missing[times >= view.watermark]
        pieces: list[pa.RecordBatch] = []
        place = np.full(probes.num_rows, -1, dtype=np.int64)
        rows_before = 0
        memory = [p.to_stored(self.layout) for p in reversed(view.pieces)]
        sources = [*(lambda _, m=m: m for m in memory), *self._files_newest_first(probes, view)]
        for source in sources:
            if not len(missing):
                break
            piece = source(missing)
            found = probe(self.layout, piece, probes, missing)
            hit = found >= 0
            if hit.any():
                pieces.append(piece.take(pa.array(found[hit])))
                place[missing[hit]] = rows_before + np.arange(int(hit.sum()))
                rows_before += int(hit.sum())
                missing = missing[~hit]
        rows = concat(pieces, self.layout.stored)
        dead = self.layout.hidden(rows, view.watermark)
        if dead.any():
            place[(place >= 0) & dead[np.maximum(place, 0)]] = -1
        return self._answer(rows, place)

    def _lookup_states(self, probes: pa.RecordBatch, view: _View) -> LookupResult:
        times = self.layout.times(probes)
        span = (None, None) if times is None or not len(times) else (int(times.min()), int(times.max()) + 1)
        rows = self._merge_candidates(probes, view, *self._alive(view, span))
        return self._answer(rows, probe(self.layout, rows, probes, np.arange(probes.num_rows)))


def _in_range(spec: TableSpec, keys: KeyRange, index: SSTableIndex) -> list[int]:
    return index.overlapping_keys(spec, keys.low, keys.high, None)


async def _gather(reads: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all reads, which run together; every one has ended before the first failure is raised."""
    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[T]", outcomes)
