"""Hive-style directories: ``origin=EWR/day=2013-01-01``; values as text, percent-encoded, null by a name of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote, unquote

import pyarrow as pa

from operators.errors import BadInputError

__all__ = ["NULL", "component", "partition_columns", "partition_values"]

NULL = "__HIVE_DEFAULT_PARTITION__"
"""The value that stands for null, as in Hive and Spark."""

_UNESCAPED = " !$&()+,;<>@|~-_."


def component(column: str, value: str | None) -> str:
    """The directory of one value of one column."""
    return f"{quote(column, safe=_UNESCAPED)}={NULL if value is None else quote(value, safe=_UNESCAPED)}"


def partition_values(name: str) -> dict[str, str | None]:
    """The values, as text, in the directories of a file's name."""
    found: dict[str, str | None] = {}
    for part in name.split("/")[:-1]:
        column, equals, value = part.partition("=")
        if equals:
            found[unquote(column)] = None if value == NULL else unquote(value)
    return found


def partition_columns(name: str, fields: Sequence[pa.Field], rows: int) -> Mapping[str, pa.Array]:
    """The columns that a file's directories hold, ``rows`` times each value.

    Raises `BadInputError` if a column is not among them, or its value is not of the type.
    """
    values = partition_values(name)
    columns: dict[str, pa.Array] = {}
    for field in fields:
        if field.name not in values:
            raise BadInputError(f"{name}: no directory {field.name}=... in its path")
        try:
            value = pa.array([values[field.name]], pa.string()).cast(field.type)[0]
        except pa.ArrowException as error:
            raise BadInputError(f"{name}: {field.name} is not of type {field.type}: {error}") from error
        columns[field.name] = pa.repeat(value, rows)
    return columns
