"""What a sink is: output that counts only once the checkpoint behind it is committed.

The job calls, for every checkpoint::

    prepare(id)  at the barrier, on the job's thread     names what will be published, swaps buffers
    stage()      on the backend's I/O threads            makes it durable where no reader looks
                 ... the manifest, with the committables, is created ...
    publish()    on a side thread                        makes it visible

A checkpoint that fails never reaches `publish`; what it staged, or still has to stage, comes again
with the next one. After a crash the committables of the restored manifest are published again.

Invariants every exactly-once sink keeps:

* Nothing is visible before the manifest that names it is committed.
* Publishing the same committable twice, also from two processes, changes nothing.
* Rows written before a barrier are published by that checkpoint or a later one, once.

`operators.testing.check_exactly_once` tests a sink of your own against them, in a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from operators.errors import SchemaError
from statebackend import StateBackend

__all__ = ["BoundedSink", "Guarantee", "Prepared", "Sink", "SinkContext", "conform"]


class Guarantee(StrEnum):
    """What a sink promises about the rows of a job that crashes and recovers."""

    EXACTLY_ONCE = "exactly once"
    AT_LEAST_ONCE = "at least once"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a sink adds to one checkpoint.

    ``committables``: msgpack-able; names everything staged and not yet known to be published.
    ``stage``: makes it durable before the manifest is written; None if there is nothing to do. It
    may be called again with a later checkpoint after it failed.
    """

    committables: Sequence[Any] = ()
    stage: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class SinkContext:
    """Where a sink runs. ``attempt`` is unique for each opening of the job."""

    operator_id: str
    schema: pa.Schema
    backend: StateBackend
    store_id: str
    attempt: str


class Sink(Protocol):
    """The end of a stream."""

    @property
    def guarantee(self) -> Guarantee:
        """What this sink promises, honestly."""

    def describe(self) -> Mapping[str, Any]:
        """What must be the same when a job is restored; carried by msgpack."""

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        """Recover: publish the committables of the restored checkpoint, drop own orphans."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Take the rows of one batch (``context.schema``). Job thread; must not block for long."""

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:
        """At the barrier, on the job's thread, in less than a millisecond. ``final``: the input ended."""

    def publish(self, committables: Sequence[Any]) -> None:
        """Make the committables of a committed checkpoint visible. Idempotent."""

    def close(self) -> None:
        """Release everything; publishes nothing. May be called twice."""


@runtime_checkable
class BoundedSink(Sink, Protocol):
    """A sink that keeps rows in memory until they are published, and bounds how many.

    When it is full the job reads nothing more until the checkpoint that is under way is published, and then takes the
    next one at once: so the sink holds back the sources, and never holds more than twice its limit and one
    round of batches.
    """

    @property
    def full(self) -> bool:
        """Whether it holds as much as it may. Job thread, after every round of batches."""


def conform(operator_id: str, schema: pa.Schema, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same columns under exactly the sink's schema; `SchemaError` if names or types differ."""
    if batch.schema.names != schema.names or batch.schema.types != schema.types:
        raise SchemaError(
            f"{operator_id}: the sink got a batch with columns\n{batch.schema.remove_metadata()}\nexpected\n{schema}"
        )
    return pa.RecordBatch.from_arrays(batch.columns, schema=schema)
