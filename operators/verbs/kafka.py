"""Streams that end in Kafka."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import pyarrow as pa

from operators.changelog import OP, Updates
from operators.errors import SchemaError
from operators.formats import SchemaRegistry
from operators.kafka.records import Headers, RecordColumns, RecordMaker
from operators.sinks import Guarantee, ImmediateKafkaSink, KafkaSink
from operators.verbs.ends import EndVerbs
from operators.verbs.tombstones import split_changelog

__all__ = ["KafkaVerbs"]

_CHANGES = ("upsert", "rows")


class KafkaVerbs(EndVerbs):
    """The end of a stream in a topic."""

    def write_kafka(
        self,
        topic: str,
        bootstrap_servers: str | Sequence[str],
        *,
        format: str = "json",  # noqa: A002 - what it is called
        columns: Sequence[str] | None = None,
        key: str | Sequence[str] | None = None,
        headers: Headers | None = None,
        partition: str | None = None,
        timestamp: str | None = None,
        schema: str | Mapping[str, Any] | None = None,
        schema_registry: str | SchemaRegistry | None = None,
        changes: str | None = None,
        guarantee: Guarantee | str = Guarantee.EXACTLY_ONCE,
        name: str | None = None,
        **options: Any,
    ) -> Self:
        """Send every row as a record to a topic.

        Args:
            topic: it has to exist.
            bootstrap_servers: ``host:port`` of some brokers, a list or separated by commas.
            format: of the value: ``"json"`` (an object; NaN is null, times as in ISO 8601), ``"csv"`` (a line without
                a header), ``"avro"``, or ``"raw"`` (one column of bytes or text as it is; null is a record without a
                value).
            columns: of the value, in this order; by default all that are not ``partition`` or ``headers``.
            key: one column of text or bytes is the key as it is; otherwise it is JSON, of one column its value, of
                several an object. Records of one key stay in order, in the partition that Java's default partitioner
                chooses (murmur2); those without a key are spread.
            headers: a column for each name (text or bytes as they are, else JSON; a null is left out), or one column
                that is a map of text to text or bytes.
            partition: a column of partition numbers; null leaves it to the partitioner.
            timestamp: the time of the record: a column of timestamps, dates or integer milliseconds since 1970; by
                default when it is sent.
            schema: for Avro: the schema of the values in Avro's JSON; by default one that is made of the columns.
            schema_registry: for Avro: the URL of a registry (or a `SchemaRegistry`, with credentials), where the schema
                is registered as one of the subject ``<topic>-value``; without it records are Avro and nothing else.
            changes: of a changelog, ``"upsert"`` (the default) sends the row that is valid from now on under its key,
                and a record without a value (a tombstone) when there is none any more, as a compacted topic has it;
                the key is that of the changelog. ``"rows"`` sends every row of the changelog with its column ``op``.
            guarantee: ``"exactly once"``: records are kept in the state, and become visible to readers that use
                ``read_committed`` when their checkpoint is committed. ``"at least once"``: sent at once; after a
                crash some are sent again.
            name: of the operator.
            options: further arguments of `operators.sinks.KafkaSink` or `operators.sinks.ImmediateKafkaSink`, among
                them ``transactional_id_prefix``, ``timeout_s`` and ``options``, the settings of librdkafka
                (credentials, say).

        Raises `SchemaError` if the columns do not fit.
        """
        split, rows, keys = None, self._schema, _names(key)
        if (how := _changes(changes, self._updates)) is not None and self._updates is not None:
            keys = _upsert_key(keys, self._updates)
            if self._updates.changelog and how == "upsert":
                split, rows = split_changelog, pa.schema([f for f in self._schema if f.name != OP])
        made = RecordColumns(
            format=format,
            columns=columns,
            key=keys,
            headers=headers,
            partition=partition,
            timestamp=timestamp,
            avro_schema=schema,
            registry=SchemaRegistry(schema_registry) if isinstance(schema_registry, str) else schema_registry,
            subject=f"{topic}-value",
        )
        try:
            RecordMaker(rows, made, bytes_max=1)
        except SchemaError as error:
            raise SchemaError(f"write_kafka: {error}") from None
        kind = ImmediateKafkaSink if Guarantee(guarantee) is Guarantee.AT_LEAST_ONCE else KafkaSink
        sink = kind(topic, bootstrap_servers, made, changes=split, **options)
        return self._end(sink, name, "kafka", topic)


def _names(key: str | Sequence[str] | None) -> list[str] | None:
    if key is None:
        return None
    return [key] if isinstance(key, str) else list(key)


def _changes(changes: str | None, updates: Updates | None) -> str | None:
    """How the corrections of a stream are sent; None where it makes none, or where its rows go as they are."""
    if changes is not None and changes not in _CHANGES:
        raise ValueError(f"write_kafka: changes must be one of {_CHANGES}, not {changes!r}")
    if changes == "upsert" and updates is None:
        raise SchemaError("write_kafka: changes='upsert' is for a changelog or upserts; this stream corrects nothing")
    return None if changes == "rows" or updates is None else "upsert"


def _upsert_key(given: list[str] | None, updates: Updates) -> list[str]:
    """Under any other key the record of a row would not replace the one before."""
    if given is not None and set(given) != set(updates.key):
        raise SchemaError(
            f"write_kafka: the key of upserts is that of the stream, {list(updates.key)} ({updates.because}), "
            f"not {given}; leave key= out, or send the changelog itself with changes='rows'"
        )
    return given or list(updates.key)
