"""Topics of Kafka as a source: every partition a split, positions in the checkpoint and nowhere else.

A thread of its own finds the partitions, consumes and decodes, a few batches ahead (`KafkaReader`). The position is
the next offset of every partition; records of transactions that were aborted, or are still open, are not seen unless
that is asked for. Where batches end depends on when records arrive: which rows are late is the same after a restore
only if the disorder within each partition is bounded by ``max_disorder``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

import pyarrow as pa

from operators.formats import Format, SchemaRegistry
from operators.kafka import KafkaSettings
from operators.sources.base import IDLE, Idle, Position, SourceBatch
from operators.sources.kafka.formats import format_of
from operators.sources.kafka.position import KafkaPosition, partition_of, split_of
from operators.sources.kafka.reader import Assigned, Ended, Event, Finished, KafkaReader, ReadOptions
from operators.sources.kafka.records import DEAD_LETTERS, METADATA, RecordDecoder, Tombstones
from operators.sources.readahead import ReadAhead

__all__ = ["KafkaSource"]

_AHEAD = 4
_WAIT_S = 0.01
_RESERVED = {
    "bootstrap.servers": "use bootstrap_servers=",
    "group.id": "use group_id=",
    "isolation.level": "use isolation=",
    "auto.offset.reset": "use start= and on_data_loss=",
    "enable.auto.commit": "positions are kept in the state",
    "enable.auto.offset.store": "positions are kept in the state",
    "enable.partition.eof": "it is always on",
}


class KafkaSource:
    """The records of one or several topics.

    Args:
        topics: a name, or several.
        bootstrap_servers: ``host:port`` of some brokers, comma-separated or as a list.
        format: of the values: ``"json"``, ``"csv"``, ``"avro"``, ``"raw"`` (one binary column ``value``), ``"text"``
            (the same as a string), or a format of `operators.formats`, as ``ProtobufFormat(Order, framed=True)``.
        schema: the columns. For JSON it may also be one sample message (text, bytes or a mapping); None infers the
            columns from the first records of the topics, which asks the cluster at once and may find other columns
            on another day. For Avro it may also be an Avro schema; None takes the newest of the subject
            ``TOPIC-value``.
        schema_registry: for Avro: the URL of a registry (or a `SchemaRegistry`, with credentials), where records begin
            with the number of their schema. Without it all were written with ``schema``.
        metadata: further columns: any of ``key`` (binary), ``headers`` (list of name and value), ``topic``,
            ``partition`` (int32), ``offset`` (int64), ``timestamp`` (timestamp[ms, UTC], of the record); a mapping
            gives them other names.
        start: where a new job begins: ``"earliest"``, ``"latest"``, a datetime or epoch milliseconds (the first
            record of at least that time), or a mapping of ``"topic/partition"`` (or the number, for one topic) to
            offsets; partitions that it lacks, and those that come into being later, are read from their first record.
        end: None to follow the topics for ever, ``"latest"`` to stop at what is there when the job begins.
        isolation: ``"read_committed"``, or ``"read_uncommitted"`` to see records of open and aborted transactions.
        tombstones: what becomes of records without a value: ``"error"`` (they are bad records), ``"drop"``,
            ``"null"`` (a row of nulls, for ``metadata=["key"]``; the default for raw and text, the first for others).
        on_bad_record: ``"error"`` stops the job at a record that cannot be decoded, ``"divert"`` hands it to
            `DataStream.dead_letters`.
        on_data_loss: ``"error"`` stops the job if records were deleted before they were read, ``"skip"`` goes on with
            the first that is left, and warns.
        group_id: a consumer group to be told the positions of committed checkpoints, for those who watch its lag; it
            is never asked.
        unavailable_timeout: seconds (or a timedelta) for which nobody may answer before the job fails.
        discovery_interval: seconds (or a timedelta) between looks for new partitions; None: never.
        batch_rows, batch_bytes: of the records that are decoded together, at most.
        options: settings of librdkafka (``{"security.protocol": "SASL_SSL", "sasl.username": ..., ...}``). They are
            never logged, shown or stored.

    A partition that brings no rows holds event time back until ``idle_timeout`` has passed.

    Raises `SchemaError`, `ValueError`; when it runs `BadInputError` for a topic that does not exist and a record that
    cannot be read, `SourceChangedError` for a topic that was deleted or made again and for offsets that are gone,
    `SourceUnavailableError` if the cluster does not answer or does not let us in.
    """

    total_rows: int | None = None
    dead_letters = DEAD_LETTERS

    def __init__(
        self,
        topics: str | Sequence[str],
        bootstrap_servers: str | Sequence[str],
        *,
        format: str | Format = "json",  # noqa: A002 - the word of the field
        schema: pa.Schema | str | bytes | Mapping[str, Any] | None = None,
        schema_registry: str | SchemaRegistry | None = None,
        metadata: Sequence[str] | Mapping[str, str] = (),
        start: str | int | datetime | Mapping[Any, int] = "earliest",
        end: Literal["latest"] | None = None,
        isolation: str = "read_committed",
        tombstones: str | None = None,
        on_bad_record: str = "error",
        on_data_loss: str = "error",
        group_id: str | None = None,
        unavailable_timeout: float | timedelta = 300.0,
        discovery_interval: float | timedelta | None = 60.0,
        batch_rows: int = 1 << 16,
        batch_bytes: int = 16 << 20,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._topics = (topics,) if isinstance(topics, str) else tuple(topics)
        if not self._topics or not all(self._topics):
            raise ValueError("read_kafka: give the name of at least one topic")
        if end not in (None, "latest"):
            raise ValueError(f"end: {end!r} is not None or 'latest'")
        if batch_rows < 1 or batch_bytes < 1:
            raise ValueError("batch_rows and batch_bytes must be at least 1")
        self._settings = KafkaSettings.of(bootstrap_servers, options, _RESERVED)
        self._options = ReadOptions(
            start=self._started(start),
            bounded=end is not None,
            isolation=_one_of("isolation", isolation, ("read_committed", "read_uncommitted")),
            skip_lost=_one_of("on_data_loss", on_data_loss, ("error", "skip")) == "skip",
            unavailable_s=_seconds(unavailable_timeout),
            discovery_s=None if discovery_interval is None else _seconds(discovery_interval),
            batch_records=batch_rows,
            batch_bytes=batch_bytes,
            group_id=group_id or "datafusion-statebackend",
            tells_group=group_id is not None,
        )
        registry = SchemaRegistry(schema_registry) if isinstance(schema_registry, str) else schema_registry
        self._decoder = RecordDecoder(
            format_of(format, schema, self._topics, self._settings, registry),
            _metadata(metadata),
            None if tombstones is None else Tombstones(tombstones),
            divert=_one_of("on_bad_record", on_bad_record, ("error", "divert")) == "divert",
        )
        self.diverts = on_bad_record == "divert"
        self._reader: KafkaReader | None = None
        self._ahead: ReadAhead[Event] | None = None
        self._position = KafkaPosition()
        self._offsets: dict[str, int] = {}
        self._splits: frozenset[str] = frozenset()
        self._paused: frozenset[str] = frozenset()
        self._held: dict[str, deque[Event]] = {}
        self._ready: deque[SourceBatch] = deque()
        self._finished = False

    def __repr__(self) -> str:
        return f"KafkaSource({', '.join(self._topics)} at {self._settings.servers})"

    @property
    def schema(self) -> pa.Schema:
        """The columns of the values, then those of ``metadata``."""
        return self._decoder.schema

    @property
    def splits(self) -> frozenset[str]:
        """The partitions that have not ended, as ``topic/partition``; before they are known one for each topic."""
        return self._splits

    def describe(self) -> Mapping[str, Any]:
        """Topics, format and columns: not where the brokers are, which may change."""
        return {
            "kind": "kafka",
            "topics": list(self._topics),
            "isolation": self._options.isolation,
            "bounded": self._options.bounded,
            **self._decoder.describe(),
        }

    def open(self, position: Position | None) -> None:
        """Start the thread; whatever is wrong shows when the source is polled."""
        self._held, self._ready, self._paused = {}, deque(), frozenset()
        self._finished = False
        self._position = KafkaPosition.restored(position)
        self._offsets = dict(self._position.offsets)
        self._splits = frozenset(self._offsets) or frozenset(f"{topic}/?" for topic in self._topics)
        self._reader = KafkaReader(self._topics, self._settings, self._options, self._decoder, self._position)
        self._ahead = ReadAhead(self._reader.events(), depth=_AHEAD, name=f"kafka {self._topics[0]}")

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch of a partition that is not paused."""
        if self._ahead is None:
            raise RuntimeError("the Kafka source is not open")
        while not self._ready:
            event = self._next_held()
            if event is None:
                if self._finished:
                    return IDLE if any(self._held.values()) else None
                if not self._ahead.wait(_WAIT_S):
                    return IDLE
                event = self._ahead.next()
                if event is None:
                    return None
                if self._held_back(event):
                    continue
            self._ready.extend(self._apply(event))
        return self._ready.popleft()

    def pause(self, splits: frozenset[str]) -> None:
        """Hold these back until the next call."""
        self._paused = splits
        if self._reader is not None:
            self._reader.pause(splits)

    def committed(self, position: Position) -> None:
        """A checkpoint with this position is committed: tell the group, if there is one."""
        if self._options.tells_group and self._reader is not None:
            self._reader.commit(KafkaPosition.restored(position).offsets)

    def close(self) -> None:
        """Stop the thread and close the connections."""
        reader, self._reader = self._reader, None
        ahead, self._ahead = self._ahead, None
        if reader is not None:
            reader.stop()
        if ahead is not None:
            ahead.close()

    # -- events

    def _next_held(self) -> Event | None:
        """What was held back of a partition that is not any more."""
        for split, events in self._held.items():
            if events and split not in self._paused:
                return events.popleft()
        return None

    def _held_back(self, event: Event) -> bool:
        """Keep what comes of a paused partition, and what comes after it."""
        if isinstance(event, Assigned | Finished):
            return False
        split = event.split if isinstance(event, Ended) else split_of(event.topic, event.partition)
        if split not in self._paused and not self._held.get(split):
            return False
        self._held.setdefault(split, deque()).append(event)
        return True

    def _apply(self, event: Event) -> list[SourceBatch]:
        """The batches of an event; one without rows carries a position that is new."""
        if isinstance(event, Finished):
            self._finished = True
            return []
        if isinstance(event, Ended):
            self._splits -= {event.split}
            return []
        if isinstance(event, Assigned):
            self._offsets.update(event.offsets)
            self._position = KafkaPosition(self._offsets, event.topic_ids, event.ends)
            known = {split for split in self._splits if not split.endswith("/?")}
            self._splits = frozenset(known | event.offsets.keys())
            return [SourceBatch(self._nothing(), self._stored(), split) for split in event.offsets]
        split = split_of(event.topic, event.partition)
        self._offsets[split] = event.next_offset
        return [SourceBatch(event.batch, self._stored(), split, event.dead)]

    def _stored(self) -> Position:
        return KafkaPosition(self._offsets, self._position.topic_ids, self._position.ends).stored()

    def _nothing(self) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in self.schema], schema=self.schema)

    def _started(self, start: str | int | datetime | Mapping[Any, int]) -> str | int | Mapping[str, int]:
        if isinstance(start, datetime):
            if start.tzinfo is None:
                raise ValueError("start: a datetime needs a time zone")
            return int(start.timestamp() * 1000)
        if isinstance(start, str):
            return _one_of("start", start, ("earliest", "latest"))
        if isinstance(start, int):
            return start
        offsets: dict[str, int] = {}
        for place, offset in start.items():
            if isinstance(place, int) and len(self._topics) > 1:
                raise ValueError(f"start: partition {place} of which topic? write 'topic/{place}'")
            split = split_of(self._topics[0], place) if isinstance(place, int) else str(place)
            topic, _ = partition_of(split)
            if topic not in self._topics:
                raise ValueError(f"start: topic {topic!r} is not read; it reads {', '.join(self._topics)}")
            offsets[split] = int(offset)
        return offsets


def _metadata(given: Sequence[str] | Mapping[str, str]) -> Mapping[str, str]:
    named = dict(given) if isinstance(given, Mapping) else {name: name for name in given}
    if unknown := [name for name in named if name not in METADATA]:
        raise ValueError(f"metadata: {unknown[0]!r} is not one of {', '.join(METADATA)}")
    return named


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}")
    return value


def _seconds(value: float | timedelta) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds <= 0:
        raise ValueError(f"a time of {seconds} s must be positive")
    return seconds
