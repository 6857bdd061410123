"""Batches from Python: a list, a table, a reader, or a factory of iterators.

The position is the number of batches handed out. On restore a factory is called again and its
batches are skipped, or it seeks by itself if it takes the number of the first batch. An iterator
that cannot be made again is read once and refuses any position but the beginning.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from operators.errors import BadInputError, SchemaError, SourceChangedError, SourceNotReplayableError
from operators.sources.base import Position, SourceBatch

__all__ = ["BatchFactory", "Batches", "IterableSource", "conform_batch", "takes_start"]

Batches: TypeAlias = Iterable[pa.RecordBatch | pa.Table]
BatchFactory: TypeAlias = Callable[[], Batches] | Callable[[int], Batches]


class IterableSource:
    """Record batches that Python code supplies.

    Args:
        batches: one of: a `pa.Table`, a `pa.RecordBatch`, a sequence or another collection that can be
            iterated again (replayable); a function without arguments that returns the batches from the
            first on (replayable; called again and skipped forward); a function with one required
            argument, or whose first one is named ``start``, that returns them from that number on (replayable
            by seeking); an iterator or a `pa.RecordBatchReader` (read once, not replayable); any other object with
            ``__arrow_c_stream__``: a DataFrame of pandas or Polars, a relation of DuckDB, a DataFrame of DataFusion
            (asked anew at each opening: replayable if it gives its rows in the same order each time; a query
            should have an ORDER BY).
        schema: the schema of every batch. Without it the first batch is asked, which for a
            function means one extra call when the source is made.

    A table among the batches counts as one batch. A batch with other columns is a `SchemaError`. An error of the
    user's iterator passes through, with a note that tells the batch.
    """

    def __init__(
        self,
        batches: pa.Table | pa.RecordBatch | pa.RecordBatchReader | Batches | BatchFactory,
        schema: pa.Schema | None = None,
    ) -> None:
        self._total_rows: int | None = None
        self._replayable = True
        self._seeks = False
        self._make: Callable[..., Batches]
        if isinstance(batches, pa.Table):
            self._total_rows = batches.num_rows
            schema = schema or batches.schema
            self._make = batches.to_batches
        elif isinstance(batches, pa.RecordBatch):
            self._total_rows = batches.num_rows
            self._make = lambda: [batches]
        elif isinstance(batches, pa.RecordBatchReader | Iterator):
            if isinstance(batches, pa.RecordBatchReader):
                schema = schema or batches.schema
            self._replayable = False
            self._make = lambda: batches
        elif hasattr(batches, "__arrow_c_stream__"):
            schema = schema or pa.RecordBatchReader.from_stream(batches).schema
            self._make = lambda: pa.RecordBatchReader.from_stream(batches)
        elif isinstance(batches, Iterable):
            if isinstance(batches, Sequence) and all(isinstance(b, pa.RecordBatch | pa.Table) for b in batches):
                self._total_rows = sum(b.num_rows for b in batches)
            self._make = lambda: batches
        elif callable(batches):
            self._make = batches
            self._seeks = takes_start(batches)
        else:
            raise TypeError(f"expected batches or a function that returns them, not {type(batches).__name__}")
        self._peeked: list[pa.RecordBatch | pa.Table] = []
        self._schema = (schema if schema is not None else self._peek()).remove_metadata()
        self._iterator: Iterator[pa.RecordBatch | pa.Table] | None = None
        self._used = False
        self._batches = 0
        self._rows = 0

    @property
    def schema(self) -> pa.Schema:
        """The schema of every batch."""
        return self._schema

    @property
    def total_rows(self) -> int | None:
        """Rows of a table or a list, None for anything else."""
        return self._total_rows

    def describe(self) -> Mapping[str, Any]:
        """Only the schema: what the user's code supplies cannot be compared."""
        return {"kind": "iterable", "schema": self._schema.to_string()}

    def open(self, position: Position | None) -> None:
        """Start at a position; raises `SourceNotReplayableError` for an iterator that was read before."""
        start, rows = (0, 0) if position is None else (int(position["batches"]), int(position["rows"]))
        if not self._replayable and (start or self._used):
            reason = f"asked to start at batch {start}" if start else "opened a second time"
            raise SourceNotReplayableError(
                f"iterable source: a one-shot iterator was {reason}; give a function that returns the batches instead"
            )
        self._used = True
        self._batches = self._rows = 0
        if self._seeks:
            self._batches, self._rows = start, rows
            self._iterator = iter(self._make(start))
            return
        made = iter(self._make())
        self._iterator = itertools.chain(self._peeked, made) if not self._replayable else made
        self._peeked = []
        while self._batches < start and self.poll() is not None:
            pass
        if (self._batches, self._rows) != (start, rows):
            found = f"{self._rows} rows in {self._batches} batches"
            self.close()
            raise SourceChangedError("iterable source", expected=f"{rows} rows in {start} batches", found=found)

    def poll(self) -> SourceBatch | None:
        """The next batch, None at the end."""
        if self._iterator is None:
            raise RuntimeError("the iterable source is not open")
        try:
            item = next(self._iterator, None)
        except Exception as e:
            e.add_note(f"raised by the user's iterator in place of batch {self._batches}")
            raise
        if item is None:
            return None
        batch = conform_batch(item, self._schema, f"batch {self._batches} of the iterable source")
        self._batches += 1
        self._rows += batch.num_rows
        return SourceBatch(batch, {"batches": self._batches, "rows": self._rows})

    def close(self) -> None:
        """Drop the iterator, closing it if it is a generator."""
        iterator, self._iterator = self._iterator, None
        if self._replayable and isinstance(iterator, Generator):
            iterator.close()

    def _peek(self) -> pa.Schema:
        made = iter(self._make(0) if self._seeks else self._make())
        first = next(made, None)
        if first is None:
            raise BadInputError("iterable source: no batch to take the schema from; pass schema=")
        if not isinstance(first, pa.RecordBatch | pa.Table):
            raise TypeError(f"batch 0 of the iterable source is a {type(first).__name__}, not a RecordBatch")
        if not self._replayable:
            self._peeked = [first]
        elif isinstance(made, Generator):
            made.close()
        return first.schema


def conform_batch(item: pa.RecordBatch | pa.Table, schema: pa.Schema, what: str) -> pa.RecordBatch:
    """What a user's iterator gave, as one batch of the schema. Raises `TypeError` and `SchemaError`."""
    if isinstance(item, pa.Table):
        parts = item.to_batches()
        item = pa.concat_batches(parts) if parts else pa.RecordBatch.from_pylist([], schema=item.schema)
    if not isinstance(item, pa.RecordBatch):
        raise TypeError(f"{what} is a {type(item).__name__}, not a RecordBatch")
    if item.schema.names != schema.names or item.schema.types != schema.types:
        raise SchemaError(f"{what} has columns\n{item.schema.remove_metadata()}\nexpected\n{schema}")
    return pa.RecordBatch.from_arrays(item.columns, schema=schema)


def takes_start(factory: Callable[..., Any]) -> bool:
    """Whether a factory seeks: its only required argument, or its first one if named ``start``, is the batch number."""
    parameters = list(inspect.signature(factory).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if len(required) > 1:
        raise TypeError(f"a batch factory takes no argument or the number of the first batch, not {len(required)}")
    return bool(required) or (bool(positional) and positional[0].name in ("start", "start_batch"))
