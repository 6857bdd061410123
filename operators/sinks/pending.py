"""Rows that a sink has taken and not yet handed on, kept in an append table of the state.

Each kept batch has an ordinal of its own, the table's key and time. Handing rows on is one
``expire``: rows that came and went between two barriers are never written to a file at all. The
batches are also held in memory, so nothing but `open` ever reads the table.

The table, ``<operator id>.pending``: column ``ordinal`` (int64) and the sink's columns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from statebackend import StateBackend, TableKind, TableOrder, TableSpec

__all__ = ["PendingBatch", "PendingRows"]


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """The rows of one ordinal, with the sink's columns."""

    ordinal: int
    batch: pa.RecordBatch


class PendingRows:
    """The append table of one sink, mirrored in memory."""

    def __init__(self, backend: StateBackend, operator_id: str, schema: pa.Schema) -> None:
        self._schema = schema.remove_metadata()
        ordinal = "ordinal"
        while ordinal in self._schema.names:
            ordinal += "_"
        table_schema = pa.schema([pa.field(ordinal, pa.int64(), nullable=False), *self._schema])
        self._table = backend.table(
            TableSpec(
                name=f"{operator_id}.pending",
                schema=table_schema,
                key=(ordinal,),
                kind=TableKind.APPEND,
                order=TableOrder.TIME,
                time_field=ordinal,
            )
        )
        self.batches = self._restore()
        # Ordinals never go below the table's watermark: such rows would be dead when written.
        last = self.batches[-1].ordinal if self.batches else -1
        self.next_ordinal = max(last + 1, self._table.watermark or 0)
        self.rows = sum(p.batch.num_rows for p in self.batches)
        self.bytes: int = sum(p.batch.nbytes for p in self.batches)

    def append(self, batch: pa.RecordBatch) -> int:
        """Keep a batch with at least one row; returns its ordinal."""
        ordinal = self.next_ordinal
        column = pa.array(np.full(batch.num_rows, ordinal, dtype=np.int64))
        self._table.write(pa.RecordBatch.from_arrays([column, *batch.columns], schema=self._table.spec.schema))
        self.batches.append(PendingBatch(ordinal, batch))
        self.rows += batch.num_rows
        self.bytes += batch.nbytes
        self.next_ordinal += 1
        return ordinal

    def drop(self, before: int) -> None:
        """Let go of the batches with an ordinal below ``before``."""
        kept = [p for p in self.batches if p.ordinal >= before]
        if len(kept) != len(self.batches):
            self._table.expire(before)
            self.batches = kept
            self.rows = sum(p.batch.num_rows for p in kept)
            self.bytes = sum(p.batch.nbytes for p in kept)

    def _restore(self) -> list[PendingBatch]:
        """The batches as they were appended, whatever pieces the table returns."""
        batches = self._table.scan()
        if not batches:
            return []
        table = pa.Table.from_batches(batches).combine_chunks()
        ordinals = table.column(0).to_numpy()
        starts = np.concatenate(([0], np.flatnonzero(np.diff(ordinals)) + 1, [len(ordinals)])).tolist()
        parts = (table.slice(start, end - start) for start, end in itertools.pairwise(starts))
        return [PendingBatch(p.column(0)[0].as_py(), self._without_ordinal(p)) for p in parts]

    def _without_ordinal(self, rows: pa.Table) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([pa.concat_arrays(c.chunks) for c in rows.columns[1:]], schema=self._schema)
