"""CREATE EXTERNAL TABLE: a stream, a table of rows that are there, or a sink.

The option ``mode`` tells which. ``bounded`` reads what is there, as a stream that ends, ``follow`` also what comes
later, for ever; ``static`` reads all rows at once, as DataFusion does, into a table to join streams with; ``sink`` is
what INSERT INTO writes to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import pyarrow as pa
from datafusion import SessionContext

from operators.errors import SchemaError
from operators.graph import derived_id
from operators.reading import ReadOptions
from operators.sql.formats import End, Place, end_at, source_at
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
    FOLLOW = "follow"
    STATIC = "static"
    SINK = "sink"


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkTable:
    """What INSERT INTO writes to. ``final``: rows that are corrected are written once, as they are in the end."""

    name: str
    columns: pa.Schema
    end: End
    final: bool


def define(context: StreamContext, session: SessionContext, table: CreateTable) -> DataStream | pa.Table | SinkTable:
    """What the definition says; nothing of a sink is touched before its job is run.

    Raises `SchemaError` for options and columns that do not fit, `BadInputError` for files that are not there.
    """
    options = Options(f"table {table.name}", table.options, session)
    mode = Mode(options.word(_MODE, list(Mode), Mode.BOUNDED))
    place = Place(
        stored_as=table.stored_as,
        location=table.location,
        columns=table.columns,
        partition_by=table.partition_by,
        follow=mode is Mode.FOLLOW,
    )
    match mode:
        case Mode.STATIC:
            return _rows(session, table)
        case Mode.SINK:
            if table.columns is None:
                raise SchemaError(
                    f"table {table.name}: a sink needs its columns, … {table.name} (column TYPE, …) STORED AS …; "
                    f"without them say COPY (SELECT …) TO '{table.location}' STORED AS {table.stored_as}"
                )
            final, end = _end(place, options)
            return SinkTable(name=table.name, columns=table.columns, end=end, final=final)
        case _:
            return _stream(context, table, place, options)


def sink_of_copy(session: SessionContext, copy: Copy, columns: pa.Schema) -> SinkTable:
    """The sink that a COPY writes to."""
    options = Options(f"COPY TO {copy.location}", copy.options, session)
    place = Place(stored_as=copy.stored_as, location=copy.location, columns=columns, partition_by=copy.partition_by)
    final, end = _end(place, options)
    return SinkTable(name=copy.location, columns=columns, end=end, final=final)


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


def _stream(context: StreamContext, table: CreateTable, place: Place, options: Options) -> DataStream:
    read = ReadOptions(
        event_time=options.text("event_time", None),
        max_disorder=options.span("watermark_delay", 0),
        idle_timeout=options.span("idle_timeout", None),
        max_drift=options.span("max_drift", None),
        future_limit=options.span("future_limit", _DAY_MS),
        on_bad_event_time=options.word("bad_event_time", ("error", "drop"), "error"),
        max_rows_per_second=options.number("max_rows_per_second"),
        name=derived_id(table.name),
    )
    try:
        source = source_at(place, options)
        options.close()
        stream = context.from_source(source, **read)
    except ValueError as error:
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


def _end(place: Place, options: Options) -> tuple[bool, End]:
    """Whether a sink wants final rows, and what ends a stream in it."""
    final = options.word("emit", ("changelog", "final"), "changelog") == "final"
    end = end_at(place, options)
    options.close()
    return final, end
