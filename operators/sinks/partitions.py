"""Cuts a table into hive-style partitions without touching single rows.

``origin=EWR/day=3`` is the directory of the rows with these values; the partition columns are left
out of the files (`operators.hive` has the names). Rows keep their order within a partition; partitions come in
the order of their values' first appearance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import SchemaError
from operators.hive import component

__all__ = ["check_partition_columns", "partition"]


def check_partition_columns(operator_id: str, schema: pa.Schema, partition_by: Sequence[str]) -> None:
    """Raise `SchemaError` unless the columns exist, have values that make names, and others remain."""
    if missing := [name for name in partition_by if name not in schema.names]:
        raise SchemaError(f"{operator_id}: cannot partition by {missing}: the columns are {schema.names}")
    for name in partition_by:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(accepts(kind) for accepts in _PARTITION_TYPES):
            raise SchemaError(
                f"{operator_id}: cannot partition by {name!r}: values of type {kind} make no directory names"
            )
    if len(partition_by) == len(schema.names):
        raise SchemaError(f"{operator_id}: partitioned by all of {schema.names}, no column is left for the files")


def partition(table: pa.Table, partition_by: Sequence[str]) -> list[tuple[str, pa.Table]]:
    """(directory, rows without the partition columns) for each combination of values; "" without partitioning."""
    if not partition_by:
        return [("", table)]
    codes = np.zeros(table.num_rows, dtype=np.int64)
    texts: list[list[str]] = []
    for name in partition_by:
        column_codes, column_texts = _encode(name, table.column(name))
        codes = codes * len(column_texts) + column_codes
        texts.append(column_texts)
    order = np.argsort(codes, kind="stable")
    found = codes[order]
    starts = np.concatenate(([0], np.flatnonzero(np.diff(found)) + 1, [len(found)]))
    rows = table.drop_columns(list(partition_by))
    if len(starts) > 2:
        rows = rows.take(pa.array(order))
    return [
        (_directory(int(found[start]), texts), rows.slice(start, end - start))
        for start, end in itertools.pairwise(starts.tolist())
    ]


def _encode(name: str, column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """A number for each row, and the directory name of each number."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = pc.dictionary_encode(pa.concat_arrays(column.chunks), null_encoding="encode")
    values = encoded.dictionary.cast(pa.string()).to_pylist()
    return encoded.indices.to_numpy().astype(np.int64), [component(name, value) for value in values]


def _directory(code: int, texts: Sequence[Sequence[str]]) -> str:
    parts = []
    for column in reversed(texts):
        code, index = divmod(code, len(column))
        parts.append(column[index])
    return "/".join(reversed(parts))


_PARTITION_TYPES = (
    pa.types.is_integer,
    pa.types.is_boolean,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_decimal,
)
