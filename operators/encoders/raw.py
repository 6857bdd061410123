"""Records that are one column as it is."""

from __future__ import annotations

import pyarrow as pa

from operators.encoders.base import plain
from operators.errors import SchemaError

__all__ = ["RawEncoder", "as_bytes", "is_bytes"]


class RawEncoder:
    """The bytes of one column of bytes or text; a null is a record without a value."""

    def __init__(self, schema: pa.Schema) -> None:
        if len(schema) != 1 or not is_bytes(schema.field(0).type):
            raise SchemaError(
                f"format 'raw' writes one column of bytes or text; name it with columns=[...], there are\n{schema}"
            )

    def encode(self, batch: pa.RecordBatch) -> pa.Array:
        """See `RowEncoder`."""
        return as_bytes(batch.column(0))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type is bytes or text."""
    if pa.types.is_dictionary(kind):
        return is_bytes(kind.value_type)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def as_bytes(column: pa.Array) -> pa.Array:
    """A column of bytes or text as binary."""
    return plain(column).cast(pa.binary())
