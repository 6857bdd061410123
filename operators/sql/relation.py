"""A relation of a query as a stream: which column of the stream each column of the relation is.

The columns of a stream have plain names, each once; those of a relation have a qualifier and a name, and two joined
relations may share names. A `Relation` maps one to the other. Columns of the stream that are no column of
the relation (`op` of a changelog) go along unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
from datafusion import Expr, SessionContext

from operators.changelog import OP
from operators.engine import column_named
from operators.errors import UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, rebound
from operators.stateful.window_aggregate import WINDOW_END, WINDOW_START
from operators.stream import DataStream

__all__ = [
    "Field",
    "Lookup",
    "Ranking",
    "Relation",
    "common_type",
    "free_name",
    "uncast",
    "unseen",
    "with_columns",
    "without_bounds",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A column of a relation, and the stream's column that it is.

    ``repeated``: DataFusion takes it, with the other groups, for a key of the relation, which it is not.
    """

    relation: str | None
    name: str
    column: str
    repeated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A ``row_number()`` that is not computed yet: it takes a filter on the number to make it bounded.

    ``partition``, ``order``: columns of the stream; of ``order`` with whether it ascends and whether nulls come first.
    ``column``: the stream's column that the number would be. ``computed``: expressions, as text, that are columns of
    the stream because the number needs them. ``window_ms``: the length of the tumbling windows within which rows are
    numbered, whose start will be a column too; None for none.
    """

    partition: tuple[str, ...]
    order: tuple[tuple[str, bool, bool], ...]
    column: str
    computed: Mapping[str, str]
    window_ms: int | None = None

    @property
    def awaited(self) -> tuple[str, ...]:
        """The columns that are not there yet."""
        return (self.column,) if self.window_ms is None else (self.column, WINDOW_START)

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that must be there when the number is computed."""
        return tuple(dict.fromkeys([*self.partition, *(column for column, _, _ in self.order)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A stream with the columns that the query sees, in their order.

    ``calls``: calls of window functions, as DataFusion names them, that are columns of the stream.
    """

    stream: DataStream
    fields: tuple[Field, ...]
    ranking: Ranking | None = None
    calls: Mapping[str, str] = field(default_factory=dict)

    def column(self, relation: str | None, name: str) -> str:
        """The stream's column for a column of the query."""
        found = [f for f in self.fields if f.name == name and relation in (f.relation, None)]
        found = found or [f for f in self.fields if f.name == name and f.relation is None]
        exact = [f for f in found if f.relation == relation]
        found = exact or found
        if len(found) != 1:
            what = name if relation is None else f"{relation}.{name}"
            raise UnsupportedQueryError(
                f"column {what}", f"{len(found)} columns are called so; name columns apart with AS, in a subquery"
            )
        return found[0].column

    def bound(self, expr: Expr, session: SessionContext) -> Expr:
        """An expression of the query over the stream's columns."""
        if self.calls and (column := self.calls.get(bare(expr).canonical_name())):
            return column_named(column)
        return rebound(expr, self.column, session)

    def known(self) -> Relation:
        """This relation, where every column can be computed.

        Raises `UnsupportedQueryError` for a row number without a bound.
        """
        if self.ranking is not None:
            raise UnsupportedQueryError(
                "row_number() without a bound",
                "select it in a subquery and keep the first rows around it, with WHERE rn <= n",
            )
        return self

    def renamed(self, alias: str) -> Relation:
        """Under another qualifier."""
        return replace(self, fields=tuple(replace(f, relation=alias) for f in self.fields))

    @property
    def unseen(self) -> tuple[str, ...]:
        """Columns of the stream that go along beside those of the relation."""
        return unseen(self.stream)

    @property
    def hidden(self) -> tuple[str, ...]:
        """Columns by which rows are corrected and which the relation does not show."""
        updates = self.stream.updates
        seen = {field.column for field in self.fields}
        return () if updates is None else tuple(c for c in updates.key if c not in seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """A relation without an end of its own: rows that are there when the stream is built."""

    rows: pa.Table
    alias: str


def unseen(stream: DataStream) -> tuple[str, ...]:
    """Columns of a stream that a query does not see: `OP` of a changelog."""
    return (OP,) if stream.updates is not None and stream.updates.changelog else ()


def without_bounds(relation: Relation) -> Relation:
    """The relation over a stream without the columns that a window's result begins with, if they have other names."""
    stream, fields, calls = relation.stream, list(relation.fields), dict(relation.calls)
    for name in (WINDOW_START, WINDOW_END):
        if name in stream.schema.names:
            new = free_name(f"inner_{name}", stream.schema.names)
            stream = stream.with_column_renamed(name, new)
            fields = [replace(found, column=new) if found.column == name else found for found in fields]
            calls = {call: new if column == name else column for call, column in calls.items()}
    return replace(relation, stream=stream, fields=tuple(fields), calls=calls)


def free_name(name: str, taken: Iterable[str]) -> str:
    """The name, with a number behind it if it is taken, and without what columns of state may not begin with."""
    base = name.lstrip("_") or "column"
    names, number, free = set(taken), 1, base
    while free in names:
        number += 1
        free = f"{base}_{number}"
    return free


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type to which values of both are cast without loss, or as SQL does it, integers with floats; else None."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    numbers = [pa.types.is_integer(t) or pa.types.is_floating(t) for t in (one, other)]
    if not all(numbers):
        return None
    if any(pa.types.is_floating(t) for t in (one, other)):
        return pa.float64()
    signed = [pa.types.is_signed_integer(t) for t in (one, other)]
    if signed[0] == signed[1]:
        return max(one, other, key=lambda t: t.bit_width)
    unsigned = other if signed[0] else one
    return None if unsigned.bit_width == 64 else pa.int64()


def uncast(expr: Expr, schema: pa.Schema, session: SessionContext) -> Expr:
    """The column itself, where an expression casts it to the type that it has.

    DataFusion plans with other types than streams have (of event times, and of row numbers), so it casts what needs no
    cast; and what is computed of a key is no key.
    """
    if expr.variant_name() != "Cast":
        return expr
    column = as_expr(expr.to_variant().expr())
    if column.variant_name() != "Column" or column.to_variant().name() not in schema.names:
        return expr
    rows = session.create_dataframe([[pa.RecordBatch.from_pylist([], schema=schema)]])
    same = rows.select(expr).schema().field(0).type == schema.field(column.to_variant().name()).type
    return column if same else expr


def with_columns(relation: Relation, exprs: Sequence[Expr], taken: Sequence[str] = ()) -> tuple[Relation, list[str]]:
    """The relation over a stream that has these expressions as columns, and the names of those; none of ``taken``."""
    names: list[str] = []
    new: dict[str, Expr] = {}
    stream = relation.stream
    for expr in exprs:
        if expr.variant_name() == "Column":
            names.append(expr.to_variant().name())
            continue
        name = free_name("computed", [*stream.schema.names, *taken, *new])
        new[name] = expr
        names.append(name)
    if new:
        stream = stream.with_columns(**new)
    return replace(relation, stream=stream), names
