"""Rows on standard output: tables for people, or lines of JSON or CSV for programs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from operators.encoders import CsvEncoder, JsonEncoder, RowEncoder
from operators.sinks import Guarantee, Prepared, PrintSink, SinkContext
from operators.sinks.base import Sink, conform
from operators.sinks.console import rows_shown

__all__ = ["RowFormat", "Rows"]

_WIDTH = 200
"""Of tables that go into a file or a pipe, in characters."""


class RowFormat(StrEnum):
    """Tables show the first rows of every batch; the others are a line for each row, CSV with one for the names."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class Rows:
    """Where the answers of a script go. ``rows_max``: of each batch in a table."""

    def __init__(self, kind: RowFormat, rows_max: int) -> None:
        self._kind = kind
        self._rows_max = rows_max
        self._console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)

    def text(self, text: str) -> None:
        """Print as it is."""
        self._console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, rows: pa.Table) -> None:
        """Print rows that are there; raises `SchemaError` for columns that the format has no way to write."""
        if self._kind is RowFormat.TABLE:
            if not rows.num_rows:
                self.text(f"{title}: no rows of {', '.join(rows.column_names)}")
            for batch in rows.combine_chunks().to_batches():
                self._console.print(rows_shown(title, batch, self._rows_max))
            return
        lines = _Lines(self._kind, rows.schema)
        for batch in rows.to_batches():
            lines.write(batch)

    def sink(self) -> Sink:
        """Prints the batches of a stream."""
        if self._kind is RowFormat.TABLE:
            return PrintSink(max_rows=self._rows_max, console=self._console)
        return _LineSink(self._kind)


class _Lines:
    """Writes rows of one schema; of CSV the names first."""

    def __init__(self, kind: RowFormat, schema: pa.Schema) -> None:
        csv = kind is RowFormat.CSV
        self._encoder: RowEncoder = CsvEncoder(schema) if csv else JsonEncoder(schema)
        if csv:
            names = pa.RecordBatch.from_arrays([pa.array([name]) for name in schema.names], schema.names)
            _write(CsvEncoder(names.schema).encode(names))

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            _write(self._encoder.encode(batch))


def _write(lines: pa.Array) -> None:
    together = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(lines)], pa.int32()), lines), b"\n")
    sys.stdout.write(together[0].as_py().decode() + "\n")
    sys.stdout.flush()


class _LineSink:
    """At least once, as `PrintSink` is: a recovered job writes again what it had written after its last checkpoint."""

    guarantee = Guarantee.AT_LEAST_ONCE

    def __init__(self, kind: RowFormat) -> None:
        self._kind = kind
        self._schema = pa.schema([])
        self._operator_id = "print"
        self._lines: _Lines | None = None

    def describe(self) -> Mapping[str, Any]:
        """That of `PrintSink`: in which form rows are shown may change from run to run."""
        return {"kind": "print"}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:  # noqa: ARG002 - has none
        """Write the names, if that is to be."""
        self._operator_id, self._schema = context.operator_id, context.schema
        self._lines = _Lines(self._kind, context.schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Write every row."""
        assert self._lines is not None
        self._lines.write(conform(self._operator_id, self._schema, batch))

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - nothing to prepare
        """Nothing to commit."""
        return Prepared()

    def publish(self, committables: Sequence[Any]) -> None:
        """Nothing to publish."""

    def close(self) -> None:
        """Nothing to release."""
