"""Point lookups in sorted pieces: vectorised bisection on the order columns, typed verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from statebackend.keys import rows_equal
from statebackend.merge import TableLayout
from statebackend.tables import TableOrder

__all__ = ["probe"]

Positions = npt.NDArray[np.intp]


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
