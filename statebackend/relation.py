"""A relation that is computed piece by piece: as a dataset for DataFusion, as an Arrow stream for everybody else.

A `Relation` is a schema and a function that yields batches. DataFusion scans it as a Python subclass of
``pyarrow.dataset.Dataset``: it hands over the columns and the predicate of a scan and pulls one batch at a time.

Invariants:

* Pieces are made on the threads of a pool, never on DataFusion's, since finalising states runs DataFusion itself, which
  panics inside a callback of its own.
* While it waits for a piece, a scan holds a thread of DataFusion, of which there are as many as cores. A union holds
  several, so what makes a piece must need none of them, or nothing goes on any more. A relation that does need them
  (``inline`` is False) is written to a temporary file while the query is planned, and scanned from there (`spooled`).
* The predicate is applied to every batch, whatever was left out for its sake before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from statebackend import display

__all__ = ["Relation", "RelationDataset"]


@dataclass(frozen=True, slots=True)
class Relation:
    """Columns, and where the rows come from. Any reader of the Arrow C stream interface takes it.

    ``open``: given a predicate or None, yields batches of ``schema``; it may leave out rows that do not match.
    ``inline``: whether they are made without threads of DataFusion.
    """

    schema: pa.Schema
    open: Callable[[pc.Expression | None], Iterator[pa.RecordBatch]]
    inline: bool = True

    def batches(
        self, columns: Sequence[str] | None = None, predicate: pc.Expression | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows that match, in pieces of bounded size, with these columns; computed on the caller's thread."""
        schema = self.projected(columns)
        for batch in self.open(predicate):
            # Before the projection: the predicate may be about a column that nobody asked for.
            matching = batch if predicate is None else batch.filter(predicate)
            chosen = matching.select(schema.names)
            # Built anew under the promised schema, except of no columns: that would lose the number of rows.
            yield pa.RecordBatch.from_arrays(chosen.columns, schema=schema) if schema.names else chosen

    def projected(self, columns: Sequence[str] | None) -> pa.Schema:
        """The schema of some columns."""
        return self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])

    def reader(
        self, columns: Sequence[str] | None = None, predicate: pc.Expression | None = None
    ) -> pa.RecordBatchReader:
        """The rows as a stream, to be read once."""
        return pa.RecordBatchReader.from_batches(self.projected(columns), self.batches(columns, predicate))

    def spooled(self, path: Path) -> Relation:
        """All rows in a file that is written now, at ``path``, and read piece by piece."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
            for batch in self.batches():
                writer.write_batch(batch)

        def read(_: pc.Expression | None) -> Iterator[pa.RecordBatch]:
            with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as file:
                for number in range(file.num_record_batches):
                    yield file.get_batch(number)

        return Relation(self.schema, read)

    def _repr_html_(self) -> str:
        return display.relation(self)

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """All rows, by the Arrow C stream interface; every call begins anew."""
        return self.reader().__arrow_c_stream__(requested_schema)


class RelationDataset(ds.Dataset):  # type: ignore[misc]
    """A relation in the shape in which DataFusion takes a table from Python."""

    def __init__(self, relation: Relation, pool: Executor) -> None:
        self._relation = relation
        self._pool = pool

    @property
    def schema(self) -> pa.Schema:
        """The columns."""
        return self._relation.schema

    def scanner(self, columns: Sequence[str] | None = None, filter: Any = None, **_: Any) -> _Scanner:  # noqa: A002
        """A scan of some columns of the rows that match."""
        return _Scanner(self._relation, self._pool, columns, filter)

    def get_fragments(self, filter: Any = None) -> Iterator[_Fragment]:  # noqa: A002, ARG002
        """One fragment: ranges are read one after the other, so that memory is bounded."""
        return iter([_Fragment(self)])


class _Fragment:
    def __init__(self, dataset: RelationDataset) -> None:
        self._dataset = dataset

    def scanner(self, schema: Any = None, **options: Any) -> _Scanner:  # noqa: ARG002
        return self._dataset.scanner(**options)


class _Scanner:
    def __init__(self, relation: Relation, pool: Executor, columns: Sequence[str] | None, predicate: Any) -> None:
        self._relation = relation
        self._pool = pool
        self._columns = columns
        # DataFusion hands over a contradiction as a scalar.
        self._predicate = pc.scalar(predicate) if isinstance(predicate, pa.Scalar) else predicate

    @property
    def projected_schema(self) -> pa.Schema:
        return self._relation.projected(self._columns)

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        pieces = self._relation.batches(self._columns, self._predicate)
        while (batch := self._pool.submit(next, pieces, None).result()) is not None:
            yield batch
