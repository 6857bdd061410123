"""Set operations: UNION ALL as `DataStream.union`, INTERSECT and EXCEPT as groups that know on which sides they were.

DataFusion plans INTERSECT as a semi join of the distinct left rows that takes nulls for equal, EXCEPT as an anti join.
A stream answers both by grouping the rows of all sides by all columns, each with a flag per side: a row of EXCEPT
is taken back when it comes on another side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import and_, or_

import pyarrow as pa
from datafusion import LogicalPlan, lit
from datafusion import functions as f

from operators.changelog import OP
from operators.engine import column_named
from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.names import OperatorNames
from operators.sql.relation import Field, Relation, common_type, free_name
from operators.stream import DataStream

__all__ = ["all_rows", "is_set_operation", "rows_by_side", "sides_of"]

_KINDS = {"LeftSemi": "INTERSECT", "LeftAnti": "EXCEPT"}


def is_set_operation(plan: LogicalPlan) -> bool:
    """Whether a join stands for INTERSECT or EXCEPT."""
    return _kind(plan) in _KINDS and bool(plan.to_variant().null_equals_null())


def sides_of(plan: LogicalPlan) -> list[LogicalPlan]:
    """The inputs of a chain of INTERSECT or of EXCEPT: the first one, and those that it is compared with.

    Raises `UnsupportedQueryError` for INTERSECT ALL and EXCEPT ALL, which DataFusion plans as joins without counts.
    """
    left, right = plan.inputs()
    if type(left.to_variant()).__name__ != "Distinct":
        kind = _KINDS[_kind(plan)]
        raise UnsupportedQueryError(f"{kind} ALL", f"DataFusion does not count rows here; say {kind}")
    (first,) = left.inputs()
    while type(first.to_variant()).__name__ == "SubqueryAlias":
        (first,) = first.inputs()
    if is_set_operation(first) and _kind(first) == _kind(plan):
        return [*sides_of(first), right]
    return [first, right]


def _kind(plan: LogicalPlan) -> str:
    node = plan.to_variant()
    if type(node).__name__ != "Join":
        return ""
    return str(node.join_type()).removeprefix("JoinType.")


def all_rows(relations: Sequence[Relation], names: OperatorNames) -> Relation:
    """The rows of all of them, under the names of the first.

    Raises `SchemaError` where types differ that have no common one.
    """
    fields, streams = _alike("UNION", relations)
    return Relation(stream=streams[0].union(*streams[1:], name=names.claim("union")), fields=fields)


def rows_by_side(plan: LogicalPlan, relations: Sequence[Relation], names: OperatorNames) -> Relation:
    """The distinct rows of the first that are in all others (INTERSECT), or in none (EXCEPT): a changelog."""
    kind = _KINDS[_kind(plan)]
    if corrected := [r.stream.updates for r in relations if r.stream.updates is not None]:
        raise UnsupportedQueryError(
            f"{kind} of rows that are corrected ({corrected[0].because})", "a GROUP BY with a window has final rows"
        )
    fields, streams = _alike(kind, relations)
    columns = [field.column for field in fields]
    flags: list[str] = []
    for _ in streams:
        flags.append(free_name("side", [OP, *columns, *flags]))
    flagged = [
        stream.select(*columns, *(lit(i == number).alias(flag) for i, flag in enumerate(flags)))
        for number, stream in enumerate(streams)
    ]
    both = flagged[0].union(*flagged[1:], name=names.claim("union"))
    seen = [f.bool_or(column_named(flag)).alias(flag) for flag in flags]
    groups = both.aggregate(columns, seen, name=names.claim(kind.lower(), *columns))
    first, *others = (column_named(flag) for flag in flags)
    kept = reduce(and_, others) if kind == "INTERSECT" else ~reduce(or_, others)
    return Relation(stream=groups.filter(first & kept).select(OP, *columns), fields=fields)


def _alike(what: str, relations: Sequence[Relation]) -> tuple[tuple[Field, ...], list[DataStream]]:
    """The streams with the columns of the relations, under the same names and of the same types."""
    names: list[str] = []
    for field in relations[0].fields:
        names.append(free_name(field.name, names))
    kinds: list[pa.DataType] = []
    for number, name in enumerate(names):
        found = [r.stream.schema.field(r.fields[number].column).type for r in relations]
        kind = reduce(lambda a, b: None if a is None else common_type(a, b), found)
        if kind is None:
            one, other = found[0], next(t for t in found if t != found[0])
            raise SchemaError(f"sql: {what}: column {name!r} is {one} here and {other} there: CAST one of them")
        kinds.append(kind)
    streams = []
    for relation in relations:
        picked = []
        for field, name, kind in zip(relation.fields, names, kinds, strict=True):
            column = column_named(field.column)
            same = relation.stream.schema.field(field.column).type == kind
            picked.append((column if same else column.cast(kind)).alias(name))
        streams.append(relation.stream.select(*relation.unseen, *picked))
    fields = tuple(replace(field, column=name) for field, name in zip(relations[0].fields, names, strict=True))
    return fields, streams
