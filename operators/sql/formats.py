"""STORED AS: which source reads a table's location, and which sink writes there, with the options of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from operators.errors import SchemaError, UnsupportedQueryError
from operators.sinks import ArrowSink, CsvSink, FileSink, JsonSink, ParquetSink
from operators.sources import ArrowSource, CsvSource, Follow, JsonSource, KafkaSource, ParquetSource, Source
from operators.sql.options import Options
from operators.stream import DataStream

__all__ = ["End", "Place", "end_at", "source_at"]

End: TypeAlias = Callable[[DataStream, str], object]
"""Ends a stream in a sink, of this operator id."""

_ROLL_ROWS, _ROLL_MS = 1_000_000, 60_000
_KAFKA = "kafka."


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a definition says of where rows are. ``columns``: as declared, with those of ``partition_by`` if they are.

    ``follow``: for ever, also what comes after the job began.
    """

    stored_as: str
    location: str
    columns: pa.Schema | None
    partition_by: tuple[str, ...]
    follow: bool = False


def source_at(place: Place, options: Options) -> Source:
    """A source; raises `UnsupportedQueryError` for a format that is not read as a stream."""
    if place.stored_as not in _SOURCES:
        raise UnsupportedQueryError(
            f"STORED AS {place.stored_as}",
            f"streams are read from {', '.join(_SOURCES)}; of DataFusion's other formats tables can be made, "
            "OPTIONS ('mode' 'static')",
        )
    return _SOURCES[place.stored_as](place, options)


def end_at(place: Place, options: Options) -> End:
    """What ends a stream there; raises `UnsupportedQueryError` for a format that is not written."""
    if place.stored_as == "KAFKA":
        return _to_kafka(place, options)
    if place.stored_as not in _SINKS:
        raise UnsupportedQueryError(f"a sink STORED AS {place.stored_as}", f"it may be {', '.join(_SINKS)} or KAFKA")
    make, own = _SINKS[place.stored_as]
    sink = make(
        place.location,
        place.partition_by,
        roll_rows=options.count("roll_rows", _ROLL_ROWS),
        roll_seconds=options.span("roll_interval", _ROLL_MS) / 1000,
        existing=options.word("existing", ("error", "append"), "error"),
        storage_options=options.storage(),
        **own(options),
    )
    return lambda stream, name: stream.sink(sink, name=name)


# -- files


def _of_files(place: Place, options: Options) -> dict[str, Any]:
    """`FileOptions`."""
    follow: bool | Follow = False
    if place.follow:
        follow = Follow(
            order="name" if options.word("follow_order", ("name", "time"), "name") == "name" else "time",
            poll_seconds=options.span("poll_interval", 1000) / 1000,
            settle_seconds=options.span("settle_interval", 0) / 1000,
        )
    declared = place.columns
    kinds = {name: pa.string() if declared is None else declared.field(name).type for name in place.partition_by}
    return {
        "follow": follow,
        "partitions": kinds,
        "schema_drift": options.word("schema_drift", ("error", "widen", "ignore_extra"), "error"),
        "storage_options": options.storage(),
    }


def _in_files(place: Place) -> pa.Schema | None:
    """The declared columns but those in the names of directories."""
    if place.columns is None:
        return None
    if missing := set(place.partition_by) - set(place.columns.names):
        raise SchemaError(f"PARTITIONED BY {min(missing)}: declare it among the columns too")
    return pa.schema([field for field in place.columns if field.name not in place.partition_by])


def _picked(place: Place) -> dict[str, Any]:
    """Which columns to read of files that have types of their own."""
    columns = _in_files(place)
    if place.follow:  # there may be no file yet
        return {"schema": columns}
    return {"columns": None if columns is None else columns.names}


def _parquet(place: Place, options: Options) -> Source:
    rows, order = options.count("batch_rows", 65_536), options.text("order_by", None)
    return ParquetSource(place.location, batch_rows=rows, order_by=order, **_picked(place), **_of_files(place, options))


def _arrow(place: Place, options: Options) -> Source:
    rows = options.count("batch_rows", 65_536)
    return ArrowSource(place.location, batch_rows=rows, **_picked(place), **_of_files(place, options))


def _csv(place: Place, options: Options) -> Source:
    return CsvSource(
        place.location,
        _in_files(place),
        delimiter=options.text("delimiter", ","),
        newlines_in_values=options.flag("newlines_in_values", default=False),
        **_of_files(place, options),
    )


def _json(place: Place, options: Options) -> Source:
    return JsonSource(place.location, _in_files(place), **_of_files(place, options))


# -- Kafka


def _kafka(place: Place, options: Options) -> Source:
    if place.partition_by:
        raise UnsupportedQueryError("PARTITIONED BY of a topic", "name the column partition in 'metadata'")
    servers, metadata = _servers(options), options.words("metadata")
    declared = place.columns
    values = None if declared is None else pa.schema([field for field in declared if field.name not in metadata])
    return KafkaSource(
        [topic.strip() for topic in place.location.split(",")],
        servers,
        format=options.word("format", ("json", "csv", "avro", "raw", "text"), "json"),
        schema_registry=options.text("schema_registry", None),
        schema=values,
        metadata=metadata,
        start=options.word("start", ("earliest", "latest"), "earliest"),
        end=None if place.follow else "latest",
        isolation=options.word("isolation", ("read_committed", "read_uncommitted"), "read_committed"),
        on_data_loss=options.word("on_data_loss", ("error", "skip"), "error"),
        group_id=options.text("group_id", None),
        options=options.below(_KAFKA),
    )


def _to_kafka(place: Place, options: Options) -> End:
    if place.partition_by:
        raise UnsupportedQueryError("PARTITIONED BY of a topic", "name the column of partition numbers in 'partition'")
    servers = _servers(options)
    arguments: dict[str, Any] = {
        "format": options.word("format", ("json", "csv", "raw"), "json"),
        "key": options.words("key") or None,
        "partition": options.text("partition", None),
        "timestamp": options.text("timestamp", None),
        "guarantee": options.word("guarantee", ("exactly once", "at least once"), "exactly once"),
        "options": options.below(_KAFKA),
    }
    changes = options.word("changes", ("upsert", "rows"), "upsert")

    def end(stream: DataStream, name: str) -> None:
        of_changes = {} if stream.updates is None else {"changes": changes}
        stream.write_kafka(place.location, servers, name=name, **arguments, **of_changes)

    return end


def _servers(options: Options) -> str:
    servers = options.text("bootstrap_servers", None)
    if servers is None:
        raise SchemaError("STORED AS KAFKA: say OPTIONS ('bootstrap_servers' 'host:port')")
    return servers


_SOURCES: Mapping[str, Callable[[Place, Options], Source]] = {
    "PARQUET": _parquet,
    "CSV": _csv,
    "JSON": _json,
    "ARROW": _arrow,
    "KAFKA": _kafka,
}


# -- sinks


def _compressed(options: Options, default: str, *codecs: str) -> dict[str, Any]:
    return {"compression": options.word("compression", codecs, default)}


_Own: TypeAlias = Callable[[Options], dict[str, Any]]

_SINKS: Mapping[str, tuple[Callable[..., FileSink], _Own]] = {
    "PARQUET": (
        ParquetSink,
        lambda o: _compressed(o, "zstd", "none", "snappy", "gzip", "brotli", "lz4", "zstd"),
    ),
    "CSV": (
        CsvSink,
        lambda o: {**_compressed(o, "none", "none", "gzip", "zstd"), "delimiter": o.text("delimiter", ",")},
    ),
    "JSON": (JsonSink, lambda o: _compressed(o, "none", "none", "gzip", "zstd")),
    "ARROW": (ArrowSink, lambda o: _compressed(o, "zstd", "none", "lz4", "zstd")),
}
