"""GROUPING SETS, ROLLUP and CUBE as one ordinary GROUP BY.

Every row is grouped once for each set: the stream is repeated, each time with the groups that are not in the set as
nulls, and with a number that tells the sets apart. That number is one more group, so that the total of a set is never
mistaken for a group whose value is null, and one operator keeps the state of all of them. The number is what
``grouping()`` of all groups gives: a bit for each, the first one the highest, which is 1 where the group is not in
the set.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pyarrow as pa
from datafusion import Expr, SessionContext, lit

from operators.engine import column_named
from operators.errors import UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, output_name, shown
from operators.sql.names import OperatorNames
from operators.sql.relation import Field, Relation, free_name
from statebackend import read_wire

__all__ = ["GroupingSets", "RepeatedRows", "grouping_sets", "is_grouping", "repeated"]

# Numbers of DataFusion's LogicalExprNode.
_SETS, _CUBE, _ROLLUP = 22, 23, 24

_GROUPS_MAX = 12
"""Of a CUBE, which repeats each row 2 to the power of that many times."""


@dataclass(frozen=True, slots=True)
class GroupingSets:
    """``exprs``: each group once, in their order; ``sets``: the places in it of the groups of each set."""

    exprs: tuple[Expr, ...]
    sets: tuple[frozenset[int], ...]


def grouping_sets(groups: Sequence[Expr], session: SessionContext) -> GroupingSets | None:
    """The sets of a GROUP BY, None if it has none. DataFusion multiplies several of them out when it plans.

    Raises `UnsupportedQueryError` if a set is there twice, or there are too many.
    """
    found = [expr for expr in groups if bare(expr).variant_name() == "GroupingSet"]
    if not found:
        return None
    assert len(found) == len(groups) == 1
    ((number, value),) = read_wire(bare(found[0]).to_bytes(session))
    assert isinstance(value, bytes)
    inner = [data for _, data in read_wire(value)]
    if number == _SETS:
        sets = [[data for _, data in read_wire(one)] for one in inner]  # type: ignore[arg-type]
    elif number == _ROLLUP:
        sets = [inner[:length] for length in range(len(inner), -1, -1)]
    else:
        assert number == _CUBE
        if len(inner) > _GROUPS_MAX:
            raise UnsupportedQueryError(
                f"CUBE of {len(inner)} groups", f"it would repeat each row 2**{len(inner)} times; say GROUPING SETS"
            )
        sets = [list(some) for length in range(len(inner), -1, -1) for some in combinations(inner, length)]
    encoded = list(dict.fromkeys(data for members in sets for data in members))
    places = [frozenset(encoded.index(data) for data in members) for members in sets]
    if len(set(places)) < len(places):
        raise UnsupportedQueryError(shown(found[0]), "it has a set twice, whose rows would come twice; leave one out")
    exprs = tuple(Expr.from_bytes(data, session) for data in encoded)  # type: ignore[arg-type]
    return GroupingSets(exprs, tuple(places))


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedRows:
    """The rows of a relation for each of the sets, and what to group them by: ``groups``, of which the last one tells
    the sets apart. ``columns``: the places of the groups that are columns, which are all but windows."""

    relation: Relation
    sets: GroupingSets
    columns: tuple[int, ...]
    groups: tuple[Expr, ...]

    def named(self, result: Relation, calls: Sequence[Expr]) -> Relation:
        """The result of that grouping with the names of the query, and with the values of ``grouping()``.

        ``calls``: the aggregates of the query, of which the result has those that are not ``grouping()``.
        """
        *groups, number = result.fields[: len(self.groups)]
        rest = iter(result.fields[len(self.groups) :])
        fields = [
            Field(relation=relation, name=name, column=group.column)
            for group, (relation, name) in zip(groups, map(output_name, self.sets.exprs), strict=True)
        ]
        values: dict[str, Expr] = {}
        for call in calls:
            if not is_grouping(call):
                fields.append(next(rest))
                continue
            places = self._places(call)
            column = number.column
            if places != list(self.columns):
                column = free_name("grouping", [*result.stream.schema.names, *values])
                values[column] = self._bits(column_named(number.column), places)
            fields.append(Field(relation=None, name=output_name(call)[1], column=column))
        stream = result.stream.with_columns(**values) if values else result.stream
        return Relation(stream=stream, fields=tuple(fields))

    def _places(self, call: Expr) -> list[int]:
        """The places of the arguments of a ``grouping()``; DataFusion has seen to it that they are groups."""
        names = [bare(expr).canonical_name() for expr in self.sets.exprs]
        places = [names.index(bare(as_expr(argument)).canonical_name()) for argument in bare(call).to_variant().args()]
        if windows := [place for place in places if place not in self.columns]:
            raise UnsupportedQueryError(
                f"grouping({names[windows[0]]})", "a window is in every set, so this is 0; leave it out"
            )
        return places

    def _bits(self, number: Expr, places: Sequence[int]) -> Expr:
        """The bits of these groups out of those of all."""
        value = _int32(0)
        for place in places:
            weight = 1 << (len(self.columns) - 1 - self.columns.index(place))
            value = value * _int32(2) + (number / _int32(weight)) % _int32(2)
        return value.cast(pa.int32())


def is_grouping(expr: Expr) -> bool:
    """Whether an aggregate is ``grouping()``."""
    inner = bare(expr)
    return inner.variant_name() == "AggregateFunction" and inner.to_variant().aggregate_type() == "grouping"


def repeated(
    relation: Relation, found: GroupingSets, windows: Collection[int], session: SessionContext, names: OperatorNames
) -> RepeatedRows:
    """The rows of the relation for each of the sets. ``windows``: places of groups that are windows.

    Raises `UnsupportedQueryError` if one of those is not in all sets, or for rows that are corrected.
    """
    stream = relation.stream
    for place in windows:
        if any(place not in members for members in found.sets):
            raise UnsupportedQueryError(
                f"{shown(found.exprs[place])} in some of the GROUPING SETS",
                "a stream has results at the ends of windows; say GROUP BY tumble(…), ROLLUP (…)",
            )
    if stream.updates is not None:
        raise UnsupportedQueryError(
            f"GROUPING SETS of rows that are corrected ({stream.updates.because})", "write one query per set"
        )
    columns = tuple(place for place in range(len(found.exprs)) if place not in windows)
    taken = [*stream.schema.names, *(field.name for field in relation.fields)]
    copies: dict[int, str] = {}
    for place in columns:
        copies[place] = free_name(output_name(found.exprs[place])[1], [*taken, *copies.values()])
    words = ", ".join(output_name(found.exprs[place])[1] for place in columns)
    number = free_name(f"grouping({words})", [*taken, *copies.values()])
    bound = {copies[place]: relation.bound(found.exprs[place], session) for place in columns}
    kinds = stream.with_columns(**bound).schema
    branches = []
    for members in found.sets:
        absent = [place for place in columns if place not in members]
        nulls = {copies[place]: lit(None).cast(kinds.field(copies[place]).type) for place in absent}
        bits = sum(1 << (len(columns) - 1 - columns.index(place)) for place in absent)
        branches.append(stream.with_columns(**{**bound, **nulls, number: _int32(bits)}))
    first, *others = branches
    new = [*copies.values(), number]
    fields = tuple(Field(relation=None, name=name, column=name) for name in new)
    groups = [column_named(copies[place]) if place in copies else expr for place, expr in enumerate(found.exprs)]
    return RepeatedRows(
        relation=replace(
            relation,
            stream=first.union(*others, name=names.claim("grouping")) if others else first,
            fields=(*relation.fields, *fields),
        ),
        sets=found,
        columns=columns,
        groups=(*groups, column_named(number)),
    )


def _int32(value: int) -> Expr:
    return lit(pa.scalar(value, pa.int32()))
