"""Joins of a query: of two streams by keys and event time, and of a stream with rows that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from datafusion import Expr, SessionContext

from operators.engine import column_named
from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, mentions, shown
from operators.sql.names import OperatorNames
from operators.sql.relation import Field, Lookup, Relation, free_name, with_columns

__all__ = ["join_lookup", "join_streams"]

_HOW = {"Inner": "inner", "Left": "left", "Right": "right", "Full": "full", "LeftSemi": "semi", "LeftAnti": "anti"}


def join_streams(
    left: Relation,
    right: Relation,
    kind: str,
    conditions: Sequence[Expr],
    session: SessionContext,
    names: OperatorNames,
) -> Relation:
    """Rows of both for which all conditions hold, found by equal keys, near event times, or both."""
    if kind not in _HOW:
        raise UnsupportedQueryError(f"a {kind} join", "write it as an inner or left join with a condition")
    how = _HOW[kind]
    stream = right.stream
    apart: dict[str, str] = {}
    for name in stream.schema.names:
        apart[name] = free_name(name, [*left.stream.schema.names, *apart.values()])
    if any(old != new for old, new in apart.items()) and stream.updates is None:
        stream = stream.select(*(column_named(old).alias(new) for old, new in apart.items()))
    others = tuple(replace(f, column=apart[f.column]) for f in right.fields)
    both = Relation(stream=left.stream, fields=(*left.fields, *others))
    if not conditions:
        raise UnsupportedQueryError(
            "a join without a condition", "every row would be paired with every other; say ON … = … and bound the times"
        )
    one, other = replace(left, fields=both.fields), replace(both, stream=stream)
    bound = []
    for condition in conditions:
        sides = _sides(both, set(left.stream.schema.names), condition, session)
        if sides is None:
            bound.append(both.bound(condition, session))
            continue
        one, (left_key,) = with_columns(one, [sides[0]], [*one.stream.schema.names, *other.stream.schema.names])
        other, (right_key,) = with_columns(other, [sides[1]], [*one.stream.schema.names, *other.stream.schema.names])
        bound.append(column_named(left_key) == column_named(right_key))
    joined = one.stream.join_on(other.stream, *bound, how=how, name=names.claim("join", how))
    return Relation(stream=joined, fields=left.fields if how in ("semi", "anti") else both.fields)


def _sides(both: Relation, of_left: set[str], condition: Expr, session: SessionContext) -> tuple[Expr, Expr] | None:
    """What an equality compares, of the left and of the right, each of columns of its own side; None for others."""
    if condition.variant_name() != "BinaryExpr" or condition.to_variant().op() != "=":
        return None
    variant = condition.to_variant()
    sides = [as_expr(variant.left()), as_expr(variant.right())]
    columns = [{both.column(*place) for place in mentions(side, session)} for side in sides]
    if not all(columns):
        return None
    places = [{name in of_left for name in names} for names in columns]
    if places == [{False}, {True}]:
        sides.reverse()
    elif places != [{True}, {False}]:
        return None
    left, right = (both.bound(side, session) for side in sides)
    return left, right


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Key columns of the stream and of the rows, and the conditions that are not about keys."""

    stream: tuple[str, ...]
    rows: tuple[str, ...]
    rest: tuple[Expr, ...]


def join_lookup(
    relation: Relation,
    lookup: Lookup,
    kind: str,
    conditions: Sequence[Expr],
    session: SessionContext,
    names: OperatorNames,
) -> tuple[Relation, list[Expr]]:
    """Every row with the rows of a table that have its key; and the conditions that remain to be asked.

    ``kind`` as seen from the stream. Raises `UnsupportedQueryError` for joins that would emit rows of the table by
    themselves, for one without a key, and for an outer join with conditions beside the keys.
    """
    if kind not in ("Inner", "Left"):
        raise UnsupportedQueryError(
            f"a {kind} join with the table {lookup.alias}", "rows of a table come out at their stream's rows only: LEFT"
        )
    schema = lookup.rows.schema
    apart: dict[str, str] = {}
    for name in schema.names:
        apart[name] = free_name(name, [*relation.stream.schema.names, *apart.values()])
    table = lookup.rows.rename_columns(list(apart.values()))
    others = tuple(Field(relation=lookup.alias, name=n, column=c) for n, c in apart.items())
    both = replace(relation, fields=(*relation.fields, *others))
    pairs = _pairs(both, set(apart.values()), conditions, session)
    if not pairs.stream:
        raise UnsupportedQueryError(
            f"the join with the table {lookup.alias}", "it needs an equality of a column of the stream and one of it"
        )
    if pairs.rest and kind == "Left":
        raise UnsupportedQueryError(
            f"the condition {shown(pairs.rest[0])} of a LEFT JOIN with a table",
            "only equalities are asked of a table; filter the table in a subquery",
        )
    for one, other in zip(pairs.stream, pairs.rows, strict=True):
        table = _as_wide(table, other, relation.stream.schema.field(one).type, lookup.alias)
    stream = relation.stream.lookup_join(
        table,
        name=names.claim("lookup", lookup.alias),
        how=kind.lower(),
        left_on=list(pairs.stream),
        right_on=list(pairs.rows),
    )
    return replace(both, stream=stream), list(pairs.rest)


def _as_wide(table: pa.Table, name: str, wanted: pa.DataType, alias: str) -> pa.Table:
    """The table with its integer key as wide as the stream's; other types are left to the verb to compare."""
    index = table.schema.get_field_index(name)
    if not pa.types.is_integer(wanted) or not pa.types.is_integer(table.schema.field(index).type):
        return table
    try:
        return table.set_column(index, pa.field(name, wanted), table.column(name).cast(wanted))
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"sql: column {name!r} of the table {alias!r} holds values beyond {wanted}, which is what the stream has: "
            "CAST the stream's column in a subquery"
        ) from error


def _pairs(both: Relation, rows: set[str], conditions: Sequence[Expr], session: SessionContext) -> _Pairs:
    stream_on: list[str] = []
    rows_on: list[str] = []
    rest: list[Expr] = []
    for condition in conditions:
        if condition.variant_name() == "BinaryExpr" and condition.to_variant().op() == "=":
            variant = condition.to_variant()
            sides = [bare(as_expr(side)) for side in (variant.left(), variant.right())]
            if all(side.variant_name() == "Column" for side in sides):
                columns = [both.column(*mentions(side, session)[0]) for side in sides]
                columns.sort(key=lambda name: name in rows)
                if columns[0] not in rows and columns[1] in rows:
                    stream_on.append(columns[0])
                    rows_on.append(columns[1])
                    continue
        rest.append(condition)
    return _Pairs(tuple(stream_on), tuple(rows_on), tuple(rest))
