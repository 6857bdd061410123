"""Avro records, each beginning with the number of its schema in a registry, or all written with one schema.

Records of one schema are decoded together. The columns are those of a schema of the reader: a field that the writer
does not have is its default, or null; one that it has more is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from operators.errors import SchemaError
from operators.formats.avro_columns import AvroColumns
from operators.formats.avro_types import AvroRecord, arrow_type, parse_avro
from operators.formats.base import FormatError
from operators.formats.registry import SchemaRegistry
from operators.windows import Int64Array

__all__ = ["AvroFormat"]

_MARK = 0
_HEADER_BYTES = 5


class AvroFormat:
    """Records of Avro.

    ``schema``: what the reader wants, in Avro's JSON or as Arrow columns. ``registry``: records begin with a zero
    byte and the number of the schema that they were written with, four bytes. Without it they were all written with
    ``schema``, which must then be Avro's.
    """

    takes_nulls = False

    def __init__(self, schema: str | Mapping[str, Any] | pa.Schema, registry: SchemaRegistry | None = None) -> None:
        self._registry = registry
        self._defaults: Mapping[str, Any] = {}
        self._writers: dict[int, AvroRecord | FormatError] = {}
        self._only: AvroRecord | None = None
        if isinstance(schema, pa.Schema):
            if registry is None:
                raise SchemaError("Avro: without a schema registry, schema= must be the Avro schema of the records")
            self.schema = schema.remove_metadata()
            return
        record = parse_avro(schema)
        self._defaults = {f.name: f.default for f in record.fields}
        self.schema = pa.schema([pa.field(f.name, arrow_type(f.type)) for f in record.fields])
        self._only = record if registry is None else None

    def describe(self) -> Mapping[str, Any]:
        """The columns."""
        return {"format": "avro", "schema": self.schema.to_string()}

    def decode(self, values: Sequence[bytes]) -> pa.RecordBatch:
        """See `Format.decode`. Raises `SourceUnavailableError` if the registry does not answer."""
        if self._only is not None:
            return self._conform(self._only, AvroColumns(values).read(self._only), len(values))
        numbers = _schema_numbers(values)
        found = np.unique(numbers)
        if len(found) == 1:
            return self._of_one(int(found[0]), values)
        pieces, order = [], []
        for number in found.tolist():
            rows = np.flatnonzero(numbers == number)
            order.append(rows)
            pieces.append(self._of_one(number, [values[i] for i in rows.tolist()]))
        return pa.concat_batches(pieces).take(pa.array(np.argsort(np.concatenate(order))))

    def _of_one(self, number: int, values: Sequence[bytes]) -> pa.RecordBatch:
        writer = self._writer(number)
        return self._conform(writer, AvroColumns(values, _HEADER_BYTES).read(writer), len(values))

    def _writer(self, number: int) -> AvroRecord:
        """The schema of a number; what a registry has said of one it says for ever."""
        if number not in self._writers:
            assert self._registry is not None
            text = self._registry.schema(number)
            if text is None:
                # Not remembered: it may be registered yet.
                raise FormatError(f"the registry has no schema {number}")
            try:
                self._writers[number] = parse_avro(text)
            except SchemaError as error:
                self._writers[number] = FormatError(f"schema {number}: {error}")
        found = self._writers[number]
        if isinstance(found, FormatError):
            raise FormatError(str(found))
        return found

    def _conform(self, writer: AvroRecord, columns: Sequence[pa.Array], count: int) -> pa.RecordBatch:
        written = {f.name: column for f, column in zip(writer.fields, columns, strict=True)}
        made = []
        for field in self.schema:
            column = written.get(field.name)
            try:
                if column is None:
                    column = pa.repeat(pa.scalar(self._defaults.get(field.name), field.type), count)
                elif column.type != field.type:
                    column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError) as error:
                raise FormatError(f"field {field.name!r} is no {field.type}: {error}") from error
            if column.null_count and not field.nullable:
                raise FormatError(f"no value for {field.name!r}, which is not nullable")
            made.append(column)
        return pa.RecordBatch.from_arrays(made, schema=self.schema)


def _schema_numbers(values: Sequence[bytes]) -> Int64Array:
    """The number that each record begins with."""
    heads = b"".join([value[:_HEADER_BYTES] for value in values])
    if len(heads) != _HEADER_BYTES * len(values):
        raise FormatError(f"fewer than {_HEADER_BYTES} bytes")
    cells = np.frombuffer(heads, np.uint8).reshape(-1, _HEADER_BYTES)
    if (cells[:, 0] != _MARK).any():
        raise FormatError("it does not begin with a zero byte and the number of a schema")
    return np.ascontiguousarray(cells[:, 1:]).view(">i4")[:, 0].astype(np.int64)
