"""Output as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from operators.sinks.base import Guarantee, Prepared, SinkContext, conform

__all__ = ["PrintSink", "rows_shown"]


def rows_shown(title: str, batch: pa.RecordBatch, max_rows: int) -> Table:
    """The first rows of a batch, and how many more there are."""
    more = batch.num_rows - max_rows
    table = Table(title=escape(title), caption=f"and {more:,} more rows" if more > 0 else None)
    for field in batch.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        table.add_column(escape(field.name), justify="right" if numeric else "left")
    for row in zip(*(c.slice(0, max_rows).to_pylist() for c in batch.columns), strict=True):
        # Markup in the data must not style the terminal, nor be swallowed by it.
        table.add_row(*("" if v is None else escape(str(v)) for v in row))
    return table


class PrintSink:
    """Prints every batch at once: the first ``max_rows`` rows, and how many there are.

    At least once: a recovered job prints again what it had printed after its last checkpoint.
    """

    guarantee = Guarantee.AT_LEAST_ONCE

    def __init__(self, *, max_rows: int = 20, console: Console | None = None) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        self._max_rows = max_rows
        self._console = console or Console()
        self._operator_id = "print"
        self._schema = pa.schema([])

    def describe(self) -> Mapping[str, Any]:
        """Nothing but its kind."""
        return {"kind": "print"}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:  # noqa: ARG002 - has none
        """Remember the title of the tables."""
        self._operator_id = context.operator_id
        self._schema = context.schema

    def write(self, batch: pa.RecordBatch) -> None:
        """Print a batch; one without rows prints nothing."""
        batch = conform(self._operator_id, self._schema, batch)
        if batch.num_rows == 0:
            return
        self._console.print(rows_shown(self._operator_id, batch, self._max_rows))

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - nothing to prepare
        """Nothing to commit."""
        return Prepared()

    def publish(self, committables: Sequence[Any]) -> None:
        """Nothing to publish."""

    def close(self) -> None:
        """Nothing to release."""
