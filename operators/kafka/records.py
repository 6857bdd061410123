"""Rows as records of Kafka: which columns make the key, the value, the headers, the partition and the time.

The records of a batch are a batch of their own (`RECORDS`), made by kernels when the rows arrive at the sink. So
what cannot become a record is an error before any checkpoint has it, and what a checkpoint has is sent as it is, also
by a later release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.encoders import AvroEncoder, CsvEncoder, JsonEncoder, RawEncoder, RowEncoder, as_bytes, json_text
from operators.encoders.base import plain, refuse
from operators.encoders.raw import is_bytes
from operators.errors import SchemaError
from operators.formats import SchemaRegistry

__all__ = ["RECORDS", "Headers", "RecordColumns", "RecordMaker"]

_HEADERS = pa.map_(pa.string(), pa.binary())

RECORDS = pa.schema(
    [
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("partition", pa.int32()),
        pa.field("timestamp_ms", pa.int64()),
        pa.field("headers", _HEADERS),
    ]
)
"""The columns of records. Null: no key; a tombstone; chosen by the partitioner; the time of sending; no headers."""

Headers: TypeAlias = str | Mapping[str, str]
"""A column that holds them (a map of text to text or bytes), or the column for each name."""

_FORMATS = ("avro", "csv", "json", "raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordColumns:
    """What becomes what.

    ``format``: of the value: json, csv, avro or raw. ``avro_schema``, ``registry`` and ``subject``: see `AvroEncoder`.
    ``columns``: of the value, in their order; None for all that are not
    ``partition`` or ``headers``. ``key``: one column of text or bytes is the key as it is; else the key is JSON: of
    one column its value, of several an object. ``headers``: see `Headers`. ``partition``: a column of integers, null
    for the partitioner. ``timestamp``: a time, or milliseconds since 1970.
    """

    format: str = "json"
    columns: Sequence[str] | None = None
    key: Sequence[str] | None = None
    headers: Headers | None = None
    partition: str | None = None
    timestamp: str | None = None
    avro_schema: str | Mapping[str, Any] | None = None
    registry: SchemaRegistry | None = None
    subject: str = ""

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ValueError(f"format must be one of {_FORMATS}, not {self.format!r}")
        if self.format != "avro" and (self.avro_schema is not None or self.registry is not None):
            raise ValueError("schema= and schema_registry= are for format='avro'")

    def value_columns(self, schema: pa.Schema) -> list[str]:
        """The columns of the value."""
        if self.columns is not None:
            return list(self.columns)
        headers = [self.headers] if isinstance(self.headers, str) else list((self.headers or {}).values())
        others = {self.partition, *headers}
        return [name for name in schema.names if name not in others]


class RecordMaker:
    """Makes records of the rows of one schema; `SchemaError` if the columns do not fit.

    ``bytes_max``: of a record; a larger one is an error that names the row.
    """

    def __init__(self, schema: pa.Schema, columns: RecordColumns, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._value_columns = columns.value_columns(schema)
        self._columns = columns
        value_schema = pa.schema([_field(schema, name, "columns") for name in self._value_columns])
        self._encoder = _encoder(columns, value_schema)
        self._keys = None if columns.key is None else _KeyMaker(schema, columns.key)
        self._headers = None if columns.headers is None else _HeaderMaker(schema, columns.headers)
        if columns.partition is not None and not pa.types.is_integer(
            _field(schema, columns.partition, "partition").type
        ):
            raise SchemaError(f"partition={columns.partition!r}: not a column of integers")
        if columns.timestamp is not None:
            _check_time(_field(schema, columns.timestamp, "timestamp"))

    def make(self, batch: pa.RecordBatch, tombstones: pa.Array | None = None) -> pa.RecordBatch:
        """The record of every row. ``tombstones``: which of them say that their key is no more."""
        rows = batch.num_rows
        value = self._encoder.encode(batch.select(self._value_columns))
        if tombstones is not None:
            value = pc.if_else(tombstones, pa.scalar(None, pa.binary()), value)
        columns = [
            pa.nulls(rows, pa.binary()) if self._keys is None else self._keys.make(batch),
            value,
            self._partition(batch),
            self._timestamp(batch),
            pa.nulls(rows, _HEADERS) if self._headers is None else self._headers.make(batch),
        ]
        records = pa.RecordBatch.from_arrays(columns, schema=RECORDS)
        self._check_sizes(records)
        return records

    def _partition(self, batch: pa.RecordBatch) -> pa.Array:
        if self._columns.partition is None:
            return pa.nulls(batch.num_rows, pa.int32())
        wanted = batch.column(self._columns.partition)
        if wanted.null_count < len(wanted) and pc.min(wanted).as_py() < 0:
            row = pc.index(pc.less(wanted, 0), True).as_py()
            raise SchemaError(f"partition={self._columns.partition!r}: {wanted[row].as_py()} in row {row} is negative")
        return wanted.cast(pa.int32())

    def _timestamp(self, batch: pa.RecordBatch) -> pa.Array:
        """Times before 1970 are none to Kafka."""
        if self._columns.timestamp is None:
            return pa.nulls(batch.num_rows, pa.int64())
        column = batch.column(self._columns.timestamp)
        if not pa.types.is_integer(column.type):
            column = column.cast(pa.timestamp("ms", getattr(column.type, "tz", None)), safe=False)
        millis = column.cast(pa.int64())
        return pc.if_else(pc.greater_equal(millis, 0), millis, pa.scalar(None, pa.int64()))

    def _check_sizes(self, records: pa.RecordBatch) -> None:
        sizes = pc.add(*(pc.fill_null(pc.binary_length(records.column(name)), 0) for name in ("key", "value")))
        largest = pc.max(sizes).as_py() or 0
        if largest > self._bytes_max:
            row = pc.index(sizes, pa.scalar(largest, sizes.type)).as_py()
            shown = describe_record(records.column("key")[row].as_py(), records.column("value")[row].as_py())
            raise SchemaError(
                f"the record of row {row} of a batch is too large ({largest} of {self._bytes_max} bytes): {shown}; "
                "raise it with options={'message.max.bytes': ...}, and max.message.bytes of the topic, or write less"
            )


def _encoder(columns: RecordColumns, schema: pa.Schema) -> RowEncoder:
    match columns.format:
        case "avro":
            return AvroEncoder(schema, columns.avro_schema, columns.registry, columns.subject)
        case "csv":
            return CsvEncoder(schema)
        case "raw":
            return RawEncoder(schema)
    return JsonEncoder(schema)


class _KeyMaker:
    def __init__(self, schema: pa.Schema, names: Sequence[str]) -> None:
        fields = [_field(schema, name, "key") for name in names]
        self._names = list(names)
        self._plain = len(fields) == 1 and is_bytes(fields[0].type)
        if not self._plain:
            for field in fields:
                if refuse(field.type):
                    raise SchemaError(f"key: column {field.name!r} of type {field.type} is no JSON; turn it into text")
        self._encoder = None if len(fields) == 1 else JsonEncoder(pa.schema(fields))

    def make(self, batch: pa.RecordBatch) -> pa.Array:
        if self._encoder is not None:
            return self._encoder.encode(batch.select(self._names))
        column = batch.column(self._names[0])
        return as_bytes(column) if self._plain else _json_or_null(column)


class _HeaderMaker:
    def __init__(self, schema: pa.Schema, headers: Headers) -> None:
        self._headers = headers
        if isinstance(headers, str):
            kind = _field(schema, headers, "headers").type
            if not (pa.types.is_map(kind) and pa.types.is_string(kind.key_type) and is_bytes(kind.item_type)):
                raise SchemaError(f"headers={headers!r}: not a map of text to text or bytes but {kind}")
        else:
            for name in headers.values():
                field = _field(schema, name, "headers")
                if not is_bytes(field.type) and refuse(field.type):
                    raise SchemaError(f"headers: column {name!r} of type {field.type} is no JSON; turn it into text")

    def make(self, batch: pa.RecordBatch) -> pa.Array:
        """A header whose column is null is left out."""
        if isinstance(self._headers, str):
            return batch.column(self._headers).cast(_HEADERS)
        rows, count = batch.num_rows, len(self._headers)
        columns = [self._bytes(batch.column(name)) for name in self._headers.values()]
        order = (np.arange(rows)[:, None] + rows * np.arange(count)[None, :]).ravel()
        values = pa.concat_arrays(columns).take(pa.array(order))
        present = values.is_valid().to_numpy(zero_copy_only=False)
        names = pa.array(list(self._headers), pa.string()).take(pa.array(np.tile(np.arange(count), rows)[present]))
        ends = np.cumsum(present.reshape(rows, count).sum(axis=1))
        offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
        return pa.MapArray.from_arrays(offsets, names, values.filter(pa.array(present)), type=_HEADERS)

    def _bytes(self, column: pa.Array) -> pa.Array:
        return as_bytes(column) if is_bytes(column.type) else _json_or_null(column)


def describe_record(key: bytes | None, value: bytes | None) -> str:
    """A record for people, cut short."""
    return f"key {_shown(key)}, value {_shown(value)}"


def _shown(data: bytes | None) -> str:
    if data is None:
        return "none"
    text = data[:60].decode("utf-8", "backslashreplace")
    return repr(text + "..." if len(data) > 60 else text)


def _json_or_null(column: pa.Array) -> pa.Array:
    text = json_text(plain(column))
    return pc.if_else(column.is_valid(), text, pa.scalar(None, pa.string())).cast(pa.binary())


def _field(schema: pa.Schema, name: Any, argument: str) -> pa.Field:
    if name not in schema.names:
        raise SchemaError(f"{argument}: no column {name!r}; there are {', '.join(schema.names)}")
    return schema.field(name)


def _check_time(field: pa.Field) -> None:
    kind = field.type
    if not (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_integer(kind)):
        raise SchemaError(f"timestamp={field.name!r}: neither a time nor integer milliseconds since 1970 but {kind}")
