"""What an encoder is: the columns of a batch in, one value of bytes for each row out."""

from __future__ import annotations

from typing import Protocol

import pyarrow as pa

__all__ = ["RowEncoder", "plain", "refuse"]


class RowEncoder(Protocol):
    """Encodes rows of one schema. Making one raises `SchemaError` for columns that it cannot hold."""

    def encode(self, batch: pa.RecordBatch) -> pa.Array:
        """The value of each row (binary); null for a row that has none."""


def plain(column: pa.Array) -> pa.Array:
    """The column as one of a type that kernels know: decoded, without extension, views as what they look at."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(column.storage)
    if pa.types.is_dictionary(kind):
        return plain(column.dictionary_decode())
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return column.cast(pa.binary())
    return column


def refuse(kind: pa.DataType) -> bool:
    """Whether text has no way to write this type: bytes, and intervals of months."""
    if isinstance(kind, pa.BaseExtensionType):
        return refuse(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return refuse(kind.value_type)
    if pa.types.is_nested(kind):
        return any(refuse(kind.field(i).type) for i in range(kind.num_fields))
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
        or kind == pa.month_day_nano_interval()
    )
