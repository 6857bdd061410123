"""Rows as JSON objects, made by Arrow's kernels a column at a time.

Every column becomes text, and the texts of a row are joined with the names between them: no row is ever a
Python object. Values: numbers as they are (decimals with all their digits), NaN and the infinities as null, which is
all that JSON has for them; times, dates and timestamps as text as in ISO 8601, the latter with ``Z`` if the column
has a zone; durations as the integer that they are; lists, structs and maps as arrays and objects. Null fields are
written as null.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.encoders.base import plain, refuse
from operators.errors import SchemaError

__all__ = ["JsonEncoder", "json_text"]

_NULL = "null"
_SPECIAL = ord('"'), ord("\\")
_CONTROL_END = 0x20


class JsonEncoder:
    """One JSON object for each row, its fields in the order of the columns."""

    def __init__(self, schema: pa.Schema) -> None:
        for field in schema:
            if refuse(field.type):
                raise SchemaError(
                    f"format 'json' has no {field.type}: turn column {field.name!r} into text first, "
                    "for example with datafusion.functions.encode(column, 'base64')"
                )
        self._names = [_quoted_name(name) for name in schema.names]

    def encode(self, batch: pa.RecordBatch) -> pa.Array:
        """See `RowEncoder`."""
        return _object(self._names, batch.columns, batch.num_rows).cast(pa.binary())


def json_text(column: pa.Array) -> pa.Array:
    """The JSON text of every value, ``null`` for a null."""
    column = plain(column)
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array([_NULL], pa.string()).take(pa.array(np.zeros(len(column), np.int64)))
    if pa.types.is_struct(kind):
        names = [_quoted_name(field.name) for field in kind]
        text = _object(names, column.flatten(), len(column))
    elif pa.types.is_map(kind):
        text = _map(column)
    elif pa.types.is_nested(kind):
        items = _joined(json_text(column.flatten()), column)
        text = pc.binary_join_element_wise("[", items, "]", "")
    else:
        return pc.fill_null(_scalar(column), _NULL)
    return pc.fill_null(pc.if_else(column.is_valid(), text, pa.scalar(None, pa.string())), _NULL)


def _object(names: list[str], columns: list[pa.Array], rows: int) -> pa.Array:
    if not columns:
        return pa.array(["{}"], pa.string()).take(pa.array(np.zeros(rows, np.int64)))
    parts: list[pa.Array | str] = []
    for number, (name, column) in enumerate(zip(names, columns, strict=True)):
        parts += [f"{',' if number else '{'}{name}:", json_text(column)]
    return pc.binary_join_element_wise(*parts, "}", "")


def _map(column: pa.Array) -> pa.Array:
    """Keys that are no text are named by their JSON text."""
    kind = column.type
    entry = pa.struct([pa.field("key", kind.key_type), pa.field("value", kind.item_type)])
    lists = column.cast(pa.list_(entry))
    keys, items = lists.flatten().flatten()
    key_text = json_text(keys)
    if not pa.types.is_string(plain(keys).type):
        key_text = _quoted(pc.replace_substring(key_text, '"', ""))
    pairs = pc.binary_join_element_wise(key_text, json_text(items), ":")
    return pc.binary_join_element_wise("{", _joined(pairs, lists), "}", "")


def _joined(items: pa.Array, lists: pa.Array) -> pa.Array:
    """The texts of each list's items with commas between them; ``lists`` has their numbers."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), items), ",")


def _scalar(column: pa.Array) -> pa.Array:
    """Text of every value, null for null and for what JSON has no number for."""
    kind = column.type
    if pa.types.is_string(kind):
        return _quoted(column)
    if pa.types.is_floating(kind):
        wide = column.cast(pa.float32()) if pa.types.is_float16(kind) else column
        return pc.if_else(pc.is_finite(wide), wide.cast(pa.string()), pa.scalar(None, pa.string()))
    if pa.types.is_timestamp(kind):
        utc = column.cast(pa.timestamp(kind.unit, "UTC")) if kind.tz is not None else column
        return _between_quotes(pc.replace_substring(utc.cast(pa.string()), " ", "T", max_replacements=1))
    if pa.types.is_date(kind) or pa.types.is_time(kind):
        return _between_quotes(column.cast(pa.string()))
    if pa.types.is_duration(kind):
        return column.cast(pa.int64()).cast(pa.string())
    return column.cast(pa.string())


def _quoted(text: pa.Array) -> pa.Array:
    """JSON strings. Most columns have nothing to escape, which one look at all bytes tells."""
    if found := _to_escape(text):
        for code in found:
            text = pc.replace_substring(text, chr(code), json.dumps(chr(code))[1:-1])
    return _between_quotes(text)


def _to_escape(text: pa.Array) -> list[int]:
    """The characters in these strings that JSON has to escape, the backslash first."""
    _, offsets, data = text.buffers()
    if data is None or not len(text):
        return []
    bounds = np.frombuffer(offsets, np.int32, len(text) + 1, text.offset * 4)
    raw = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    special = (raw < _CONTROL_END) | (raw == _SPECIAL[0]) | (raw == _SPECIAL[1])
    if not special.any():
        return []
    return sorted(np.unique(raw[special]).tolist(), key=lambda code: code != ord("\\"))


def _between_quotes(text: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise('"', text, '"', "")


def _quoted_name(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
