"""What a source is: batches in one order, and a position after each of them.

Invariants every source keeps:

* The position that comes with a batch is the *next* one: opened there, the source goes on with the
  row after that batch.
* The boundaries of the batches after a position are a function of the input and that position, so
  a restored job sees the same batches as one that never stopped.
* An input that is not the one the position was taken from is refused (`SourceChangedError`), never
  read as if it were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import pyarrow as pa

__all__ = ["Position", "Source", "SourceBatch"]

Position: TypeAlias = Any
"""A value that msgpack carries; only the source that made it can read it."""


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """Rows, and the position after the last of them."""

    batch: pa.RecordBatch
    position: Position


class Source(Protocol):
    """A replayable input. All calls come from one thread."""

    @property
    def schema(self) -> pa.Schema:
        """The schema of every batch, without metadata."""

    @property
    def total_rows(self) -> int | None:
        """Rows of the whole input where that is known beforehand, for a progress bar."""

    def describe(self) -> Mapping[str, Any]:
        """What must be the same when a job is restored; carried by msgpack."""

    def open(self, position: Position | None) -> None:
        """Start at a position, or with None at the beginning.

        Raises `SourceChangedError` if the input before the position is not what it was.
        """

    def poll(self) -> SourceBatch | None:
        """The next batch; None at the end of a bounded input. May block."""

    def close(self) -> None:
        """Stop every thread and release every file. May be called twice."""
