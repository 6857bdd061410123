"""Recent writes of one table, in memory.

A MemTable is a list of pieces, oldest first; a write appends one. An aggregate table folds its
pieces into one whenever the rows that came since the last fold outnumber what that fold left, so
that merging costs a constant share of the writes. A table that is asked for keys (an upsert table at every
read) sorts its pieces and keeps their sizes geometric. Freezing hands the list over without touching a row.

A fold takes time, so it is done without the store's lock: pieces never change, and the result takes their place only
if they are still there (`Fold`). Neither a write nor a barrier waits for one.

Pieces are canonical; the hash of the stored form is made when a read or a flush needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from statebackend.ids import SequenceNumber
from statebackend.keys import canonicalise
from statebackend.merge import TableLayout
from statebackend.probe import SortedRows
from statebackend.tables import TableKind

__all__ = ["Fold", "FrozenMemTable", "MemTable", "Piece", "null_row_batch"]

FOLD_ROWS_MIN = 1 << 20
"""Below this many rows an aggregate table is never folded early: a fold has a fixed cost."""

SMALL_PIECE_ROWS = 1 << 11
"""So many rows are merged again for little more than the fixed cost of a merge; another piece costs every read."""

APPEND_PIECES = 8
"""Pieces of an append table that are merged in one go. Merging takes nothing away there and copies whole rows, which
costs more than to bisect a few pieces more."""


@dataclass(slots=True)
class Piece:
    """One batch; ``rows`` when it is in physical order and without duplicates. Stored form on demand."""

    batch: pa.RecordBatch
    time_max: int | None
    stored: pa.RecordBatch | None = None
    tombstone: bool = False
    rows: SortedRows | None = None

    def to_stored(self, layout: TableLayout) -> pa.RecordBatch:
        """The stored form; partial states go without a hash, since merging makes new rows."""
        if layout.reduces:
            return self.batch
        if self.stored is None:
            self.stored = layout.to_stored(self.batch, tombstone=self.tombstone)
        return self.stored

    def upgraded(self, layout: TableLayout, version: int) -> Piece:
        """The piece, of rows of a version of the schema, as one of rows of the newest."""
        stored = None if self.stored is None else layout.upgraded(self.stored, version)
        batch = layout.upgraded(self.batch, version) if stored is None or self.batch is not self.stored else stored
        rows = None if self.rows is None else SortedRows.of(layout, layout.upgraded(self.rows.batch, version))
        return Piece(batch, self.time_max, stored, self.tombstone, rows)


@dataclass(slots=True)
class FrozenMemTable:
    """What one table held at a barrier, on its way into an SSTable.

    ``watermark`` is the table's at the barrier; what lies below it is never written. The rows never
    change; ``pieces`` give way to sorted ones when they are asked for keys.
    """

    table: str
    sequence: SequenceNumber
    pieces: tuple[Piece, ...]
    watermark: int | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(p.batch.nbytes for p in self.pieces)

    def stored(self, layout: TableLayout) -> list[pa.RecordBatch]:
        """The stored form of every piece, oldest first."""
        return [p.to_stored(layout) for p in self.pieces]

    def sorted_pieces(self, layout: TableLayout) -> tuple[Piece, ...]:
        """The pieces in physical order, few and free of duplicates, oldest first."""
        self.pieces = tuple(_sort_pieces(layout, self.pieces, self.watermark))
        return self.pieces


@dataclass(frozen=True, slots=True)
class Fold:
    """The pieces of a MemTable at one moment: merged without a lock, and put in their place by `MemTable.adopt`."""

    layout: TableLayout
    pieces: tuple[Piece, ...]
    watermark: int | None
    generation: int

    def sorted(self) -> tuple[Piece, ...]:
        """The pieces in physical order, few and free of duplicates, oldest first."""
        if not self.pieces or self.pieces[-1].rows is not None:
            return self.pieces
        return tuple(_sort_pieces(self.layout, self.pieces, self.watermark))

    def reduced(self) -> tuple[Piece, ...]:
        """One row of states per key, of an aggregate table; in no order."""
        layout = self.layout
        assert layout.merger is not None
        reduced = layout.merger.reduce([p.batch.select(layout.spec.schema.names) for p in self.pieces])
        return tuple(Piece(batch, layout.time_max(batch)) for batch in reduced if batch.num_rows)


class MemTable:
    """Mutable list of pieces; the store's lock guards every call."""

    def __init__(self, layout: TableLayout) -> None:
        self._layout = layout
        self._pieces: list[Piece] = []
        self._nbytes = 0
        self._rows_unfolded = 0
        self._rows_folded = 0
        self._watermark: int | None = None
        self._generation = 0  # changes with the pieces, unless some are appended

    @property
    def rows(self) -> int:
        """Rows held, superseded ones included."""
        return self._rows_unfolded + self._rows_folded

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    @property
    def is_sorted(self) -> bool:
        """Whether all pieces are in physical order."""
        return not self._pieces or self._pieces[-1].rows is not None

    @property
    def is_crowded(self) -> bool:
        """Whether partial states have gathered that should be reduced."""
        aggregate = self._layout.spec.kind is TableKind.AGGREGATE
        return aggregate and self._rows_unfolded > max(FOLD_ROWS_MIN, self._rows_folded)

    def append(self, batch: pa.RecordBatch, *, tombstone: bool = False) -> None:
        """Add one batch of the table's columns (for a deletion: keys filled, the others null)."""
        if not batch.num_rows:
            return
        batch = canonicalise(batch, self._layout.spec.key)
        self._pieces.append(Piece(batch, self._layout.time_max(batch), tombstone=tombstone))
        self._nbytes += batch.nbytes
        self._rows_unfolded += batch.num_rows

    def expire(self, watermark: int) -> None:
        """Let go of the pieces that lie wholly below the watermark; the rows of others go when they are merged."""
        self._watermark = watermark
        kept = [p for p in self._pieces if p.time_max is None or p.time_max >= watermark]
        if len(kept) != len(self._pieces):
            self._replace(kept, folded=0)

    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, oldest first."""
        return tuple(self._pieces)

    def begin_fold(self) -> Fold:
        """What is to be merged."""
        return Fold(self._layout, tuple(self._pieces), self._watermark, self._generation)

    def adopt(self, fold: Fold, pieces: Sequence[Piece]) -> None:
        """Replace the pieces of ``fold`` by what they were merged to, unless they are not here any more."""
        if fold.generation == self._generation:
            self._replace([*pieces, *self._pieces[len(fold.pieces) :]], folded=len(pieces))

    def restore(self, pieces: tuple[Piece, ...]) -> None:
        """Begin with these pieces; the MemTable is empty."""
        self._replace(list(pieces), folded=0)

    def take(self) -> tuple[Piece, ...]:
        """Hand over all pieces and be empty again."""
        pieces = tuple(self._pieces)
        self._replace([], folded=0)
        return pieces

    def _replace(self, pieces: list[Piece], *, folded: int) -> None:
        """Have these pieces, the first ``folded`` of them merged."""
        self._pieces = pieces
        self._generation += 1
        self._nbytes = sum(p.batch.nbytes for p in pieces)
        self._rows_folded = sum(p.batch.num_rows for p in pieces[:folded])
        self._rows_unfolded = sum(p.batch.num_rows for p in pieces[folded:])


def _sort_pieces(layout: TableLayout, pieces: Sequence[Piece], watermark: int | None) -> list[Piece]:
    """Merge what is not sorted yet, and the sorted pieces before it that are no larger than what they are merged with.

    Unsorted pieces are the newest. Sizes stay geometric, so n rows are in O(log n) pieces and each is
    merged O(log n) times, however often this is called. Pieces of an append table wait until there are several.
    """
    ordered = [p for p in pieces if p.rows is not None]
    fresh = [p for p in pieces if p.rows is None]
    if not fresh:
        return ordered
    rows = sum(p.batch.num_rows for p in fresh)
    fewest = APPEND_PIECES - 1 if layout.spec.kind is TableKind.APPEND else 1
    while ordered:
        count = _trailing(ordered, max(2 * rows, SMALL_PIECE_ROWS))
        if count < fewest:
            count = _trailing(ordered, SMALL_PIECE_ROWS)
        if not count:
            break
        fresh[:0] = ordered[-count:]
        del ordered[-count:]
        rows = sum(p.batch.num_rows for p in fresh)
    return [*ordered, _merged(layout, fresh, watermark)]


def _trailing(pieces: Sequence[Piece], rows_max: int) -> int:
    """How many of the last pieces have at most so many rows."""
    return next((n for n, piece in enumerate(reversed(pieces)) if piece.batch.num_rows > rows_max), len(pieces))


def _merged(layout: TableLayout, pieces: Sequence[Piece], watermark: int | None) -> Piece:
    merged = layout.merge([p.to_stored(layout) for p in pieces], watermark=watermark)
    return Piece(merged, layout.time_max(merged), merged, rows=SortedRows.of(layout, merged))


def null_row_batch(schema: pa.Schema, keys: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of ``schema`` with the given key columns and nulls elsewhere: a deletion."""
    arrays = [keys.column(f.name) if f.name in keys.schema.names else pa.nulls(keys.num_rows, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([f.with_nullable(True) for f in schema]))
