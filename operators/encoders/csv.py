"""Rows as lines of CSV without a header, made by Arrow's kernels a column at a time.

Text is always between quotes and null is nothing, so that empty text and null stay apart. A value with a
line break makes a record with one in it.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from operators.encoders.base import plain, refuse
from operators.errors import SchemaError

__all__ = ["CsvEncoder"]


class CsvEncoder:
    """Values separated by ``delimiter`` (one character), in the order of the columns."""

    def __init__(self, schema: pa.Schema, *, delimiter: str = ",") -> None:
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise ValueError(f"delimiter must be one character and no quote or line break, not {delimiter!r}")
        for field in schema:
            if refuse(field.type) or pa.types.is_nested(field.type):
                raise SchemaError(f"format 'csv' has no {field.type}: turn column {field.name!r} into text first")
        self._delimiter = delimiter

    def encode(self, batch: pa.RecordBatch) -> pa.Array:
        """See `RowEncoder`."""
        texts = [pc.fill_null(_text(column), "") for column in batch.columns]
        return pc.binary_join_element_wise(*texts, self._delimiter).cast(pa.binary())


def _text(column: pa.Array) -> pa.Array:
    column = plain(column)
    if pa.types.is_string(column.type):
        return pc.binary_join_element_wise('"', pc.replace_substring(column, '"', '""'), '"', "")
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    if pa.types.is_duration(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        column = column.cast(pa.timestamp(column.type.unit, "UTC"))
    return column.cast(pa.string())
