"""Lookups in sorted pieces: vectorised bisection on the order columns, typed verification.

A hash only finds candidates; `rows_equal` on the typed keys decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from statebackend.keys import rows_equal
from statebackend.merge import HASH_COLUMN, TableLayout
from statebackend.tables import TableOrder

__all__ = ["candidates", "match_rows", "probe"]

Positions = npt.NDArray[np.intp]


def candidates(
    layout: TableLayout, piece: pa.RecordBatch, hashes: npt.NDArray[np.uint64], start: int | None, end: int | None
) -> pa.RecordBatch:
    """The rows of a piece whose hash is one of ``hashes`` (sorted, distinct) and whose time is in ``[start, end)``.

    ``piece``: stored rows in physical order; the result is, too.
    """
    found = _holding(layout, piece, hashes, start, end)
    return piece if len(found) == piece.num_rows else piece.take(pa.array(found))


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


def probe(layout: TableLayout, piece: pa.RecordBatch, keys: pa.RecordBatch, rows: Positions) -> Positions:
    """For each of ``rows`` of ``keys``: its row in ``piece``, or -1.

    ``piece``: stored rows in physical order, one per key. ``keys``: stored key columns with hash.
    """
    if layout.spec.order is TableOrder.KEY:
        return _probe_ordered(layout, piece, keys, rows)
    columns, wanted = layout.order_columns(piece), [c[rows] for c in layout.order_columns(keys)]
    found = np.full(len(rows), -1, dtype=np.intp)
    at = _lower_bound(columns, wanted)
    active = np.arange(len(rows))
    piece_keys, key_arrays = layout.key_arrays(piece), [keys.column(k) for k in layout.spec.key]
    while len(active):
        # A candidate agrees in every order column; colliding keys lie next to each other.
        inside = at[active] < piece.num_rows
        active = active[inside]
        for column, want in zip(columns, wanted, strict=True):
            active = active[column[at[active]] == want[active]]
        if not len(active):
            break
        here, there = pa.array(at[active]), pa.array(rows[active])
        same = rows_equal([a.take(here) for a in piece_keys], [a.take(there) for a in key_arrays])
        found[active[same]] = at[active[same]]
        active = active[~same]
        at[active] += 1
    return found


def _probe_ordered(layout: TableLayout, piece: pa.RecordBatch, keys: pa.RecordBatch, rows: Positions) -> Positions:
    """The same for order ``key``, where the key itself is bisected."""
    name = layout.spec.key[0]
    wanted = keys.column(name).take(pa.array(rows))
    at = pc.search_sorted(piece.column(name), wanted).to_numpy().astype(np.intp)
    found = np.full(len(rows), -1, dtype=np.intp)
    inside = np.flatnonzero(at < piece.num_rows)
    same = rows_equal([piece.column(name).take(pa.array(at[inside]))], [wanted.take(pa.array(inside))])
    found[inside[same]] = at[inside[same]]
    return found


def _holding(
    layout: TableLayout, piece: pa.RecordBatch, hashes: npt.NDArray[np.uint64], start: int | None, end: int | None
) -> Positions:
    column, times = piece.column(HASH_COLUMN).to_numpy(), layout.times(piece)
    if not len(column) or not len(hashes):
        return np.empty(0, dtype=np.intp)
    if layout.spec.order is TableOrder.TIME and times is not None:
        low = 0 if start is None else int(np.searchsorted(times, start))
        high = len(times) if end is None else int(np.searchsorted(times, end))
        at = np.minimum(np.searchsorted(hashes, column[low:high]), len(hashes) - 1)
        here: Positions = np.flatnonzero(hashes[at] == column[low:high]) + low
        return here
    wanted = hashes[np.searchsorted(hashes, column[0]) : np.searchsorted(hashes, column[-1], side="right")]
    first = np.searchsorted(column, wanted)  # none lies behind the last row
    hit = column[first] == wanted
    first = first[hit]
    found = _expand(first, np.searchsorted(column, wanted[hit], side="right"))
    if times is None or (start is None and end is None):
        return found
    keep = np.ones(len(found), dtype=bool)
    if start is not None:
        keep &= times[found] >= start
    if end is not None:
        keep &= times[found] < end
    return found[keep]


def _expand(first: Positions, last: Positions) -> Positions:
    """The numbers of all ranges ``[first, last)``, one range after the other."""
    lengths = last - first
    ends = np.cumsum(lengths)
    if not len(ends) or int(ends[-1]) == len(first) == np.count_nonzero(lengths):
        return first
    ranges: Positions = np.arange(int(ends[-1])) + np.repeat(first - (ends - lengths), lengths)
    return ranges


def _lower_bound(columns: Sequence[npt.NDArray[Any]], wanted: Sequence[npt.NDArray[Any]]) -> Positions:
    """First row whose order columns are not below the wanted ones, for every probe."""
    if len(columns) == 1:
        # Sorted probes touch the piece in order, which is several times faster.
        order = np.argsort(wanted[0], kind="stable")
        at = np.empty(len(order), dtype=np.intp)
        at[order] = np.searchsorted(columns[0], wanted[0][order])
        return at
    low = np.zeros(len(wanted[0]), dtype=np.intp)
    high = np.full(len(wanted[0]), len(columns[0]), dtype=np.intp)
    while (open_ := low < high).any():
        middle = (low + high) >> 1
        clipped = np.minimum(middle, len(columns[0]) - 1)
        below = np.zeros(len(low), dtype=bool)
        equal = np.ones(len(low), dtype=bool)
        for column, want in zip(columns, wanted, strict=True):
            value = column[clipped]
            below |= equal & (value < want)
            equal &= value == want
        low = np.where(open_ & below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low
