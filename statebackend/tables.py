"""What a table of state is: its columns, key, kind and physical order.

The kind says what a second row with the same key means: ``UPSERT`` the last write wins,
``AGGREGATE`` the rows are partial states to be merged, ``APPEND`` both are kept, in write order.
The order says how rows lie in a file: ``hash`` (point lookups, hash ranges), ``time`` (the time
column first: windows, timers, joins with a time bound) or ``key`` (bytes of the key in order: prefix
and range scans).

Rows expire by one column, below the watermark that ``expire`` moves. ``time_field`` is a key column, so
every row can be judged alone. ``ttl_field`` is not: a newer row of the same key may have another value
in it, so of an upsert table only the newest row of a key is judged, and an expired one still
hides the older ones.

A table may be declared with other columns than it has: see `SchemaChanges`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

from statebackend import display

__all__ = ["SchemaChanges", "TableKind", "TableOrder", "TableSpec"]


class TableKind(StrEnum):
    """What a second row with the same key means."""

    UPSERT = "upsert"
    AGGREGATE = "aggregate"
    APPEND = "append"


class TableOrder(StrEnum):
    """How the rows of one file are sorted."""

    HASH = "hash"
    TIME = "time"
    KEY = "key"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaChanges:
    """What the names of columns cannot tell when a table is opened with other columns than it has.

    ``renamed``: the old name by the new one. ``dropped``: names of columns that shall go, with their values.
    ``defaults``: by the name of a new column, what rows hold in it that were written before (null where none is
    named; fixed when the column is added). What a table has gone through already is passed over, so a program
    keeps its entries for as long as older tables may be met, also of renames one after the other.

    A column without an entry here keeps its type or gets a wider one: a longer integer of the same sign, a longer
    float, a decimal of more digits and the same scale, a date as timestamp in s or ms; or it becomes nullable.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: Collection[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.renamed:
            seen = {name}
            while (name := self.renamed.get(name, "")) and name not in seen:
                seen.add(name)
            if name:
                raise ValueError(f"renamed: {name!r} comes from itself; take a third name in between")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """Declaration of one table.

    ``schema`` holds all columns, the key columns among them. ``time_field`` names the key column
    (int64 or timestamp) by which rows expire; it is required for ``TableOrder.TIME``. ``ttl_field``
    names a column outside of the key (int64 or timestamp, never null) by which rows expire instead: the
    time of a row's end for ``expire(now)``, or of its last change for ``expire(now - ttl)``.
    ``aggregation`` is the declaration of an `Aggregation` (see ``accumulators.py``). Rows of an aggregate table are
    partial states of it, which are merged; those of an upsert table, where it is given, whole states, so that readers
    can be shown results. ``changes`` tells how the table came to have these columns; it is no part of the table.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    kind: TableKind
    order: TableOrder = TableOrder.HASH
    time_field: str | None = None
    ttl_field: str | None = None
    aggregation: Mapping[str, Any] | None = None
    changes: SchemaChanges | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\\0"):
            raise ValueError(f"table name {self.name!r}: must be non-empty and hold no slash")
        names = self.schema.names
        if len(set(names)) != len(names):
            raise ValueError(f"table {self.name!r}: duplicate column names in {names}")
        named = (*self.key, *(f for f in (self.time_field, self.ttl_field) if f is not None))
        if missing := [k for k in named if k not in names]:
            raise ValueError(f"table {self.name!r}: no column {missing} among {names}")
        if not self.key:
            raise ValueError(f"table {self.name!r}: a table needs at least one key column")
        self._check_expiry()
        if self.order is TableOrder.TIME and self.time_field is None:
            raise ValueError(f"table {self.name!r}: order 'time' needs a time_field")
        if self.order is TableOrder.KEY:
            key_types = [self.schema.field(k).type for k in self.key]
            if self.kind is not TableKind.UPSERT or self.time_field or key_types not in ([pa.binary()], [pa.string()]):
                raise ValueError(
                    f"table {self.name!r}: order 'key' needs kind 'upsert', one binary or string key and no time_field"
                )
        if self.kind is TableKind.AGGREGATE and self.aggregation is None:
            raise ValueError(f"table {self.name!r}: kind 'aggregate' needs the declaration of an aggregation")
        if self.kind is TableKind.APPEND and self.aggregation is not None:
            raise ValueError(f"table {self.name!r}: rows of kind 'append' are no states of an aggregation")
        if self.changes is not None:
            if both := [n for n in self.changes.dropped if n in names]:
                raise ValueError(f"table {self.name!r}: columns {both} are dropped and declared")
            if unknown := [n for n in self.changes.defaults if n not in names]:
                raise ValueError(f"table {self.name!r}: defaults of {unknown}, which are not among {names}")
        if reserved := [n for n in names if n.startswith("__")]:
            raise ValueError(f"table {self.name!r}: column names {reserved} are reserved")

    @property
    def expiry_field(self) -> str | None:
        """The column by which rows expire: ``time_field`` or ``ttl_field``."""
        return self.time_field if self.time_field is not None else self.ttl_field

    @property
    def expires_by_row(self) -> bool:
        """Whether any row below the watermark may go, whatever other rows there are.

        Not so with ``ttl_field`` in an upsert table: there a row that is gone would show an older one.
        """
        return self.time_field is not None or (self.ttl_field is not None and self.kind is not TableKind.UPSERT)

    def _repr_html_(self) -> str:
        return display.table_spec(self)

    def _check_expiry(self) -> None:
        if self.time_field is not None and self.ttl_field is not None:
            raise ValueError(f"table {self.name!r}: rows expire by time_field or by ttl_field, not by both")
        if self.time_field is not None and self.time_field not in self.key:
            raise ValueError(f"table {self.name!r}: time_field {self.time_field!r} must be a key column")
        if self.ttl_field is not None and self.ttl_field in self.key:
            raise ValueError(f"table {self.name!r}: ttl_field {self.ttl_field!r} is a key column: use time_field")
        if self.ttl_field is not None and self.kind is TableKind.AGGREGATE:
            raise ValueError(
                f"table {self.name!r}: partial states have no ttl_field, for merging loses it: "
                "put a time into the key and name it as time_field"
            )
        if (field := self.expiry_field) is not None:
            kind = self.schema.field(field).type
            if not (pa.types.is_int64(kind) or pa.types.is_timestamp(kind)):
                role = "time_field" if field == self.time_field else "ttl_field"
                raise ValueError(f"table {self.name!r}: {role} must be int64 or timestamp, not {kind}")
