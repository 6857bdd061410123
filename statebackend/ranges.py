"""Merging sorted pieces of a table range by range: what only one piece holds is handed on as it lies.

The pieces are cut at the same values of the first order column, so that rows of equal keys come into the same
range. A range in which no two pieces overlap, as everywhere in a table that one run holds, costs no sort and no
copy; the others are merged by themselves, which stays in the caches of the processor.

Invariants:

* The result is what `TableLayout.merge` makes of all pieces at once, in the same order.
* Aggregate tables are not for this: even one piece may hold several states of a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from statebackend.merge import TOMBSTONE_COLUMN, TableLayout
from statebackend.tables import TableKind

__all__ = ["ROWS_MIN", "live_rows"]

ROWS_MIN = 8_192
"""Of a range, about: fewer are not worth a merge of their own."""


def live_rows(layout: TableLayout, pieces: Sequence[pa.RecordBatch], watermark: int | None) -> list[pa.RecordBatch]:
    """The live rows of a table in its order.

    ``pieces``: stored rows, each piece in physical order and without two rows of one key in an upsert table, from
    oldest to newest. Not for aggregate tables.
    """
    pieces = [p for p in pieces if p.num_rows]
    if sum(p.num_rows for p in pieces) < ROWS_MIN:
        return [layout.merge(pieces, watermark=watermark, drop_tombstones=True)]
    live: list[pa.RecordBatch] = []
    for part in _ranges(layout, pieces):
        if _apart(layout, part):
            live += [_visible(layout, piece, watermark) for piece in part]
        else:
            live.append(layout.merge(part, watermark=watermark, drop_tombstones=True))
    return [rows for rows in live if rows.num_rows]


def _ranges(layout: TableLayout, pieces: Sequence[pa.RecordBatch]) -> list[list[pa.RecordBatch]]:
    """The pieces of each range, from oldest to newest; ranges ascend."""
    columns = [_first_column(layout, p) for p in pieces]
    cuts = _cuts(columns)
    parts: list[list[pa.RecordBatch]] = [[] for _ in range(len(cuts) + 1)]
    for piece, column in zip(pieces, columns, strict=True):
        ends = np.append(np.searchsorted(column, cuts), len(column))
        begins = np.append(0, ends[:-1])
        for at in np.flatnonzero(begins < ends).tolist():
            begin, end = int(begins[at]), int(ends[at])
            parts[at].append(piece if end - begin == len(column) else piece.slice(begin, end - begin))
    return [part for part in parts if part]


def _cuts(columns: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    """Where pieces begin, unless that makes ranges of too few rows."""
    begins = np.array([c[0] for c in columns])
    order = np.argsort(begins, kind="stable")
    cuts, rows = [], 0
    for at in order.tolist():
        if rows >= ROWS_MIN:
            cuts.append(begins[at])
            rows = 0
        rows += len(columns[at])
    return np.unique(np.array(cuts, dtype=begins.dtype))


def _apart(layout: TableLayout, part: list[pa.RecordBatch]) -> bool:
    """Sorts the pieces of a range in place, if no two of them overlap; tells whether that is so."""
    if len(part) == 1:
        return True
    bounds = sorted(((c := _first_column(layout, p))[0], c[-1], at) for at, p in enumerate(part))
    if any(before[1] >= after[0] for before, after in pairwise(bounds)):
        return False
    part[:] = [part[at] for _, _, at in bounds]
    return True


def _visible(layout: TableLayout, piece: pa.RecordBatch, watermark: int | None) -> pa.RecordBatch:
    """The rows of a piece that nothing hides but their own deletion or age; the piece itself when that is all."""
    piece = layout.alive(piece, watermark, None)
    if layout.spec.kind is not TableKind.UPSERT or not piece.num_rows:
        return piece
    ages = watermark is not None and layout.spec.expiry_field is not None
    if not ages and not piece.column(TOMBSTONE_COLUMN).true_count:
        return piece
    hidden = layout.hidden(piece, watermark)
    return piece.filter(pa.array(~hidden)) if hidden.any() else piece


def _first_column(layout: TableLayout, piece: pa.RecordBatch) -> npt.NDArray[np.generic]:
    return layout.order_columns(piece)[0]
