"""CREATE EXTERNAL TABLE: a stream, a table of rows that are there, or a sink.

The option ``mode`` tells which. ``bounded`` reads the files that are there, as a stream that ends; ``static`` reads
them at once, as DataFusion does, into a table to join streams with; ``sink`` is what INSERT INTO writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datafusion import SessionContext

from operators.errors import SchemaError, UnsupportedQueryError
from operators.graph import derived_id
from operators.sinks import ParquetSink
from operators.sinks.base import Sink
from operators.sources import CsvSource, ParquetSource, Source
from operators.sql.options import Options
from operators.sql.statements import Copy, CreateTable, without_options
from operators.stream import DataStream

if TYPE_CHECKING:
    from operators.context import StreamContext

__all__ = ["Mode", "SinkTable", "define", "sink_of_copy"]

_MODE = "mode"
_DAY_MS = 86_400_000


class Mode(StrEnum):
    """What a table is; see the module."""

    BOUNDED = "bounded"
    STATIC = "static"
    SINK = "sink"


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkTable:
    """What INSERT INTO writes to. ``final``: rows that are corrected are written once, as they are in the end."""

    name: str
    columns: pa.Schema
    sink: Sink
    final: bool


def define(context: StreamContext, session: SessionContext, table: CreateTable) -> DataStream | pa.Table | SinkTable:
    """What the definition says; nothing of a sink is touched before its job is run.

    Raises `SchemaError` for options and columns that do not fit, `BadInputError` for files that are not there.
    """
    options = Options(f"table {table.name}", table.options, session)
    match Mode(options.word(_MODE, list(Mode), Mode.BOUNDED)):
        case Mode.STATIC:
            return _rows(session, table)
        case Mode.SINK:
            if table.columns is None:
                raise SchemaError(
                    f"table {table.name}: a sink needs its columns, … {table.name} (column TYPE, …) STORED AS …; "
                    f"without them say COPY (SELECT …) TO '{table.location}' STORED AS {table.stored_as}"
                )
            final, sink = _sink(table.stored_as, table.location, table.partition_by, options)
            return SinkTable(name=table.name, columns=table.columns, sink=sink, final=final)
        case _:
            return _stream(context, table, options)


def sink_of_copy(session: SessionContext, copy: Copy, columns: pa.Schema) -> SinkTable:
    """The sink that a COPY writes to."""
    options = Options(f"COPY TO {copy.location}", copy.options, session)
    final, sink = _sink(copy.stored_as, copy.location, copy.partition_by, options)
    return SinkTable(name=copy.location, columns=columns, sink=sink, final=final)


# -- tables


def _rows(session: SessionContext, table: CreateTable) -> pa.Table:
    reader = SessionContext()
    reader.sql("SET datafusion.execution.parquet.schema_force_view_types = false")
    try:
        reader.execute_logical_plan(without_options(session, table, frozenset({_MODE})))
        return reader.table('"' + table.name.replace('"', '""') + '"').to_arrow_table()
    except Exception as error:  # the binding raises bare exceptions
        raise SchemaError(f"table {table.name}: {str(error).removeprefix('DataFusion error: ')}") from error


# -- streams


def _parquet(table: CreateTable, options: Options) -> Source:
    return ParquetSource(
        table.location,
        None if table.columns is None else table.columns.names,
        batch_rows=options.count("batch_rows", 65_536),
        order_by=options.text("order_by", None),
        storage_options=options.storage(),
    )


def _csv(table: CreateTable, options: Options) -> Source:
    return CsvSource(
        table.location,
        table.columns,
        delimiter=options.text("delimiter", ","),
        newlines_in_values=options.flag("newlines_in_values", default=False),
        storage_options=options.storage(),
    )


_SOURCES: Mapping[str, Callable[[CreateTable, Options], Source]] = {"PARQUET": _parquet, "CSV": _csv}


def _stream(context: StreamContext, table: CreateTable, options: Options) -> DataStream:
    if table.stored_as not in _SOURCES:
        raise UnsupportedQueryError(
            f"STORED AS {table.stored_as}",
            f"a stream is read from {', '.join(_SOURCES)}; of DataFusion's others only tables can be made, "
            "OPTIONS ('mode' 'static')",
        )
    if table.partition_by:
        raise UnsupportedQueryError(
            f"PARTITIONED BY of the stream {table.name}",
            "columns in the names of directories are not read; leave it out",
        )
    event_time = options.text("event_time", None)
    read: dict[str, Any] = {"event_time": event_time, "max_disorder": options.span("watermark_delay", 0)}
    read["idle_timeout"] = options.span("idle_timeout", None)
    read["max_drift"] = options.span("max_drift", None)
    read["future_limit"] = options.span("future_limit", _DAY_MS)
    read["on_bad_event_time"] = options.word("bad_event_time", ("error", "drop"), "error")
    source = _SOURCES[table.stored_as](table, options)
    options.close()
    try:
        stream = context.from_source(source, name=derived_id(table.name), **read)
    except (ValueError, SchemaError) as error:
        raise SchemaError(f"table {table.name}: {error}") from error
    return _as_declared(table, stream)


def _as_declared(table: CreateTable, stream: DataStream) -> DataStream:
    """The stream with columns of the declared types."""
    declared = stream.schema if table.columns is None else table.columns
    other = {field.name: field.type for field in declared if stream.schema.field(field.name).type != field.type}
    if stream.event_time in other:
        found = stream.schema.field(stream.event_time).type
        raise SchemaError(
            f"table {table.name}: the event time {stream.event_time!r} is {found}, and is declared as "
            f"{other[stream.event_time]}; declare what it is (TIMESTAMP(3) has milliseconds), or leave the columns out"
        )
    return stream.cast(other) if other else stream


# -- sinks


def _parquet_sink(location: str, partition_by: tuple[str, ...], options: Options) -> Sink:
    return ParquetSink(
        location,
        partition_by,
        roll_rows=options.count("roll_rows", 1_000_000),
        roll_seconds=options.span("roll_interval", 60_000) / 1000,
        compression=options.text("compression", "zstd"),
        existing=options.word("existing", ("error", "append"), "error"),
        storage_options=options.storage(),
    )


_SINKS: Mapping[str, Callable[[str, tuple[str, ...], Options], Sink]] = {"PARQUET": _parquet_sink}


def _sink(stored_as: str, location: str, partition_by: tuple[str, ...], options: Options) -> tuple[bool, Sink]:
    if stored_as not in _SINKS:
        raise UnsupportedQueryError(f"a sink STORED AS {stored_as}", f"there are {', '.join(_SINKS)}")
    final = options.word("emit", ("changelog", "final"), "changelog") == "final"
    sink = _SINKS[stored_as](location, partition_by, options)
    options.close()
    return final, sink
