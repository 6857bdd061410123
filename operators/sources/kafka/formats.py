"""What a user says about the format of values, made a `Format`; columns inferred from samples if they are not said."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from operators.errors import BadInputError, SchemaError, SourceUnavailableError
from operators.formats import AvroFormat, CsvFormat, Format, JsonFormat, RawFormat, SchemaRegistry, infer_json
from operators.kafka import (
    ClusterDownError,
    Fault,
    KafkaCluster,
    KafkaSettings,
    fault_of,
    kafka,
    librdkafka_logger,
    make_client,
)

__all__ = ["format_of"]

_SAMPLES = 1000
_SAMPLING_S = 10.0


def format_of(
    given: str | Format,
    schema: pa.Schema | str | bytes | Mapping[str, Any] | None,
    topics: Sequence[str],
    settings: KafkaSettings,
    registry: SchemaRegistry | None,
) -> Format:
    """The format; raises `SchemaError` if its columns are not known, and what `sample` and the registry raise."""
    if registry is not None and given != "avro":
        raise ValueError("schema_registry: it is for format='avro'")
    if not isinstance(given, str):
        return given
    if given == "avro":
        return _avro(schema, topics, registry)
    if given in ("raw", "text"):
        if schema is not None:
            raise SchemaError(f"read_kafka: format {given!r} has one column, 'value'; it takes no schema")
        return RawFormat(text=given == "text")
    if given == "json":
        if isinstance(schema, pa.Schema):
            return JsonFormat(schema)
        if schema is None:
            return JsonFormat(infer_json(sample(topics, settings)))
        text = json.dumps(schema) if isinstance(schema, Mapping) else schema
        return JsonFormat(infer_json([text.encode() if isinstance(text, str) else text]))
    if given == "csv":
        if not isinstance(schema, pa.Schema):
            raise SchemaError("read_kafka: format 'csv' needs schema=, the columns in their order")
        return CsvFormat(schema)
    raise ValueError(f"format: {given!r} is not one of json, csv, avro, raw, text")


def _avro(
    schema: pa.Schema | str | bytes | Mapping[str, Any] | None, topics: Sequence[str], registry: SchemaRegistry | None
) -> Format:
    if schema is None:
        if registry is None:
            raise SchemaError("read_kafka: format 'avro' needs schema= or schema_registry=")
        schema = registry.latest(f"{topics[0]}-value")
    return AvroFormat(schema.decode() if isinstance(schema, bytes) else schema, registry)


def sample(topics: Sequence[str], settings: KafkaSettings) -> list[bytes]:
    """The values of the first records of the topics.

    Raises `BadInputError` if there are none, `SourceUnavailableError` if nobody answers.
    """
    hint = "give schema=, or one sample message as schema="
    config = settings.config(
        {"group.id": f"sample-{uuid.uuid4().hex}", "enable.auto.commit": False, "enable.partition.eof": True}
    )
    try:
        found = KafkaCluster(settings, threading.Event()).topics(topics)
    except ClusterDownError as error:
        raise SourceUnavailableError(
            f"the Kafka cluster at {settings.servers} does not answer ({error}): no columns can be inferred; {hint}"
        ) from None
    if missing := [topic for topic, info in found.items() if info is None]:
        raise BadInputError(f"topic {missing[0]!r}: there is none of that name at {settings.servers}; {hint}")
    places = [(topic, number) for topic, info in found.items() if info is not None for number in info.partitions]
    consumer = make_client(settings, lambda: kafka().Consumer(config, logger=librdkafka_logger))
    try:
        first = kafka().OFFSET_BEGINNING
        consumer.assign([kafka().TopicPartition(topic, number, first) for topic, number in places])
        values: list[bytes] = []
        ended = 0
        deadline = time.monotonic() + _SAMPLING_S
        while len(values) < _SAMPLES and ended < len(places) and time.monotonic() < deadline:
            for message in consumer.consume(_SAMPLES, 0.1):
                if message.error() is None:
                    values += [message.value()] if message.value() is not None else []
                elif fault_of(message.error()) is Fault.END:
                    ended += 1
    finally:
        consumer.close()
    if not values:
        raise BadInputError(f"topics {', '.join(topics)}: no record to infer columns from; {hint}")
    return values[:_SAMPLES]
