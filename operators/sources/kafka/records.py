"""Many records of a topic as columns: values decoded, and what else Kafka knows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from operators.errors import BadInputError, SchemaError
from operators.formats import Format, Rejected, decode
from operators.windows import Int64Array

__all__ = ["DEAD_LETTERS", "METADATA", "RecordDecoder", "Tombstones"]

_TIME = pa.timestamp("ms", "UTC")
METADATA: Mapping[str, pa.DataType] = {
    "key": pa.binary(),
    "headers": pa.list_(pa.struct([pa.field("name", pa.string(), nullable=False), ("value", pa.binary())])),
    "topic": pa.string(),
    "partition": pa.int32(),
    "offset": pa.int64(),
    "timestamp": _TIME,
}
"""What there is to know of a record beside its value; columns of these types."""

DEAD_LETTERS = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("timestamp", _TIME),
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("error", pa.string()),
    ]
)
"""The columns of records that could not be decoded, as they were."""


class Tombstones(StrEnum):
    """What to do with a record that has no value."""

    ERROR = "error"
    DROP = "drop"
    NULL = "null"


@dataclass(frozen=True, slots=True)
class Run:
    """Records of one partition, among those that were consumed together: numbers ``start`` to ``stop``."""

    topic: str
    partition: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Records:
    """Records that were consumed together (`confluent_kafka.Message`), those of a partition side by side in order."""

    messages: Sequence[Any]
    offsets: Int64Array
    runs: Sequence[Run]

    @classmethod
    def of(cls, messages: Sequence[Any]) -> Records:
        """Sort by partition; ``messages`` are at least one, and none is an error."""
        kind = type(messages[0])
        partitions = np.fromiter(map(kind.partition, messages), np.int64, len(messages))
        topics = list(map(kind.topic, messages))
        names = sorted(set(topics))
        if len(names) > 1:
            number = {name: i for i, name in enumerate(names)}
            codes = np.fromiter(map(number.__getitem__, topics), np.int64, len(topics))
            partitions += codes << _PARTITION_BITS
        if (partitions[:-1] > partitions[1:]).any():
            order = np.argsort(partitions, kind="stable")
            messages, partitions = [messages[i] for i in order.tolist()], partitions[order]
        edges = [0, *(np.flatnonzero(np.diff(partitions)) + 1).tolist(), len(messages)]
        runs = [
            Run(messages[start].topic(), messages[start].partition(), start, stop) for start, stop in pairwise(edges)
        ]
        return cls(messages, np.fromiter(map(kind.offset, messages), np.int64, len(messages)), runs)

    def take(self, numbers: Int64Array | None) -> Records:
        """Some of them, in order; None: all."""
        if numbers is None:
            return self
        runs = []
        for run in self.runs:
            start, stop = np.searchsorted(numbers, [run.start, run.stop]).tolist()
            runs.append(Run(run.topic, run.partition, start, stop))
        return Records([self.messages[i] for i in numbers.tolist()], self.offsets[numbers], runs)


_PARTITION_BITS = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one partition, the records that could not be decoded if any, and the offset after the last record."""

    topic: str
    partition: int
    batch: pa.RecordBatch
    dead: pa.RecordBatch | None
    next_offset: int


class RecordDecoder:
    """Makes rows of records.

    ``metadata``: columns to append, as names of `METADATA` with the names that the columns get. ``divert``: records
    that cannot be decoded are set aside; else they are an error.

    Raises `SchemaError` if two columns have one name.
    """

    def __init__(
        self, format_: Format, metadata: Mapping[str, str], tombstones: Tombstones | None, *, divert: bool
    ) -> None:
        default = Tombstones.NULL if format_.takes_nulls else Tombstones.ERROR
        self.format = format_
        self.metadata = dict(metadata)
        self.tombstones = tombstones or default
        self._divert = divert
        fields = [pa.field(column, METADATA[name]) for name, column in self.metadata.items()]
        names = [*format_.schema.names, *self.metadata.values()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise SchemaError(
                f"read_kafka: two columns are called {twice[0]!r}; metadata= may give others names: "
                f"metadata={{{twice[0]!r}: 'kafka_{twice[0]}'}}"
            )
        self.schema = pa.schema([*format_.schema, *fields])

    def describe(self) -> Mapping[str, Any]:
        """What must be the same when a job is restored."""
        return {**self.format.describe(), "metadata": self.metadata, "tombstones": str(self.tombstones)}

    def decode(self, records: Records) -> list[Piece]:
        """Rows of the records, a piece for each partition.

        Raises `BadInputError` for a record that cannot be decoded, unless such are set aside.
        """
        batch, kept, rejected = self._decode_values(records)
        if rejected and not self._divert:
            raise self._bad(records, rejected[0])
        rows = records.take(kept)
        if self.metadata:
            made = [_COLUMNS[name](rows) for name in self.metadata]
            batch = pa.RecordBatch.from_arrays([*batch.columns, *made], schema=self.schema)
        numbers = np.array([r.index for r in rejected], np.int64)
        dead = self._dead(records.take(numbers), rejected) if rejected else None
        pieces = []
        for run, of_rows in zip(records.runs, rows.runs, strict=True):
            part = batch.slice(of_rows.start, of_rows.stop - of_rows.start)
            aside = None
            if dead is not None:
                start, stop = np.searchsorted(numbers, [run.start, run.stop]).tolist()
                aside = dead.slice(start, stop - start)
            pieces.append(Piece(run.topic, run.partition, part, aside, int(records.offsets[run.stop - 1]) + 1))
        return pieces

    def _decode_values(self, records: Records) -> tuple[pa.RecordBatch, Int64Array | None, list[Rejected]]:
        """Rows, the numbers of the records that they are of (None: of all), and the records that have none."""
        values = list(map(type(records.messages[0]).value, records.messages))
        kept: Int64Array | None = None
        tombstones: list[int] = []
        if None in values and not (self.format.takes_nulls and self.tombstones is Tombstones.NULL):
            tombstones = [i for i, value in enumerate(values) if value is None]
            kept = np.delete(np.arange(len(values)), tombstones)
            values = [values[i] for i in kept.tolist()]
        decoded = decode(self.format, values)
        batch, rejected = decoded.batch, list(decoded.rejected)
        if rejected:
            numbers = np.arange(len(values)) if kept is None else kept
            kept = np.delete(numbers, [r.index for r in rejected])
            rejected = [Rejected(int(numbers[r.index]), r.reason) for r in rejected]
        if tombstones and self.tombstones is Tombstones.ERROR:
            rejected = sorted([*rejected, *(Rejected(i, _NO_VALUE) for i in tombstones)], key=lambda r: r.index)
        elif tombstones and self.tombstones is Tombstones.NULL and kept is not None:
            batch, kept = _with_null_rows(batch, kept, np.array(tombstones, np.int64))
        return batch, kept, rejected

    def _dead(self, records: Records, rejected: Sequence[Rejected]) -> pa.RecordBatch:
        columns = [_COLUMNS[f.name](records) for f in list(DEAD_LETTERS)[:-2]]
        columns += [pa.array([m.value() for m in records.messages], pa.binary())]
        columns += [pa.array([r.reason for r in rejected], pa.string())]
        return pa.RecordBatch.from_arrays(columns, schema=DEAD_LETTERS)

    def _bad(self, records: Records, first: Rejected) -> BadInputError:
        run = next(run for run in records.runs if first.index < run.stop)
        return BadInputError(
            f"topic {run.topic!r}, partition {run.partition}, offset {records.offsets[first.index]}: the record cannot "
            f"be read as {self.format.describe()['format']}: {first.reason}. To go on, read the topic with "
            "on_bad_record='divert', which hands such records to dead_letters()"
        )


_NO_VALUE = "it has no value (a tombstone); tombstones='null' makes rows of nulls of them, 'drop' leaves them out"


def _with_null_rows(
    batch: pa.RecordBatch, numbers: Int64Array, missing: Int64Array
) -> tuple[pa.RecordBatch, Int64Array]:
    """The rows with rows of nulls among them, where the records have no value; and the numbers of all."""
    both = np.sort(np.concatenate([numbers, missing]))
    at = pa.array(np.searchsorted(numbers, both), pa.int64(), mask=np.isin(both, missing))
    return batch.take(at), both


def _times(records: Records) -> pa.Array:
    # Kind 0: the record has no time.
    kinds_and_times = [message.timestamp() for message in records.messages]
    return pa.array([time if kind else None for kind, time in kinds_and_times], pa.int64()).cast(_TIME)


def _headers(records: Records) -> pa.Array:
    found = [message.headers() for message in records.messages]
    pairs = [None if h is None else [{"name": name, "value": value} for name, value in h] for h in found]
    return pa.array(pairs, METADATA["headers"])


def _keys(records: Records) -> pa.Array:
    return pa.array([message.key() for message in records.messages], pa.binary())


def _of_runs(records: Records, values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The value of its partition for each record."""
    counts = [run.stop - run.start for run in records.runs]
    return pa.array(values, kind).take(pa.array(np.repeat(np.arange(len(counts)), counts)))


_COLUMNS: Mapping[str, Callable[[Records], pa.Array]] = {
    "key": _keys,
    "headers": _headers,
    "topic": lambda records: _of_runs(records, [run.topic for run in records.runs], METADATA["topic"]),
    "partition": lambda records: _of_runs(records, [run.partition for run in records.runs], METADATA["partition"]),
    "offset": lambda records: pa.array(records.offsets, pa.int64()),
    "timestamp": _times,
}
