"""Lookups in sorted pieces: vectorised bisection on the order columns, typed verification.

A hash only finds candidates; `rows_equal` on the typed keys decides. Probes are sorted as the pieces are,
so that bisecting touches a piece in order, which is several times faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from statebackend.keys import rows_equal
from statebackend.merge import HASH_COLUMN, TOMBSTONE_COLUMN, TableLayout, concat, stable_order
from statebackend.sstable_index import SSTableIndex
from statebackend.tables import TableKind, TableOrder

__all__ = ["Found", "Probes", "Row", "SortedRows", "candidates", "find", "locate", "match_rows", "plan_blocks"]

Bools = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class SortedRows:
    """Stored rows in physical order, and what is bisected and gathered of them.

    ``columns``: the order columns; ``keys``: the key columns; ``payload``: the table's columns, declared
    nullable, since a missing key is a row of nulls; ``dead``: which rows are tombstones, None if none is.
    """

    batch: pa.RecordBatch
    columns: tuple[npt.NDArray[Any], ...]
    keys: tuple[pa.Array, ...]
    payload: pa.RecordBatch
    dead: Bools | None

    @classmethod
    def of(cls, layout: TableLayout, batch: pa.RecordBatch) -> SortedRows:
        """``batch``: stored rows in physical order."""
        dead = None
        if layout.spec.kind is TableKind.UPSERT:
            tombstones = batch.column(TOMBSTONE_COLUMN)
            dead = tombstones.to_numpy(zero_copy_only=False) if tombstones.true_count else None
        arrays = [batch.column(name) for name in layout.answer.names]
        payload = pa.RecordBatch.from_arrays(arrays, schema=layout.answer)
        return cls(batch, tuple(layout.order_columns(batch)), tuple(layout.key_arrays(batch)), payload, dead)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.batch.num_rows)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(self.batch.nbytes)


Row: TypeAlias = tuple[SortedRows, int]
"""One row of a piece, by its number."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Keys to look up, sorted as the rows of a table are. ``rows[i]`` is the number of key i among those given."""

    batch: pa.RecordBatch
    columns: tuple[npt.NDArray[Any], ...]
    keys: tuple[pa.Array, ...]
    rows: Positions

    @classmethod
    def of(cls, layout: TableLayout, batch: pa.RecordBatch) -> Probes:
        """``batch``: key columns in canonical form, with their hash."""
        columns = layout.order_columns(batch)
        rows = np.argsort(columns[0]) if len(columns) == 1 else stable_order(columns)
        batch = batch.take(pa.array(rows))
        return cls(batch, tuple(layout.order_columns(batch)), tuple(layout.key_arrays(batch)), rows)


@dataclass(frozen=True, slots=True)
class Found:
    """Rows that answer probes: row i of ``payload`` answers probe ``at[i]`` (each at most once); ``dead`` as there."""

    payload: pa.RecordBatch
    at: Positions
    dead: Bools


def find(layout: TableLayout, parts: Iterable[tuple[SortedRows, Positions]], probes: Probes) -> Found:
    """In every part, the rows of the given probes (ascending); a probe is in one part at most."""
    parts = [(rows, at) for rows, at in parts if rows.num_rows]
    if len(probes.columns) == 1 and layout.spec.order is not TableOrder.KEY:
        located = _locate_by_hash(parts, probes)
    else:
        located = _hits((rows, at, _locate(layout, rows, probes, at)) for rows, at in parts)
    found = _gather(layout, located)
    if not len(found.at) or layout.spec.order is TableOrder.KEY:
        return found
    asked = pa.array(found.at)
    same = rows_equal([found.payload.column(k) for k in layout.spec.key], [k.take(asked) for k in probes.keys])
    if same.all():
        return found
    # Other keys agree in every order column: go on from the candidates, row by row.
    return _gather(layout, _hits((rows, at, _locate_among_collisions(layout, rows, probes, at)) for rows, at in parts))


def locate(layout: TableLayout, rows: SortedRows, probes: Probes) -> Positions:
    """For each probe its row in one piece, or -1."""
    return _locate_among_collisions(layout, rows, probes, np.arange(len(probes.rows)))


def plan_blocks(layout: TableLayout, index: SSTableIndex, probes: Probes, at: Positions) -> list[tuple[int, Positions]]:
    """The blocks that may hold some of the given probes (ascending), and which."""
    hashes, times = (index.hash_min, index.hash_max), (index.time_min, index.time_max)
    by_time = layout.spec.order is TableOrder.TIME
    wanted = [column[at] for column in probes.columns]
    low, high = times if by_time else hashes
    first = np.searchsorted(wanted[0], low, side="left").tolist()
    last = np.searchsorted(wanted[0], high, side="right").tolist()
    plan = [(i, slice(a, b)) for i, (a, b) in enumerate(zip(first, last, strict=True)) if a < b]
    if len(wanted) == 1:
        return [(i, at[part]) for i, part in plan]
    low, high = hashes if by_time else times
    narrowed = []
    for i, part in plan:
        second = wanted[1][part]
        inside = (second >= low[i]) & (second <= high[i])
        if inside.any():
            narrowed.append((i, at[part][inside]))
    return narrowed


def candidates(
    layout: TableLayout, rows: SortedRows, hashes: npt.NDArray[np.uint64], start: int | None, end: int | None
) -> pa.RecordBatch:
    """The stored rows whose hash is one of ``hashes`` (sorted, distinct) and time in ``[start, end)``, in order."""
    found = _holding(layout, rows, hashes, start, end)
    return rows.batch if len(found) == rows.num_rows else rows.batch.take(pa.array(found))


def match_rows(layout: TableLayout, rows: pa.RecordBatch, probes: pa.RecordBatch) -> tuple[Positions, Positions]:
    """Every pair of a row and a probe that agree in the partition key: positions in ``rows`` and in ``probes``.

    ``rows``: stored rows in physical order. The pairs come by probe, time and order in ``rows``.
    """
    hashes, wanted = rows.column(HASH_COLUMN).to_numpy(), probes.column(HASH_COLUMN).to_numpy()
    by_hash = None
    if layout.spec.order is TableOrder.TIME:
        by_hash = np.argsort(hashes, kind="stable")  # within a hash, times stay in order
        hashes = hashes[by_hash]
    order = np.argsort(wanted, kind="stable")
    first, last = np.empty(len(wanted), dtype=np.intp), np.empty(len(wanted), dtype=np.intp)
    first[order] = np.searchsorted(hashes, wanted[order], side="left")
    last[order] = np.searchsorted(hashes, wanted[order], side="right")
    positions, asked = _expand(first, last), np.repeat(np.arange(len(wanted)), last - first)
    if by_hash is not None:
        positions = by_hash[positions]
    if not len(positions):
        return positions, asked
    here, there = pa.array(positions), pa.array(asked)
    keys = layout.partition_key
    same = rows_equal([rows.column(k).take(here) for k in keys], [probes.column(k).take(there) for k in keys])
    return (positions, asked) if same.all() else (positions[same], asked[same])


def _locate_by_hash(
    parts: Sequence[tuple[SortedRows, Positions]], probes: Probes
) -> list[tuple[SortedRows, Positions, Positions]]:
    """For the probes of every part that have an equal hash there: which they are and their first such row.

    A batch of keys meets hundreds of blocks, with a few keys in each: what can be done for all at once is.
    """
    if not parts:
        return []
    wanted = probes.columns[0]
    places, met = [], []
    for rows, at in parts:
        column = rows.columns[0]
        place = column.searchsorted(wanted[at])
        np.minimum(place, len(column) - 1, out=place)
        places.append(place)
        met.append(column[place])
    asked = np.concatenate([at for _, at in parts])
    hit = np.concatenate(met) == wanted[asked]
    if hit.all():
        return [(rows, at, place) for (rows, at), place in zip(parts, places, strict=True)]
    hits = np.split(hit, np.cumsum([len(at) for _, at in parts])[:-1])
    return [(rows, at[h], place[h]) for (rows, at), place, h in zip(parts, places, hits, strict=True)]


def _hits(
    parts: Iterable[tuple[SortedRows, Positions, Positions]],
) -> list[tuple[SortedRows, Positions, Positions]]:
    """Without the probes whose row is -1."""
    return [(rows, at[found >= 0], found[found >= 0]) for rows, at, found in parts]


def _gather(layout: TableLayout, parts: Iterable[tuple[SortedRows, Positions, Positions]]) -> Found:
    """The rows of every part that answer its probes."""
    parts = [part for part in parts if len(part[1])]
    if not parts:
        return Found(concat([], layout.answer), np.empty(0, dtype=np.intp), np.empty(0, dtype=np.bool_))
    payload = concat([rows.payload.take(pa.array(found)) for rows, _, found in parts], layout.answer)
    asked = np.concatenate([at for _, at, _ in parts])
    if all(rows.dead is None for rows, _, _ in parts):
        return Found(payload, asked, np.zeros(len(asked), dtype=np.bool_))
    dead = [np.zeros(len(at), dtype=np.bool_) if rows.dead is None else rows.dead[found] for rows, at, found in parts]
    return Found(payload, asked, np.concatenate(dead))


def _locate(layout: TableLayout, rows: SortedRows, probes: Probes, at: Positions) -> Positions:
    """For each probe the first row that agrees in every order column, or -1; in order ``key``, in the key itself."""
    if not rows.num_rows:
        return np.full(len(at), -1, dtype=np.intp)
    if layout.spec.order is TableOrder.KEY:
        return _locate_ordered(rows, probes, at)
    first, wanted = rows.columns[0], probes.columns[0][at]
    low = np.searchsorted(first, wanted)
    found = np.where(first[np.minimum(low, rows.num_rows - 1)] == wanted, low, -1)
    if len(rows.columns) == 1:
        return found
    open_ = np.flatnonzero(found >= 0)
    second, wanted_second = rows.columns[1], probes.columns[1][at[open_]]
    low, high = low[open_], np.searchsorted(first, wanted[open_], side="right")
    place = _bisect(second, low, high, wanted_second)
    hit = (place < high) & (second[np.minimum(place, rows.num_rows - 1)] == wanted_second)
    found[open_] = np.where(hit, place, -1)
    return found


def _locate_ordered(rows: SortedRows, probes: Probes, at: Positions) -> Positions:
    """The same for order ``key``: only keys whose first eight bytes are there are compared as a whole."""
    found = np.full(len(at), -1, dtype=np.intp)
    prefixes, wanted_prefixes = rows.columns[0], probes.columns[0][at]
    low = np.minimum(np.searchsorted(prefixes, wanted_prefixes), rows.num_rows - 1)
    open_ = np.flatnonzero(prefixes[low] == wanted_prefixes)
    if len(open_):
        wanted = probes.keys[0].take(pa.array(at[open_]))
        place = pc.search_sorted(rows.keys[0], wanted).to_numpy().astype(np.intp)
        clipped = np.minimum(place, rows.num_rows - 1)
        same = rows_equal([rows.keys[0].take(pa.array(clipped))], [wanted]) & (place < rows.num_rows)
        found[open_[same]] = place[same]
    return found


def _locate_among_collisions(layout: TableLayout, rows: SortedRows, probes: Probes, at: Positions) -> Positions:
    """`_locate` with the typed keys compared: of the rows that agree in every order column, the one of the key."""
    place = _locate(layout, rows, probes, at)
    found = np.full(len(at), -1, dtype=np.intp)
    active = np.flatnonzero(place >= 0)
    while len(active):
        here, there = pa.array(place[active]), pa.array(at[active])
        same = rows_equal([k.take(here) for k in rows.keys], [k.take(there) for k in probes.keys])
        found[active[same]] = place[active[same]]
        active = active[~same]
        place[active] += 1
        active = active[place[active] < rows.num_rows]
        for column, wanted in zip(rows.columns, probes.columns, strict=True):
            active = active[column[place[active]] == wanted[at[active]]]
    return found


def _bisect(column: npt.NDArray[Any], low: Positions, high: Positions, wanted: npt.NDArray[Any]) -> Positions:
    """First row of ``[low, high)`` that is not below the wanted value; the column is sorted within each range."""
    if len(low) and low[0] == low[-1] and high[0] == high[-1]:  # ranges ascend: all are the same one
        same: Positions = np.searchsorted(column[low[0] : high[0]], wanted) + low[0]
        return same
    low, high = low.copy(), high.copy()
    while (open_ := low < high).any():
        middle = (low + high) >> 1
        below = column[np.minimum(middle, len(column) - 1)] < wanted
        low = np.where(open_ & below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low


def _holding(
    layout: TableLayout, rows: SortedRows, hashes: npt.NDArray[np.uint64], start: int | None, end: int | None
) -> Positions:
    if not rows.num_rows or not len(hashes):
        return np.empty(0, dtype=np.intp)
    if layout.spec.order is TableOrder.TIME:
        times, column = rows.columns
        low = 0 if start is None else int(np.searchsorted(times, start))
        high = len(times) if end is None else int(np.searchsorted(times, end))
        at = np.minimum(np.searchsorted(hashes, column[low:high]), len(hashes) - 1)
        here: Positions = np.flatnonzero(hashes[at] == column[low:high]) + low
        return here
    column = rows.columns[0]
    wanted = hashes[np.searchsorted(hashes, column[0]) : np.searchsorted(hashes, column[-1], side="right")]
    first = np.searchsorted(column, wanted)  # none lies behind the last row
    hit = column[first] == wanted
    found = _expand(first[hit], np.searchsorted(column, wanted[hit], side="right"))
    if len(rows.columns) == 1 or (start is None and end is None):
        return found
    times = rows.columns[1][found]
    keep = np.ones(len(found), dtype=bool)
    if start is not None:
        keep &= times >= start
    if end is not None:
        keep &= times < end
    return found[keep]


def _expand(first: Positions, last: Positions) -> Positions:
    """The numbers of all ranges ``[first, last)``, one range after the other."""
    lengths = last - first
    ends = np.cumsum(lengths)
    if not len(ends) or int(ends[-1]) == len(first) == np.count_nonzero(lengths):
        return first
    ranges: Positions = np.arange(int(ends[-1])) + np.repeat(first - (ends - lengths), lengths)
    return ranges
