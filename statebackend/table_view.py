"""Everything of one table at one moment, and the reads of it: what memory and files together hold.

The view is immutable. Files are read through the cache; only what is not in memory is read on the store's runtime,
all of it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from statebackend.cache import BlockReader, BlockSelector, OpenFile
from statebackend.keys import distinct
from statebackend.memtable import Piece
from statebackend.merge import HASH_COLUMN, TableLayout, concat
from statebackend.probe import Found, Probes, SortedRows, candidates, find, plan_blocks
from statebackend.sstable import SSTableMeta
from statebackend.sstable_index import SSTableIndex
from statebackend.tables import TableOrder

__all__ = ["FileHost", "TableView", "gather"]

T = TypeVar("T")
Positions = npt.NDArray[np.intp]
Hashes = npt.NDArray[np.uint64]


class FileHost(Protocol):
    """Who reads files for a table."""

    @property
    def reader(self) -> BlockReader:
        """Through which files are read."""

    def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a read on the store's runtime and wait for it."""


@dataclass(frozen=True, slots=True)
class TableView:
    """``files`` and ``pieces`` in memory from oldest to newest; all in memory is newer than all files."""

    layout: TableLayout
    host: FileHost
    files: tuple[SSTableMeta, ...]
    pieces: tuple[Piece, ...]
    watermark: int | None

    @property
    def memory(self) -> list[SortedRows]:
        """The pieces, of a view that was made to look up keys: sorted."""
        return [p.rows for p in self.pieces if p.rows is not None]

    @property
    def reader(self) -> BlockReader:
        """The reads that the files go through."""
        return self.host.reader

    def alive(self, time_range: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
        """The part of a time range that is not below the watermark, unless rows below it hide others."""
        start, end = time_range
        if self.layout.spec.expires_by_row and self.watermark is not None and (start is None or start < self.watermark):
            start = self.watermark
        return start, end

    def blocks(self, files: Sequence[SSTableMeta], select: BlockSelector) -> list[SortedRows]:
        """The selected blocks of every file, in their order."""
        if not files:
            return []
        reader = self.reader
        found = [reader.blocks_now(meta, select) for meta in files]
        absent = [meta for meta, blocks in zip(files, found, strict=True) if blocks is None]
        if absent:
            layout = self.layout
            read = iter(self.host.read(lambda: gather(reader.blocks(layout, meta, select) for meta in absent)))
            found = [next(read) if blocks is None else blocks for blocks in found]
        return [block for blocks in found for block in blocks or ()]

    def merge_partitions(self, probes: pa.RecordBatch, start: int | None, end: int | None) -> pa.RecordBatch:
        """What all pieces together hold of some partition keys and times: only that is merged.

        ``probes``: key columns with ``__hash``. Rows whose hash is that of a key come along.
        """
        hashes = distinct(probes.column(HASH_COLUMN).to_numpy())
        if not len(hashes):
            return concat([], self.layout.stored)
        files = self._files(hashes, start, end)
        wanted = {f.meta.name: hashes if f.filter is None else hashes[f.filter.may_hold(hashes)] for f in files}
        merged = []
        # In order `time` every block has all hashes, so that fewer of them would not need fewer blocks.
        whole = not files or self.layout.spec.order is TableOrder.TIME
        for some in [hashes] if whole else _slices(hashes, files, wanted, (start, end), self.reader.held_bytes):
            asked = {name: _within(found, some) for name, found in wanted.items()}
            pieces = self.blocks([f.meta for f in files], partial(_holding, asked, start, end))
            met = [candidates(self.layout, rows, some, start, end) for rows in (*pieces, *self.memory)]
            merged.append(self.layout.merge(met, watermark=self.watermark, drop_tombstones=True))
        return concat(merged, self.layout.stored)

    def newest(self, keys: pa.RecordBatch) -> tuple[pa.RecordBatch, npt.NDArray[np.int64]]:
        """The newest row of each key of an upsert table, and for every key its place among these rows, or -1.

        ``keys``: key columns with ``__hash``. Every piece is searched for what the newer ones do not hold.
        """
        probes = Probes.of(self.layout, keys)
        missing = np.arange(keys.num_rows)
        times = self.layout.times(probes.batch)
        if times is not None and self.watermark is not None:
            missing = missing[times >= self.watermark]
        place = np.full(keys.num_rows, -1, dtype=np.int64)
        payloads: list[pa.RecordBatch] = []
        rows_before = 0
        for found in self._newest_first(probes, missing):
            hidden = found.dead | self.layout.expired(found.payload, self.watermark)
            place[probes.rows[found.at]] = np.where(hidden, -1, rows_before + np.arange(len(found.at)))
            payloads.append(found.payload)
            rows_before += found.payload.num_rows
        return concat(payloads, self.layout.answer), place

    def _newest_first(self, probes: Probes, missing: Positions) -> Iterable[Found]:
        """What each piece adds, from newest to oldest; ends when nothing is missing."""
        for rows in reversed(self.memory):
            if not len(missing):
                return
            found = find(self.layout, [(rows, missing)], probes)
            if len(found.at):
                missing = _without(missing, found.at)
                yield found
        if not len(missing):
            return
        known = self.layout.filter_hashes(probes.batch)
        times = self.layout.times(probes.batch)
        start, end = (None, None) if times is None else (int(times.min()), int(times.max()) + 1)
        for file in reversed(self._files(probes.batch.column(HASH_COLUMN).to_numpy(), start, end)):
            for found in self._find_in_file(file, probes, missing, known):
                if len(found.at):
                    missing = _without(missing, found.at)
                    yield found
            if not len(missing):
                return

    def _find_in_file(
        self, file: OpenFile, probes: Probes, missing: Positions, known: npt.NDArray[np.uint64] | None
    ) -> Iterator[Found]:
        """What the file holds of the missing keys, some of its blocks at a time."""
        if file.filter is not None and known is not None:
            missing = missing[file.filter.may_hold(known[missing])]
        plan = plan_blocks(self.layout, file.index, probes, missing)
        sizes = file.index.entries["memory"][[number for number, _ in plan]]
        for part in np.split(np.arange(len(plan)), _cuts(sizes, self.reader.held_bytes)):
            numbers = [plan[i][0] for i in part]
            blocks = self.blocks([file.meta], partial(_these, numbers))
            yield find(self.layout, zip(blocks, (plan[i][1] for i in part), strict=True), probes)

    def _files(self, hashes: npt.NDArray[np.uint64], start: int | None, end: int | None) -> list[OpenFile]:
        """The files that may hold some of these hashes and times, oldest first."""
        if not self.files:
            return []
        reader = self.reader
        span = (int(hashes.min()), int(hashes.max()) + 1)
        files = [meta for meta in self.files if meta.overlaps(start, end, span)]
        found = [reader.open_now(meta) for meta in files]
        absent = [meta for meta, file in zip(files, found, strict=True) if file is None]
        read = iter(self.host.read(lambda: gather(reader.open(meta) for meta in absent)) if absent else ())
        return [next(read) if file is None else file for file in found]


def _these(numbers: list[int], _: SSTableMeta, __: SSTableIndex) -> list[int]:
    return numbers


def _holding(
    hashes: Mapping[str, Hashes], start: int | None, end: int | None, meta: SSTableMeta, index: SSTableIndex
) -> list[int]:
    return index.holding(hashes[meta.name], start, end)


def _cuts(sizes: npt.NDArray[np.uint64], bytes_max: int) -> Positions:
    """Where to cut a list of blocks, so that each part takes about so many bytes in memory at most."""
    full = np.cumsum(sizes.astype(np.float64)) // bytes_max
    cuts: Positions = np.flatnonzero(full[1:] != full[:-1]) + 1
    return cuts


def _slices(
    hashes: Hashes,
    files: Sequence[OpenFile],
    wanted: Mapping[str, Hashes],
    times: tuple[int | None, int | None],
    bytes_max: int,
) -> list[Hashes]:
    """The sorted hashes, cut so that the blocks which one slice needs take about so many bytes (and one per file)."""
    numbers = [file.index.holding(wanted[file.meta.name], *times) for file in files]
    sizes = [file.index.entries["memory"][some] for file, some in zip(files, numbers, strict=True)]
    if sum(float(s.sum()) for s in sizes) <= bytes_max:
        return [hashes]
    first = np.concatenate([file.index.hash_min[some] for file, some in zip(files, numbers, strict=True)])
    order = np.argsort(first)
    cuts = first[order][_cuts(np.concatenate(sizes)[order], bytes_max)]
    return [part for part in np.split(hashes, np.searchsorted(hashes, cuts)) if len(part)]


def _within(hashes: Hashes, span: Hashes) -> Hashes:
    """The sorted hashes from the first to the last of some others."""
    return hashes[np.searchsorted(hashes, span[0]) : np.searchsorted(hashes, span[-1], side="right")]


def _without(sorted_: Positions, some: Positions) -> Positions:
    """The ascending numbers without some of them."""
    keep = np.ones(len(sorted_), dtype=np.bool_)
    keep[np.searchsorted(sorted_, some)] = False
    return sorted_[keep]


async def gather(reads: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all reads, which run together; every one has ended before the first failure is raised."""
    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[T]", outcomes)
