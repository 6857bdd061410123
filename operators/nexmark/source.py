"""Reads events of one kind, in the order of their numbers, from files that anyone may have written.

What is asked of the files: the columns, of types that convert to those of `SCHEMAS` without loss, and within each
file the order of ``seq`` (a row that is out of it comes as late as it stands). Names, sizes and number of the files,
and how the rows are spread over them, do not matter.

A batch of any kind covers about as many events as a batch of any other, so that a query over two kinds
reads them side by side, and counts of events are met closely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import BadInputError, SchemaError
from operators.nexmark.counter import EventCounter
from operators.nexmark.merge import MergedFiles
from operators.nexmark.model import SCHEMAS, SEQ, Kind
from operators.sources import Position, SourceBatch

__all__ = ["EventFiles", "EventSource"]


class EventFiles:
    """The three directories below ``directory``, a path or fsspec URL; some may be missing.

    Raises `BadInputError` and `SchemaError` as `MergedFiles` does, and if none is there.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory.rstrip("/") or "/"
        self._rows: dict[Kind, int] = {}
        self.events = 0
        """Events of the whole stream: one more than the largest ``seq`` of any kind."""
        self._missing: dict[Kind, BadInputError] = {}
        for kind in Kind:
            try:
                source = MergedFiles(self.path(kind), [SEQ], batch_rows=1)
            except BadInputError as error:
                self._missing[kind] = error
                continue
            self._rows[kind] = source.total_rows
            if source.last_number is not None:
                self.events = max(self.events, source.last_number + 1)
        if not self._rows:
            raise self._missing[Kind.BID]

    def path(self, kind: Kind) -> str:
        """Where the events of a kind are."""
        return f"{self._directory}/{kind}"

    def source(self, kind: Kind, columns: Sequence[str], counter: EventCounter, batch_events: int) -> EventSource:
        """A source of one kind; raises `BadInputError` if there is none. A batch covers about ``batch_events``."""
        if kind in self._missing:
            error = self._missing[kind]
            raise BadInputError(f"no {kind} events: {error}") from error
        batch_rows = max(1, round(batch_events * self._rows[kind] / max(self.events, 1)))
        return EventSource(self.path(kind), kind, columns, counter=counter, batch_rows=batch_rows)

    def rows_per_second(self, kind: Kind, events_per_second: float | None) -> float | None:
        """Rows of one kind among so many events of all kinds a second; None for no limit."""
        if events_per_second is None or not self._rows.get(kind):
            return None
        return events_per_second * self._rows[kind] / self.events

    def batch_events(self, batch_rows: int) -> int:
        """Events covered by a batch of so many rows of the most frequent kind."""
        return max(1, batch_rows * self.events // max(1, *self._rows.values()))


class EventSource:
    """A source of some columns of one kind of events; tells ``counter`` how far it is.

    Its identity is kind and columns, not the place: a copy of the input is the same input.
    """

    def __init__(
        self, path: str, kind: Kind, columns: Sequence[str], *, counter: EventCounter, batch_rows: int
    ) -> None:
        self._kind = kind
        self._counter = counter
        self._schema = pa.schema([SCHEMAS[kind].field(name) for name in columns])
        self._path = path
        read = list(dict.fromkeys([*columns, SEQ]))
        self._files = MergedFiles(path, read, batch_rows=batch_rows)

    @property
    def schema(self) -> pa.Schema:
        """The columns asked for, as in `SCHEMAS`."""
        return self._schema

    @property
    def total_rows(self) -> int:
        """Rows of all files."""
        return self._files.total_rows

    def describe(self) -> Mapping[str, Any]:
        """Kind and columns."""
        return {"kind": f"nexmark-{self._kind}", "columns": self._schema.names}

    def open(self, position: Position | None) -> None:
        """Start at a position: that of the files, and the events before it."""
        self._counter.open(self._kind, 0 if position is None else position["events"])
        self._files.open(None if position is None else position["files"])

    def poll(self) -> SourceBatch | None:
        """The next batch, None at the end."""
        self._counter.poll()
        item = self._files.poll()
        if item is None:
            self._counter.end(self._kind)
            return None
        batch = item.batch
        events = pc.max(batch.column(SEQ)).as_py() + 1
        self._counter.reach(self._kind, events)
        return SourceBatch(self._conform(batch), {"files": item.position, "events": events})

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = []
        for field in self._schema:
            column = batch.column(field.name)
            if column.type != field.type:
                try:
                    column = column.cast(field.type)
                except pa.ArrowException as error:
                    found = f"{column.type}, which is no {field.type}"
                    raise SchemaError(f"{self._path}: column {field.name!r} is {found}: {error}") from error
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)
