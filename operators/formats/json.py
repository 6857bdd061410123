"""JSON objects, one a record, decoded by Arrow's reader of JSON lines.

The reader sees all records as one text. That a row is the record of its number follows from three facts: every record
begins with ``{`` and ends with ``}`` and has no line break in it, so none adds less than one object, none can go on
in the next (inside of an object, another one or a string that began in the record before, ``}``, a line break and
``{`` in a row are no JSON), and there are as many rows as records, so none adds more than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json as pajson

from operators.errors import BadInputError
from operators.formats.base import FormatError
from operators.formats.lines import Lines, join_lines

__all__ = ["JsonFormat", "infer_json"]

_BLOCK_BYTES = 1 << 20
"""Of Arrow's reader: blocks are parsed side by side."""


class JsonFormat:
    """JSON objects with these columns: other fields are left out, missing ones are null.

    A timestamp is text as in ISO 8601, or an integer: so many of the column's units since 1970. A column that is not
    nullable makes a record without it a bad one.
    """

    takes_nulls = False

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema.remove_metadata()
        self._required = [f.name for f in self.schema if not f.nullable]
        nullable = pa.schema([f.with_nullable(True) for f in self.schema])
        counted = pa.schema([f.with_type(pa.int64()) if pa.types.is_timestamp(f.type) else f for f in nullable])
        # The two ways to write times; the one that was met last is tried first.
        self._ways = [nullable] if counted.equals(nullable) else [nullable, counted]

    def describe(self) -> Mapping[str, Any]:
        """The columns."""
        return {"format": "json", "schema": self.schema.to_string()}

    def decode(self, values: Sequence[bytes]) -> pa.RecordBatch:
        """See `Format.decode`."""
        lines = join_lines(values)
        if not (lines.are_single and lines.begin_and_end_with(b"{", b"}")):
            lines = join_lines([_one_line(value) for value in values])
        _check_text(lines.data)
        table = self._parse(lines)
        if table.num_rows != len(values):
            raise FormatError("more than one JSON object in one record")
        for name in self._required:
            if table[name].null_count:
                raise FormatError(f"no value for {name!r}, which is not nullable")
        columns = [_whole(table[f.name]).cast(f.type) for f in self.schema]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _parse(self, lines: Lines) -> pa.Table:
        failure: Exception | None = None
        for way in list(self._ways):
            try:
                table = _read(lines, way)
            except pa.ArrowException as error:
                failure = failure or error
            else:
                if way is not self._ways[0]:
                    self._ways.reverse()
                return table
        raise FormatError(_said(failure)) from failure


def infer_json(samples: Sequence[bytes]) -> pa.Schema:
    """The columns of JSON objects like these: what was always null is text.

    Raises `BadInputError` if one of them is no JSON object, or if they do not fit together.
    """
    try:
        text = b"\n".join(_one_line(sample) for sample in samples)
        found = pajson.read_json(pa.BufferReader(text), pajson.ReadOptions(block_size=len(text) + 1)).schema
    except (FormatError, pa.ArrowException) as error:
        raise BadInputError(f"columns cannot be inferred from the samples: {_said(error)}; give schema=") from error
    return pa.schema([_text_for_null(f) for f in found])


def _text_for_null(field: pa.Field) -> pa.Field:
    return field.with_type(_known(field.type))


def _known(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([_text_for_null(f) for f in kind])
    if pa.types.is_list(kind):
        return pa.list_(_text_for_null(kind.value_field))
    return kind


def _one_line(value: bytes) -> bytes:
    """A record as one line; between the tokens of JSON, where alone line breaks are allowed, spaces do as well."""
    line = value.strip().replace(b"\n", b" ").replace(b"\r", b" ")
    if len(line) < 2 or line[:1] != b"{" or line[-1:] != b"}":
        raise FormatError(f"no JSON object: {_shown(value)}")
    return line


def _check_text(data: bytes) -> None:
    """Arrow's reader takes any bytes for a string."""
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise FormatError("no UTF-8 text") from error


def _read(lines: Lines, schema: pa.Schema) -> pa.Table:
    parse = pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # A block must hold the longest record.
    block_bytes = max(_BLOCK_BYTES, lines.longest + 2)
    return pajson.read_json(pa.BufferReader(lines.data), pajson.ReadOptions(block_size=block_bytes), parse)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _shown(value: bytes) -> str:
    text = value[:60].decode(errors="replace")
    return repr(text if len(value) <= 60 else text + "…")


def _said(error: Exception | None) -> str:
    return str(error).removeprefix("JSON parse error: ")
