"""Output kept in memory: for tests, notebooks and small results."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from operators.sinks.base import Guarantee, Prepared, SinkContext, conform

__all__ = ["MemorySink"]


class MemorySink:
    """Collects batches at once, without waiting for a checkpoint.

    At least once: rows that were written after the last committed checkpoint of a crashed job are
    written again by its successor. A sink object that lives through both holds them twice.
    """

    guarantee = Guarantee.AT_LEAST_ONCE

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: list[pa.RecordBatch] = []
        self._schema = pa.schema([])
        self._operator_id = "memory"

    def describe(self) -> Mapping[str, Any]:
        """Nothing but its kind."""
        return {"kind": "memory"}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:  # noqa: ARG002 - has none
        """Keep what was collected before."""
        self._schema = context.schema.remove_metadata()
        self._operator_id = context.operator_id

    def write(self, batch: pa.RecordBatch) -> None:
        """Keep a reference to the batch."""
        batch = conform(self._operator_id, self._schema, batch)
        with self._lock:
            self._batches.append(batch)

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - nothing to prepare
        """Nothing to commit."""
        return Prepared()

    def publish(self, committables: Sequence[Any]) -> None:
        """Nothing to publish."""

    def close(self) -> None:
        """Keep everything, so that it can be read after the job has ended."""

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """What was written so far, in order."""
        with self._lock:
            return list(self._batches)

    def table(self) -> pa.Table:
        """All rows so far as one table; safe from any thread."""
        batches = self.batches
        return pa.Table.from_arrays(
            [pa.chunked_array([b.column(i) for b in batches], f.type) for i, f in enumerate(self._schema)],
            schema=self._schema,
        )
