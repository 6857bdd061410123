"""``ROW_NUMBER() OVER (PARTITION BY … ORDER BY …)`` with a bound: the first rows of each partition, or the one row.

A row number over a stream without end changes for ever, so it is not computed where it stands: a `Ranking` waits for
the filter that bounds it. ``= 1`` in the order of event time is `DataStream.deduplicate`, everything else
`DataStream.top_n`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from datafusion import Expr, SessionContext, lit
from datafusion.expr import SortExpr

from operators.engine import column_named
from operators.errors import UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, mentions, output_name, shown
from operators.sql.names import OperatorNames
from operators.sql.relation import Field, Ranking, Relation, free_name, with_columns, without_bounds
from operators.sql.time_functions import Window, is_date_bin, is_window, window_of
from operators.stateful.window_aggregate import WINDOW_START
from operators.stream import DataStream
from statebackend import read_wire

__all__ = ["first_rows", "ranked", "split_bound"]

# Numbers of DataFusion's LogicalExprNode, WindowExprNode and SortExprNode.
_WINDOW = 18
_PARTITION_BY, _ORDER_BY, _FRAME, _FUNCTION = 5, 6, 8, 9
_SORT_EXPR, _ASCENDING, _NULLS_FIRST = 1, 2, 3

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "="}


def ranked(relation: Relation, exprs: Sequence[Any], session: SessionContext) -> Relation:
    """The relation with a row number as one more column.

    Raises `UnsupportedQueryError` for any other window function.
    """
    if len(exprs) != 1:
        raise UnsupportedQueryError("several window functions at once", "compute each in a query of its own")
    expr = bare(as_expr(exprs[0]))
    fields: dict[int, list[Any]] = {}
    for number, value in read_wire(dict(read_wire(expr.to_bytes(session)))[_WINDOW]):  # type: ignore[arg-type]
        fields.setdefault(number, []).append(value)
    name = fields.get(_FUNCTION, [b""])[0]
    if name != b"row_number" or set(fields) - {_PARTITION_BY, _ORDER_BY, _FRAME, _FUNCTION}:
        raise UnsupportedQueryError(
            f"the window function {shown(expr)}",
            "over a stream only row_number() with a bound (<= n) is known; for aggregates use GROUP BY",
        )
    orders = [dict(read_wire(data)) for data in fields.get(_ORDER_BY, [])]
    if not orders:
        raise UnsupportedQueryError(shown(expr), "row_number() needs an ORDER BY")
    parts = [Expr.from_bytes(data, session) for data in fields.get(_PARTITION_BY, [])]
    relation, parts, window_ms = _window(relation, parts)
    terms = [Expr.from_bytes(order[_SORT_EXPR], session) for order in orders]  # type: ignore[arg-type]
    bound = [relation.bound(e, session) for e in (*parts, *terms)]
    relation, columns = with_columns(relation, bound)
    column = free_name("row_number", relation.stream.schema.names)
    ranking = Ranking(
        partition=tuple(dict.fromkeys(columns[: len(parts)])),
        order=tuple(
            (c, bool(o.get(_ASCENDING, 0)), bool(o.get(_NULLS_FIRST, 0)))
            for c, o in zip(columns[len(parts) :], orders, strict=True)
        ),
        column=column,
        computed={e.canonical_name(): c for e, c in zip(bound, columns, strict=True) if e.variant_name() != "Column"},
        window_ms=window_ms,
    )
    field = Field(relation=None, name=expr.schema_name(), column=column)
    return replace(relation, fields=(*relation.fields, field), ranking=ranking)


def _window(relation: Relation, parts: list[Expr]) -> tuple[Relation, list[Expr], int | None]:
    """The tumbling window of the event time that a partition is cut into, and what it is partitioned by beside it.

    A ``date_bin`` of another column is a partition like any. Raises `UnsupportedQueryError` for other windows.
    """
    timed: list[tuple[Expr, Window]] = []
    plain: list[Expr] = []
    for part in parts:
        window = window_of(part) if is_window(part) else None
        if window is not None and window.function == "tumble" and _is_event_time(relation, window):
            timed.append((part, window))
        elif window is None or is_date_bin(part):
            plain.append(part)
        else:
            raise UnsupportedQueryError(
                f"PARTITION BY {shown(part)}", "rows are numbered within tumble() of the event time, or aggregate first"
            )
    if not timed:
        return relation, parts, None
    if len(timed) > 1:
        raise UnsupportedQueryError("two windows in one PARTITION BY", "number the rows within one")
    ((part, window),) = timed
    relation = without_bounds(relation)
    calls = {**relation.calls, bare(part).canonical_name(): WINDOW_START}
    return replace(relation, calls=calls), plain, window.spans[0]


def _is_event_time(relation: Relation, window: Window) -> bool:
    time = bare(window.time)
    return time.variant_name() == "Column" and relation.column(*output_name(time)) == relation.stream.event_time


def split_bound(relation: Relation, conditions: Sequence[Expr], session: SessionContext) -> tuple[int, list[Expr]]:
    """How many rows of each partition to keep, and the conditions that are about something else.

    Raises `UnsupportedQueryError` if the number is not bounded, or compared in another way.
    """
    assert relation.ranking is not None
    bounds, rest = [], []
    for condition in conditions:
        columns = {relation.column(*place) for place in mentions(condition, session)}
        if relation.ranking.column not in columns:
            rest.append(condition)
            continue
        bounds.append(_bound(condition))
    if not bounds:
        relation.known()
    return min(bounds), rest


def _bound(condition: Expr) -> int:
    """n of ``rn <= n``, ``rn < n + 1``, ``rn = 1``, either way round."""
    if condition.variant_name() == "BinaryExpr":
        variant = condition.to_variant()
        op, left, right = variant.op(), as_expr(variant.left()), as_expr(variant.right())
        if left.variant_name() == "Literal":
            left, right, op = right, left, _FLIPPED.get(op, "")
        if bare(left).variant_name() == "Column" and right.variant_name() == "Literal":
            value = right.python_value()
            number = value.as_py() if isinstance(value, pa.Scalar) else value
            if isinstance(number, int) and not isinstance(number, bool):
                limit = {"<=": number, "<": number - 1, "=": number}.get(op)
                if limit is not None and limit >= 1 and (op != "=" or limit == 1):
                    return limit
    raise UnsupportedQueryError(
        f"the condition {shown(condition)} on a row number", "keep the first rows: rn <= n with a number, or rn = 1"
    )


def first_rows(relation: Relation, n: int, names: OperatorNames) -> Relation:
    """The first rows of each partition, with their number."""
    ranking = relation.ranking
    assert ranking is not None
    stream = relation.stream
    time = stream.event_time
    if (
        n == 1
        and ranking.window_ms is None
        and ranking.partition
        and ranking.order[0][0] == time
        and time not in ranking.partition
    ):
        found = _only_row(stream, ranking, names)
        used = any(f.column == ranking.column for f in relation.fields)
        if used:
            found = found.with_column(ranking.column, lit(1))
        return replace(relation, stream=found, ranking=None)
    order = [column_named(c).sort(ascending=a, nulls_first=f) for c, a, f in ranking.order]
    words = [*ranking.partition, *([] if ranking.window_ms is None else [str(ranking.window_ms)])]
    name = names.claim("top_n", str(n), *words)
    window = ranking.window_ms
    found = stream.top_n(n, ranking.partition, order, with_rank=ranking.column, window=window, name=name)
    return replace(relation, stream=found, ranking=None)


def _only_row(stream: DataStream, ranking: Ranking, names: OperatorNames) -> DataStream:
    """The first row by event time, or the last."""
    (_, first, _), *others = ranking.order
    order: list[SortExpr] = []
    for name, ascending, nulls_first in others:
        # The last row in an order is the first in the opposite one.
        up, nulls = (ascending, nulls_first) if first else (not ascending, not nulls_first)
        order.append(column_named(name).sort(ascending=up, nulls_first=nulls))
    keep = "first" if first else "last"
    name = names.claim("deduplicate", *ranking.partition, keep)
    return stream.deduplicate(ranking.partition, keep=keep, order_by=order, name=name)
