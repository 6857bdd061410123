"""LATERAL subqueries that pick the newest row of a key at or before the time of each row: as-of joins.

SQL has no join with versions of its own that DataFusion plans, but it says what one is::

    FROM orders AS o LEFT JOIN LATERAL (
        SELECT r.rate FROM rates AS r WHERE r.currency = o.currency AND r.ts <= o.ts ORDER BY r.ts DESC LIMIT 1
    ) AS v ON true

Any other LATERAL is refused. An expression that names a column of the other side has no protobuf; its parts are looked
at one by one, and the column is known by its text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from operator import and_
from typing import Any

from datafusion import Expr, LogicalPlan, SessionContext

from operators.engine import column_named
from operators.errors import UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, conjuncts, output_name, shown
from operators.sql.names import OperatorNames
from operators.sql.relation import Field, Relation, free_name, with_columns
from operators.sql.time_functions import milliseconds_of
from operators.watermark import EventTimeColumn

__all__ = ["Lateral", "join_newest", "lateral_of"]

_FORM = "LATERAL (SELECT … FROM v WHERE v.k = o.k AND v.ts <= o.ts ORDER BY v.ts DESC LIMIT 1)"
_OUTER = "outer_ref("
_MIRRORED = {"=": "=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lateral:
    """A LATERAL subquery, taken apart: ``versions`` is what it reads, ``conditions`` its WHERE, ``projections`` its
    columns from the bottom up, ``order`` what it is sorted by after the first ``sorted_after`` of those."""

    alias: str
    versions: LogicalPlan
    conditions: tuple[Expr, ...]
    projections: tuple[tuple[Expr, ...], ...]
    order: Any
    sorted_after: int


@dataclass(slots=True)
class _Correlation:
    """What ties a version to a row: equal columns, and how much older it may be in milliseconds, None for any."""

    pairs: list[tuple[Expr, str]] = field(default_factory=list)
    at_or_before: bool = False
    tolerance: int | None = None


def lateral_of(plan: LogicalPlan) -> Lateral | None:
    """The LATERAL subquery that a side of a join is, None if it is none.

    Raises `UnsupportedQueryError` for one of another form.
    """
    alias = plan.to_variant()
    if type(alias).__name__ != "SubqueryAlias" or _kind(plan.inputs()[0]) != "Subquery":
        return None
    (node,) = plan.inputs()[0].inputs()
    steps: list[Any] = []
    while (kind := _kind(node)) in ("Limit", "Sort", "Projection"):
        steps.insert(0, (kind, node))
        (node,) = node.inputs()
    kinds = [kind for kind, _ in steps]
    limits = [step for kind, step in steps if kind == "Limit"]
    if kinds.count("Sort") != 1 or kinds[-1] != "Limit" or len(limits) != 1 or _kind(node) != "Filter":
        raise _other_form(str(alias.alias()))
    if limits[0].display() != "Limit: skip=0, fetch=1":
        raise UnsupportedQueryError(f"{limits[0].display()} of LATERAL {alias.alias()}", "say LIMIT 1")
    (sort,) = (step for kind, step in steps if kind == "Sort")
    return Lateral(
        alias=str(alias.alias()),
        versions=node.inputs()[0],
        conditions=tuple(conjuncts(as_expr(node.to_variant().predicate()))),
        projections=tuple(
            tuple(as_expr(e) for e in step.to_variant().projections()) for kind, step in steps if kind == "Projection"
        ),
        order=sort.to_variant().sort_exprs(),
        sorted_after=kinds[: kinds.index("Sort")].count("Projection"),
    )


def join_newest(
    left: Relation, versions: Relation, lateral: Lateral, how: str, session: SessionContext, names: OperatorNames
) -> Relation:
    """Each row of the left with the newest version that the LATERAL picks; ``how`` is inner or left."""
    if left.stream.event_time is None or versions.stream.event_time is None:
        raise UnsupportedQueryError(
            f"LATERAL {lateral.alias} of streams without event time",
            "both sides need one, to find the newest row",
        )
    correlation = _Correlation()
    rest = []
    for condition in lateral.conditions:
        if _OUTER not in condition.canonical_name():
            rest.append(versions.bound(condition, session))
        elif not _correlated(correlation, left, versions, condition):
            raise UnsupportedQueryError(
                f"the condition {shown(condition)} of LATERAL {lateral.alias}",
                f"beside conditions on the versions alone: equal columns, and event times; {_FORM}",
            )
    if not correlation.pairs or not correlation.at_or_before:
        raise _other_form(lateral.alias)
    if rest:
        versions = replace(versions, stream=versions.stream.filter(reduce(and_, rest)))
    keys = [versions.bound(expr, session) for expr, _ in correlation.pairs]
    versions, right_on = with_columns(versions, keys)
    versions = _columns(versions, lateral, session)
    time = versions.stream.event_time
    needed = dict.fromkeys([*right_on, *([time] if time else []), *(f.column for f in versions.fields)])
    apart: dict[str, str] = {}
    for name in needed:
        apart[name] = free_name(name, [*left.stream.schema.names, *apart.values()])
    stream = versions.stream.select(*(column_named(old).alias(new) for old, new in apart.items()))
    joined = left.stream.asof_join(
        stream,
        how=how,
        tolerance=correlation.tolerance,
        left_on=[column for _, column in correlation.pairs],
        right_on=[apart[column] for column in right_on],
        name=names.claim("asof", lateral.alias, *(column for _, column in correlation.pairs)),
    )
    fields = tuple(Field(relation=lateral.alias, name=f.name, column=apart[f.column]) for f in versions.fields)
    return Relation(stream=joined, fields=(*left.fields, *fields))


def _columns(versions: Relation, lateral: Lateral, session: SessionContext) -> Relation:
    """The versions with the columns that the subquery selects, each at its place."""
    for number, projection in enumerate((*lateral.projections, None)):
        if number == lateral.sorted_after:
            _check_order(versions, lateral)
        if projection is not None:
            exprs = [versions.bound(expr, session) for expr in projection]
            versions, columns = with_columns(versions, exprs)
            fields = [(*output_name(expr), column) for expr, column in zip(projection, columns, strict=True)]
            versions = replace(versions, fields=tuple(Field(relation=r, name=n, column=c) for r, n, c in fields))
    return versions


def _check_order(versions: Relation, lateral: Lateral) -> None:
    order = [(bare(as_expr(sort.expr())), sort.ascending()) for sort in lateral.order]
    (expr, ascending), *more = order
    newest_first = expr.variant_name() == "Column" and not ascending
    if more or not newest_first or versions.column(*output_name(expr)) != versions.stream.event_time:
        raise UnsupportedQueryError(
            f"the ORDER BY of LATERAL {lateral.alias}",
            f"say ORDER BY {versions.stream.event_time} DESC, the event time of the versions, and nothing else",
        )


def _correlated(found: _Correlation, left: Relation, versions: Relation, condition: Expr) -> bool:
    """Note a condition on both sides; False if it is none that such a join can ask."""
    variant = condition.to_variant()
    if condition.variant_name() == "Between" and not variant.negated():
        low, expr, high = (as_expr(e) for e in (variant.low(), variant.expr(), variant.high()))
        return _compared(found, left, versions, expr, ">=", low) and _compared(found, left, versions, expr, "<=", high)
    if condition.variant_name() != "BinaryExpr":
        return False
    one, op, other = as_expr(variant.left()), variant.op(), as_expr(variant.right())
    if _OUTER in one.canonical_name():
        one, op, other = other, _MIRRORED.get(op, ""), one
    if op == "=" and (column := _outer_column(left, other)) is not None and _OUTER not in one.canonical_name():
        found.pairs.append((one, column))
        return True
    return _compared(found, left, versions, one, op, other)


def _compared(found: _Correlation, left: Relation, versions: Relation, one: Expr, op: str, other: Expr) -> bool:
    """Note ``v.ts <= o.ts``, or ``v.ts >= o.ts - INTERVAL …``."""
    one = bare(one)
    if one.variant_name() != "Column" or versions.column(*output_name(one)) != versions.stream.event_time:
        return False
    column = _outer_column(left, other)
    if op == "<=" and column is not None and column == left.stream.event_time:
        found.at_or_before = True
        return True
    if op != ">=" or other.variant_name() != "BinaryExpr" or other.to_variant().op() != "-":
        return False
    variant = other.to_variant()
    time = left.stream.event_time
    even_days = time is not None and EventTimeColumn(left.stream.schema, time).has_even_days
    span = milliseconds_of(as_expr(variant.right()), even_days=even_days)
    if span is None or span < 0 or _outer_column(left, as_expr(variant.left())) != time:
        return False
    found.tolerance = span if found.tolerance is None else min(span, found.tolerance)
    return True


def _outer_column(left: Relation, expr: Expr) -> str | None:
    """The column of the left that an expression is."""
    if expr.variant_name() != "Outer":
        return None
    text = expr.canonical_name().removeprefix(_OUTER).removesuffix(")")
    columns = {f.column for f in left.fields if text == (f.name if f.relation is None else f"{f.relation}.{f.name}")}
    return columns.pop() if len(columns) == 1 else None


def _kind(plan: LogicalPlan) -> str:
    return type(plan.to_variant()).__name__


def _other_form(alias: str) -> UnsupportedQueryError:
    return UnsupportedQueryError(
        f"LATERAL {alias}",
        f"only the newest row of a key can be asked for, {_FORM}; the elements of a list: SELECT unnest(list)",
    )
