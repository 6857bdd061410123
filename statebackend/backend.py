"""How operators keep state: tables of Arrow batches and one atomic checkpoint over all of them.

An operator asks the backend for tables and reads and writes batches. At a barrier the job calls
`StateBackend.checkpoint` with its positions; everything written before the call, in every table,
and those positions become durable together or not at all. After a crash, opening the backend
again shows the latest committed checkpoint as `StateBackend.restored`, and the tables hold
exactly what they held at that barrier.

Invariants every implementation keeps (``tests/conformance`` holds them):

* All tables and the `JobState` recover at the same checkpoint.
* `checkpoint` cuts at the moment of the call; what is written later belongs to the next one.
* Checkpoints commit in the order of the calls; one that fails leaves its rows to the next.
* Cancelling the returned future drops only the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import pyarrow as pa

from statebackend import display
from statebackend.ids import CheckpointId, StoreId
from statebackend.tables import TableSpec

__all__ = [
    "Checkpoint",
    "Health",
    "JobState",
    "LookupResult",
    "Matches",
    "StateBackend",
    "StateCheck",
    "StateTable",
    "StoredTable",
    "Value",
]

Value: TypeAlias = Any
"""A value that msgpack carries: None, bool, int, float, str, bytes, list, dict with str keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What a job commits beside its tables.

    ``sources``: the next position of every source, by operator id.
    ``watermarks``: the event-time watermark of every operator that has one, by operator id.
    ``committables``: what every sink has staged and not yet published, by operator id.
    ``plan``: a description of the operators, by operator id, compared when a job is restored.
    """

    sources: Mapping[str, Value] = field(default_factory=dict)
    watermarks: Mapping[str, int] = field(default_factory=dict)
    committables: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    plan: Mapping[str, Value] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        return display.job_state(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One committed cut through the stream.

    ``created_ms`` is wall-clock time in epoch milliseconds; ``bytes_written`` and ``rows_written``
    count what the SSTables of this checkpoint hold; ``duration_s`` runs from the call to the
    commit, in a checkpoint that was read back until everything but the manifest was durable.
    """

    checkpoint_id: CheckpointId
    manifest_number: int
    created_ms: int
    job: JobState
    bytes_written: int = 0
    rows_written: int = 0
    duration_s: float = 0.0

    def _repr_html_(self) -> str:
        return display.checkpoint(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTable:
    """What the restored checkpoint holds of a table; ``rows`` counts superseded and dead ones too.

    ``rows`` and ``bytes`` are None where the backend does not count them.
    """

    spec: TableSpec
    rows: int | None
    bytes: int | None


StateCheck: TypeAlias = Callable[[Checkpoint | None, Mapping[str, StoredTable]], object]
"""Raises when a checkpoint (None: there is none yet) with these tables is not what the caller can go on from."""


@dataclass(frozen=True, slots=True)
class LookupResult:
    """Row i answers key i; ``hit`` (Arrow bool) tells whether it was found, else the row is null."""

    batch: pa.RecordBatch
    hit: pa.BooleanArray


@dataclass(frozen=True, slots=True)
class Matches:
    """Rows that answer keys: row i of ``batch`` answers key ``key_index[i]`` (Arrow int64, ascending)."""

    batch: pa.RecordBatch
    key_index: pa.Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the background work of a backend is doing; ``error`` is the failure it keeps, if any."""

    ok: bool
    error: BaseException | None = None
    details: Mapping[str, Value] = field(default_factory=dict)


class StateTable(Protocol):
    """One table of keyed state. Batches in have ``spec.schema``; calls are thread-safe."""

    @property
    def spec(self) -> TableSpec:
        """The declaration of the table."""

    @property
    def watermark(self) -> int | None:
        """Rows with a time (or ttl) below this are dead and hidden; None before the first `expire`."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Upsert, merge or append the rows, by the kind of the table."""

    def delete(self, keys: pa.RecordBatch) -> None:
        """Delete the rows of these keys (upsert tables). Columns: the key columns."""

    def lookup(self, keys: pa.RecordBatch) -> LookupResult:
        """The row of each key (upsert and aggregate tables). Columns: the key columns."""

    def matches(self, keys: pa.RecordBatch, time_range: tuple[int | None, int | None] = (None, None)) -> Matches:
        """All live rows whose partition key (the key without ``time_field``) is one of the given ones.

        ``keys``: the partition key columns; null equals null; a key that is given twice is answered twice.
        ``time_range``: only rows with ``start <= time < end``, integers in the unit of the time column.
        The rows have the table's columns and come by key, time and order of writing. For tables of order
        ``hash``, and more slowly of order ``time``.
        """

    def scan(
        self,
        columns: Sequence[str] | None = None,
        time_range: tuple[int | None, int | None] = (None, None),
        *,
        merged: bool = True,
        hash_range: tuple[int | None, int | None] = (None, None),
    ) -> list[pa.RecordBatch]:
        """Live rows with ``start <= time < end`` (integers in the unit of the time column).

        ``hash_range``: only rows with ``low <= hash < high``, where the hash is the 64-bit hash of the partition key
        (see ``keys.py``), by which state is divided among workers. Not for tables of order ``key``.
        With ``merged=False`` an aggregate table may return several partial states of one key,
        which saves the merge for a caller that merges anyway. Rows of an append table come in
        write order within a key.
        """

    def expire(self, before: int) -> None:
        """Declare all rows with a time below ``before`` dead. Never moves back.

        With ``ttl_field`` in an upsert table, a key whose newest row is below is gone, its older rows with it.
        """


class StateBackend(Protocol):
    """Where the state of one job lives."""

    @property
    def store_id(self) -> StoreId:
        """Random identity of the state, given when it was created."""

    @property
    def restored(self) -> Checkpoint | None:
        """The checkpoint that was loaded when the backend was opened, or None for a new one."""

    def table(self, spec: TableSpec) -> StateTable:
        """Create the table or open the one of this name.

        Its columns may change when it is opened, as far as `SchemaChanges` describes, where the backend can do that.
        Raises `SchemaMismatchError` if the table cannot be what is asked for.
        """

    def stored_tables(self) -> Mapping[str, StoredTable]:
        """The tables that the backend was opened with, by name."""

    def move_tables(self, names: Mapping[str, str | None]) -> None:
        """Give tables other names, or drop them (None), before any table is opened.

        It becomes durable with the next checkpoint, together with everything else that this one says; after a crash
        before that nothing has happened. What the old names held is in older checkpoints for as long as these stay.
        Raises ``ValueError`` for a table that is not there, for two of one name and when a table is open already,
        `StateStoreError` where the backend cannot do it.
        """

    def checkpoint(self, job: JobState, prepare: Sequence[Callable[[], None]] = ()) -> Future[Checkpoint]:
        """Cut now, commit in the background.

        Each ``prepare`` callable runs on the backend's I/O threads and must have returned before
        the manifest is written (a sink stages its files there); if one raises, the checkpoint
        fails. A checkpoint that failed before is retried as part of this one.

        The future raises `FencedError` when a newer writer owns the store, `CommitUnknownError`
        when the outcome could not be learned in time, `StorageUnavailableError` when the storage
        gave up; the job may go on after the last two.
        """

    def health(self) -> Health:
        """What the background work is doing, and the failure it keeps, if any."""

    def close(self, deadline_s: float = 30.0) -> None:
        """Finish what was handed over, stop every thread, release the store."""
