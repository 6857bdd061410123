"""One source after another: history from files, then what comes live.

The first is read to its end, then the second from its beginning. Where the two overlap, an event time says where the
one ends and the other begins: of the first only rows before it count, of the second only rows from it on.

Event time is followed by split; those of the two stages have names of their own (``first:...``, ``second:...``).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import SchemaError
from operators.sources.base import IDLE, Idle, Position, Source, SourceBatch, SplitSource

__all__ = ["ThenSource"]

_STAGES = ("first", "second")


class ThenSource:
    """Rows of ``first``, and when it has ended those of ``second``.

    Args:
        first: a source that ends.
        second: a source with the same columns.
        column: a timestamp or date column (not null) that says to which of them a row belongs.
        at: the time at which the second takes over; with ``column``. The first is read to its end in any case, as its
            rows need not come in order.

    Where ``second`` begins at its own first batch depends on how it was made (a Kafka source on its start). Raises
    `SchemaError` if the columns differ, or the column is not there.
    """

    def __init__(
        self, first: Source, second: Source, *, column: str | None = None, at: dt.datetime | dt.date | None = None
    ) -> None:
        if (column is None) != (at is None):
            raise ValueError("then: column and at belong together")
        if first.schema != second.schema:
            raise SchemaError(f"then: the first has columns\n{first.schema}\nthe second\n{second.schema}")
        self._sources = (first, second)
        self._splits = tuple(source if isinstance(source, SplitSource) else None for source in self._sources)
        self._column = column
        self._at: pa.Scalar | None = None
        if column is not None:
            if column not in first.schema.names:
                raise SchemaError(f"then: no column {column!r} among {first.schema.names}")
            try:
                self._at = pa.scalar(at).cast(first.schema.field(column).type)
            except (pa.ArrowException, ValueError, TypeError) as e:
                kind = first.schema.field(column).type
                raise SchemaError(f"then: {at!r} cannot be compared with {column!r} of type {kind}: {e}") from e
        self._stage = 0
        self._end: Position | None = None

    @property
    def schema(self) -> pa.Schema:
        """The columns of both."""
        return self._sources[0].schema

    @property
    def total_rows(self) -> int | None:
        """Rows of both, where they are known and all count."""
        totals = [source.total_rows for source in self._sources]
        return None if self._column is not None or None in totals else sum(t for t in totals if t is not None)

    @property
    def splits(self) -> frozenset[str]:
        """Those of the source that is being read."""
        splits = self._splits[self._stage]
        names = frozenset([""]) if splits is None else splits.splits
        return frozenset(self._named(name) for name in names)

    def describe(self) -> Mapping[str, Any]:
        """Both sources, and where they meet."""
        first, second = (dict(source.describe()) for source in self._sources)
        return {"kind": "then", "first": first, "second": second, "column": self._column, "at": str(self._at)}

    def pause(self, splits: frozenset[str]) -> None:
        """Hold back these splits of the source that is being read."""
        source = self._splits[self._stage]
        if source is not None:
            prefix = self._named("")
            source.pause(frozenset(name.removeprefix(prefix) for name in splits if name.startswith(prefix)))

    def open(self, position: Position | None) -> None:
        """Open the source in which the position lies."""
        self._stage = 0 if position is None else position["stage"]
        self._sources[self._stage].open(None if position is None else position["position"])

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch that counts."""
        item = self._sources[self._stage].poll()
        if item is IDLE:
            return IDLE
        if item is None:
            if self._stage == 1:
                return None
            self._sources[0].close()
            self._stage = 1
            self._sources[1].open(None)
            return IDLE
        position = {"stage": self._stage, "position": item.position}
        return SourceBatch(self._counting(item.batch), position, self._named(item.split))

    def close(self) -> None:
        """Close both."""
        for source in self._sources:
            source.close()

    def _counting(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._column is None:
            return batch
        compare = pc.less if self._stage == 0 else pc.greater_equal
        mask = compare(batch.column(self._column), self._at)
        return batch if mask.true_count == batch.num_rows else batch.filter(mask)

    def _named(self, split: str) -> str:
        return f"{_STAGES[self._stage]}:{split}"
