"""What a source is: batches in one order, and a position after each of them.

Invariants every source keeps:

* The position that comes with a batch is the *next* one: opened there, the source goes on with the
  row after that batch.
* The boundaries of the batches after a position are a function of the input and that position, so
  a restored job sees the same batches as one that never stopped. (Where rows arrive while the job runs they are not;
  then the rows of each split and their order are.)
* A source of several *splits* (partitions, files that are read side by side) tells with every batch which
  one it is from; event time is then followed per split, and is that of the split furthest behind.
* An input that is not the one the position was taken from is refused (`SourceChangedError`), never
  read as if it were.

`operators.testing.check_source` tests a source of your own against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa

__all__ = ["IDLE", "DeadLetterSource", "Idle", "Position", "Source", "SourceBatch", "SplitSource", "TrackedSource"]

Position: TypeAlias = Any
"""A value that msgpack carries; only the source that made it can read it."""


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """Rows of one split (a source without splits has one, called ""), and the source's position after them.

    ``dead_letters``: records between the positions that could not be decoded (`DeadLetterSource`). There may be no rows
    at all, where the position alone is new.
    """

    batch: pa.RecordBatch
    position: Position
    split: str = ""
    dead_letters: pa.RecordBatch | None = None


class Idle(Enum):
    """Type of `IDLE`."""

    IDLE = "idle"


IDLE: Literal[Idle.IDLE] = Idle.IDLE
"""What a live source returns when it has nothing at present, so that others can go on meanwhile."""


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

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch; None at the end of a bounded input; `IDLE` when there is nothing at present.

        It may block for a while (tens of milliseconds where other sources of the job should go on).
        """

    def close(self) -> None:
        """Stop every thread and release every file. May be called twice."""


@runtime_checkable
class SplitSource(Source, Protocol):
    """A source whose rows come from several splits side by side."""

    @property
    def splits(self) -> frozenset[str]:
        """The splits that may still bring rows; event time does not wait for the others."""

    def pause(self, splits: frozenset[str]) -> None:
        """Hold these splits back, and no others, until the next call: they are too far ahead in event time."""


@runtime_checkable
class DeadLetterSource(Source, Protocol):
    """A source that may hand on what it could not decode."""

    @property
    def diverts(self) -> bool:
        """Whether it does; else what cannot be decoded is an error."""

    @property
    def dead_letters(self) -> pa.Schema:
        """The schema of `SourceBatch.dead_letters`."""


@runtime_checkable
class TrackedSource(Source, Protocol):
    """A source that tells others how far the job has come."""

    def committed(self, position: Position) -> None:
        """A checkpoint that holds this position is committed. Does not wait for anything."""
