"""Rows as Avro records, made a column at a time.

An Avro record is its fields one after the other, so every column becomes a column of bytes, and those of a row are
joined. The schema is given, or made of the columns (`avro_schema`): every nullable one is a union with null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.encoders.base import plain
from operators.errors import SchemaError
from operators.formats.avro_types import (
    AvroArray,
    AvroEnum,
    AvroFixed,
    AvroMap,
    AvroPrimitive,
    AvroRecord,
    AvroType,
    AvroUnion,
    parse_avro,
)
from operators.formats.registry import SchemaRegistry

__all__ = ["AvroEncoder", "avro_schema"]

_MARK = b"\x00"
_TEXT = AvroPrimitive("string", pa.string())
_DECIMAL_BYTES = 16
_TIMES = {"ms": "millis", "us": "micros", "ns": "nanos"}


class AvroEncoder:
    """One Avro record for each row.

    ``declared``: the schema in Avro's JSON, None for `avro_schema`; its fields are the columns of the same names.
    ``registry``: each record begins with a zero byte and the number under which the registry knows the schema as one
    of ``subject``; it is registered when the first rows come.
    """

    def __init__(
        self,
        schema: pa.Schema,
        declared: str | Mapping[str, Any] | None = None,
        registry: SchemaRegistry | None = None,
        subject: str = "",
    ) -> None:
        declared = avro_schema(schema) if declared is None else declared
        self._text = declared if isinstance(declared, str) else json.dumps(declared)
        self._record = parse_avro(self._text)
        for field in self._record.fields:
            if field.name not in schema.names:
                raise SchemaError(f"format 'avro': field {field.name!r} is no column; there are {schema.names}")
        self._register = None if registry is None else lambda: registry.register(subject, self._text)
        self._head: bytes | None = None

    def encode(self, batch: pa.RecordBatch) -> pa.Array:
        """See `RowEncoder`. Raises `SchemaError` for a value that its field cannot hold."""
        parts: list[pa.Array | bytes] = [self._begin()]
        for field in self._record.fields:
            column = plain(batch.column(field.name))
            try:
                encoded = _encode(column, field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SchemaError(f"format 'avro': column {field.name!r} does not fit its field: {error}") from error
            if encoded.null_count:
                raise SchemaError(f"format 'avro': column {field.name!r} has a null or a value that its field has not")
            parts.append(encoded)
        if len(parts) == 1:
            parts.append(pa.repeat(pa.scalar(b"", pa.binary()), batch.num_rows))
        return _join(*parts)

    def _begin(self) -> bytes:
        if self._head is None:
            self._head = b"" if self._register is None else _MARK + self._register().to_bytes(4, "big")
        return self._head


def avro_schema(schema: pa.Schema, name: str = "row") -> dict[str, Any]:
    """The schema of records with these columns. Raises `SchemaError` for a type that Avro has not."""
    return _record_type(list(schema), name)


def _record_type(fields: list[pa.Field], name: str) -> dict[str, Any]:
    made = []
    for field in fields:
        kind = _type_of(field.type, f"{name}_{field.name}")
        made.append({"name": field.name, "type": kind if not field.nullable or kind == "null" else ["null", kind]})
    return {"type": "record", "name": name, "fields": made}


def _type_of(kind: pa.DataType, name: str) -> Any:
    if pa.types.is_dictionary(kind):
        return _type_of(kind.value_type, name)
    if pa.types.is_struct(kind):
        return _record_type([kind.field(i) for i in range(kind.num_fields)], name)
    if pa.types.is_map(kind):
        if not pa.types.is_string(kind.key_type):
            raise SchemaError(f"format 'avro': maps have keys of text, not {kind.key_type}")
        return {"type": "map", "values": ["null", _type_of(kind.item_type, f"{name}_value")]}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return {"type": "array", "items": ["null", _type_of(kind.value_type, f"{name}_item")]}
    for holds, declared in _SCALARS:
        if holds(kind):
            return declared(kind) if callable(declared) else declared
    raise SchemaError(f"format 'avro' has no {kind}: cast column {name.removeprefix('row_')!r} to another type")


def _logical(base: str, name: str, **more: Any) -> dict[str, Any]:
    return {"type": base, "logicalType": name, **more}


def _timestamp(kind: pa.DataType) -> dict[str, Any]:
    local = "local-" if kind.tz is None else ""
    return _logical("long", f"{local}timestamp-{_TIMES['ms' if kind.unit == 's' else kind.unit]}")


def _time(kind: pa.DataType) -> dict[str, Any]:
    return _logical("int", "time-millis") if pa.types.is_time32(kind) else _logical("long", "time-micros")


_SCALARS: tuple[tuple[Callable[[pa.DataType], bool], Any], ...] = (
    (pa.types.is_null, "null"),
    (pa.types.is_boolean, "boolean"),
    (lambda kind: kind in (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16()), "int"),
    (pa.types.is_integer, "long"),
    (lambda kind: kind in (pa.float16(), pa.float32()), "float"),
    (pa.types.is_float64, "double"),
    (pa.types.is_decimal128, lambda kind: _logical("bytes", "decimal", precision=kind.precision, scale=kind.scale)),
    (pa.types.is_date, _logical("int", "date")),
    (pa.types.is_time, _time),
    (pa.types.is_timestamp, _timestamp),
    (lambda kind: kind in (pa.string(), pa.large_string(), pa.string_view()), "string"),
    (lambda kind: kind in (pa.binary(), pa.large_binary(), pa.binary_view()), "bytes"),
    (pa.types.is_fixed_size_binary, "bytes"),
)


def _encode(column: pa.Array, kind: AvroType) -> pa.Array:
    """The bytes of every value; null where there is none."""
    match kind:
        case AvroUnion():
            return _union(column, kind)
        case AvroRecord():
            children = dict(zip([f.name for f in column.type], column.flatten(), strict=True))
            parts = [_encode(plain(children[f.name]), f.type) for f in kind.fields]
            return _where_valid(column, _join(*parts) if parts else _repeat(b"", len(column)))
        case AvroArray():
            lists = column.cast(pa.list_(column.type.value_type))
            return _blocks(lists, _encode(plain(lists.flatten()), kind.items))
        case AvroMap():
            entry = pa.struct([("key", column.type.key_type), ("value", column.type.item_type)])
            lists = column.cast(pa.list_(entry))
            keys, items = lists.flatten().flatten()
            return _blocks(lists, _join(_encode(plain(keys), _TEXT), _encode(plain(items), kind.values)))
        case AvroEnum():
            numbers = pc.index_in(column.cast(pa.string()), pa.array(kind.symbols, pa.string()))
            return _where_valid(numbers, _longs(pc.fill_null(numbers, 0)))
        case AvroFixed():
            if pa.types.is_decimal(kind.arrow):
                raise pa.ArrowNotImplementedError("decimals of fixed size are not written; use bytes")
            return column.cast(pa.binary(kind.size)).cast(pa.binary())
        case AvroPrimitive(name="null"):
            return _repeat(b"", len(column))
        case AvroPrimitive():
            return _where_valid(column, _primitive(column.cast(kind.arrow), kind))


def _union(column: pa.Array, kind: AvroUnion) -> pa.Array:
    if kind.null is None:
        return _join(_varint(0), _encode(column, kind.inner))
    some = _join(_varint(1 - kind.null), _encode(column, kind.inner))
    # What is null although the column is not stays so, and is refused.
    return pc.if_else(column.is_valid(), some, pa.scalar(_varint(kind.null), pa.binary()))


def _primitive(column: pa.Array, kind: AvroPrimitive) -> pa.Array:
    """What is written for a null does not matter."""
    match kind.name:
        case "boolean":
            return _cells(pc.fill_null(column, False).to_numpy(zero_copy_only=False).astype(np.uint8))
        case "int" | "long":
            return _longs(pc.fill_null(column.view(pa.int64() if kind.name == "long" else pa.int32()), 0))
        case "float" | "double":
            return _cells(pc.fill_null(column, 0.0).to_numpy().astype("<f4" if kind.name == "float" else "<f8"))
    if pa.types.is_decimal(column.type):
        return _join(_varint(_DECIMAL_BYTES), _decimals(column))
    raw = column.cast(pa.binary())
    return _join(_longs(pc.fill_null(pc.binary_length(raw), 0)), raw)


def _decimals(column: pa.Array) -> pa.Array:
    """Sixteen bytes in two's complement, the highest first."""
    data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * _DECIMAL_BYTES, column.offset * _DECIMAL_BYTES)
    return _cells(np.ascontiguousarray(data.reshape(-1, _DECIMAL_BYTES)[:, ::-1]))


def _blocks(lists: pa.Array, items: pa.Array) -> pa.Array:
    """Lists: the number of items, these, and a zero; without items the zero alone."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    body = pc.binary_join(pa.ListArray.from_arrays(offsets, items), b"")
    counts = pc.if_else(pa.array(lengths > 0), _longs(pa.array(lengths)), pa.scalar(b"", pa.binary()))
    return _where_valid(lists, _join(counts, body, _varint(0)))


def _longs(column: pa.Array) -> pa.Array:
    """Numbers of variable length: zigzag, seven bits a byte, the lowest first."""
    numbers = column.to_numpy().astype(np.int64)
    rest = ((numbers << 1) ^ (numbers >> 63)).view(np.uint64)
    sizes = np.ones(len(rest), np.int64)
    for bits in range(7, 64, 7):
        more = rest >= np.uint64(1) << np.uint64(bits)
        if not more.any():
            break
        sizes += more
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    data = np.empty(int(offsets[-1]), np.uint8)
    for place in range(int(sizes.max(initial=0))):
        has = sizes > place
        byte = ((rest[has] >> np.uint64(7 * place)) & np.uint64(0x7F)).astype(np.uint8)
        data[offsets[:-1][has] + place] = byte | ((sizes[has] > place + 1).astype(np.uint8) << 7)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.binary(), len(numbers), buffers)


def _cells(values: npt.NDArray[Any]) -> pa.Array:
    """As many bytes for each value as it has."""
    rows = len(values)
    size = values.nbytes // rows if rows else 0
    offsets = (np.arange(rows + 1) * size).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(values)])


def _varint(number: int) -> bytes:
    """A small number that is not negative."""
    return bytes([number << 1])


def _join(*parts: pa.Array | bytes) -> pa.Array:
    scalars = [pa.scalar(part, pa.binary()) if isinstance(part, bytes) else part for part in parts]
    return pc.binary_join_element_wise(*scalars, pa.scalar(b"", pa.binary()))


def _where_valid(column: pa.Array, encoded: pa.Array) -> pa.Array:
    return pc.if_else(column.is_valid(), encoded, pa.scalar(None, pa.binary())) if column.null_count else encoded


def _repeat(value: bytes, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.binary()), rows)
