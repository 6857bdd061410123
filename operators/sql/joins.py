"""Joins of a query: of two streams by keys and event time, and of a stream with rows that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from datafusion import Expr, SessionContext

from operators.changelog import require_append_only
from operators.engine import column_named
from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, mentions, shown
from operators.sql.names import OperatorNames
from operators.sql.relation import Field, Lookup, Relation, common_type, free_name, with_columns, without_bounds
from operators.sql.time_functions import is_window
from operators.sql.window_joins import SameWindow, join_in_window, same_window, with_starts
from operators.stream import DataStream

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
    """Rows of both for which all conditions hold, found by equal keys, near event times, or the same window."""
    if kind not in _HOW:
        raise UnsupportedQueryError(f"a {kind} join", "write it as an inner or left join with a condition")
    how = _HOW[kind]
    for side in (left.stream, right.stream):
        require_append_only("sql: join", side.updates)
    if any(is_window(bare(side)) for condition in conditions for side in _compared(condition)):
        left, right = without_bounds(left), without_bounds(right)
    stream = right.stream
    apart: dict[str, str] = {}
    for name in stream.schema.names:
        apart[name] = free_name(name, [*left.stream.schema.names, *apart.values()])
    if any(old != new for old, new in apart.items()):
        stream = stream.select(*(column_named(old).alias(new) for old, new in apart.items()))
    others = tuple(replace(f, column=apart[f.column]) for f in right.fields)
    both = Relation(stream=left.stream, fields=(*left.fields, *others))
    if not conditions:
        raise UnsupportedQueryError(
            "a join without a condition", "every row would be paired with every other; say ON … = … and bound the times"
        )
    one, other = replace(left, fields=both.fields, calls={}), replace(both, stream=stream)
    keys: list[tuple[str, str]] = []
    rest: list[Expr] = []
    window: SameWindow | None = None
    for condition in conditions:
        if window is None and (found := same_window(both, (left.stream, stream), condition)) is not None:
            window = found
        elif (sides := _sides(both, set(left.stream.schema.names), condition, session)) is not None:
            one, other, key = _keys(one, other, sides)
            keys.append(key)
        else:
            rest.append(both.bound(condition, session))
    fields = left.fields if how in ("semi", "anti") else both.fields
    if window is not None:
        name = names.claim("window_join", how, *map(str, window.window.spans))
        joined = join_in_window(one.stream, other.stream, window, keys, rest, how, name)
        return with_starts(Relation(stream=joined, fields=fields), window, how)
    equal = [column_named(key) == column_named(other_key) for key, other_key in keys]
    joined = one.stream.join_on(other.stream, *equal, *rest, how=how, name=names.claim("join", how))
    return Relation(stream=joined, fields=fields)


def _compared(condition: Expr) -> list[Expr]:
    """Both sides of an equality; nothing of another condition."""
    if condition.variant_name() != "BinaryExpr" or condition.to_variant().op() != "=":
        return []
    return [as_expr(condition.to_variant().left()), as_expr(condition.to_variant().right())]


def _keys(one: Relation, other: Relation, sides: tuple[Expr, Expr]) -> tuple[Relation, Relation, tuple[str, str]]:
    """Both relations with the sides of an equality as columns, numbers of one type; and the names of those."""
    taken = [*one.stream.schema.names, *other.stream.schema.names]
    one, (left,) = with_columns(one, [sides[0]], taken)
    other, (right,) = with_columns(other, [sides[1]], [*taken, left])
    kinds = [one.stream.schema.field(left).type, other.stream.schema.field(right).type]
    kind = common_type(*kinds)
    if kind is not None and kind != kinds[0]:
        one, (left,) = with_columns(one, [column_named(left).cast(kind)], [*taken, left, right])
    if kind is not None and kind != kinds[1]:
        other, (right,) = with_columns(other, [column_named(right).cast(kind)], [*taken, left, right])
    return one, other, (left, right)


def _sides(both: Relation, of_left: set[str], condition: Expr, session: SessionContext) -> tuple[Expr, Expr] | None:
    """What an equality compares, of the left and of the right, each of columns of its own side; None for others."""
    sides = _compared(condition)
    if not sides:
        return None
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
    if kind not in ("Inner", "Left", "LeftSemi", "LeftAnti"):
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
    both, pairs = _pairs(both, set(apart.values()), conditions, session)
    if not pairs.stream:
        raise UnsupportedQueryError(
            f"the join with the table {lookup.alias}", "it needs an equality with one of its columns"
        )
    if pairs.rest and kind != "Inner":
        words = {"Left": "LEFT", "LeftSemi": "LEFT SEMI", "LeftAnti": "LEFT ANTI"}[kind]
        raise UnsupportedQueryError(
            f"the condition {shown(pairs.rest[0])} of a {words} JOIN with a table",
            "only equalities are asked of a table; filter the table in a subquery",
        )
    for one, other in zip(pairs.stream, pairs.rows, strict=True):
        table = _as_wide(table, other, both.stream.schema.field(one).type, lookup.alias)
    if kind in ("LeftSemi", "LeftAnti"):
        name = names.claim("lookup", lookup.alias)
        return replace(relation, stream=_with_or_without(both.stream, table, pairs, kind, name)), []
    stream = both.stream.lookup_join(
        table,
        name=names.claim("lookup", lookup.alias),
        how=kind.lower(),
        left_on=list(pairs.stream),
        right_on=list(pairs.rows),
    )
    return replace(both, stream=stream), list(pairs.rest)


def _with_or_without(stream: DataStream, table: pa.Table, pairs: _Pairs, kind: str, name: str) -> DataStream:
    """The rows whose key is in a table, each once (LeftSemi), or those whose key is not (LeftAnti)."""
    keys = table.group_by(list(dict.fromkeys(pairs.rows))).aggregate([])
    found = free_name("found", [*stream.schema.names, *keys.column_names])
    keys = keys.append_column(found, pa.repeat(pa.scalar(value=True), keys.num_rows))
    how = "inner" if kind == "LeftSemi" else "left"
    joined = stream.lookup_join(keys, how=how, left_on=list(pairs.stream), right_on=list(pairs.rows), name=name)
    return joined if kind == "LeftSemi" else joined.filter(column_named(found).is_null())


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


def _pairs(
    both: Relation, rows: set[str], conditions: Sequence[Expr], session: SessionContext
) -> tuple[Relation, _Pairs]:
    """The equalities of an expression over the stream with a column of the rows; the relation has it as a column."""
    stream_on: list[str] = []
    rows_on: list[str] = []
    rest: list[Expr] = []
    for condition in conditions:
        sides = _sides(both, set(both.stream.schema.names), condition, session)
        if sides is None or sides[1].variant_name() != "Column":
            rest.append(condition)
            continue
        both, (column,) = with_columns(both, [sides[0]], sorted(rows))
        stream_on.append(column)
        rows_on.append(sides[1].to_variant().name())
    return both, _Pairs(tuple(stream_on), tuple(rows_on), tuple(rest))
