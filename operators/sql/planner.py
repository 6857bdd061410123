"""From DataFusion's logical plan to streams: one method per kind of node, and a refusal for every other.

The plan is the one that DataFusion makes first. Its optimiser rewrites for rows that end (it merges, reorders and
turns DISTINCT into aggregates), and what a stream needs to see, windows above all, is plainer before.

Invariant: a node is translated with all of its properties or refused. A part of a query is never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import and_
from typing import Any

import pyarrow as pa
from datafusion import Expr, LogicalPlan, SessionContext, lit
from datafusion import functions as f
from datafusion.expr import TableScan

from operators.changelog import OP
from operators.engine import column_named
from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.asof import Lateral, join_newest, lateral_of
from operators.sql.catalog import planned
from operators.sql.expressions import as_expr, bare, conjuncts, mentions, output_name, shown
from operators.sql.grouping import grouping_sets, is_grouping, repeated
from operators.sql.joins import join_lookup, join_streams
from operators.sql.names import BOUND_FUNCTIONS, OperatorNames
from operators.sql.ranking import first_rows, ranked, split_bound
from operators.sql.relation import Field, Lookup, Relation, free_name, uncast, unseen, without_bounds
from operators.sql.sets import all_rows, is_set_operation, rows_by_side, sides_of
from operators.sql.subqueries import is_table_function, reads_tables_only, rows_of
from operators.sql.time_functions import Window, is_date_bin, is_window, window_of
from operators.sql.unnest import unnested
from operators.stateful.window_aggregate import WINDOW_END, WINDOW_START
from operators.stream import DataStream

__all__ = ["plan_query", "plan_stream"]

_REFUSED = {
    "Sort": ("ORDER BY", "a stream has no last row to sort; keep the first n with row_number() <= n in a subquery"),
    "Limit": (
        "LIMIT or OFFSET",
        "the first rows of a stream depend on its batches; use row_number() <= n in a subquery",
    ),
    "RecursiveQuery": ("WITH RECURSIVE", "a stream cannot be its own input"),
    "EmptyRelation": ("a SELECT without FROM", "select from a registered stream"),
    "Values": ("VALUES", "register the rows as a table and join it"),
    "Explain": ("EXPLAIN", "call explain() on the stream that sql() returns"),
    "Subquery": ("LATERAL without a name", "write LATERAL (…) AS x"),
}


def plan_query(
    query: str, session: SessionContext, streams: Mapping[str, DataStream], tables: Iterable[str], name: str
) -> DataStream:
    """The stream of a query's rows; see `StreamContext.sql`."""
    return plan_stream(planned(session, query), session, streams, tables, name)


def plan_stream(
    plan: LogicalPlan, session: SessionContext, streams: Mapping[str, DataStream], tables: Iterable[str], name: str
) -> DataStream:
    """The stream of a plan's rows; ``name`` begins the ids of its operators."""
    planner = _Planner(session, streams, frozenset(tables), OperatorNames(name))
    try:
        return planner.result(plan)
    except (ValueError, TypeError) as error:  # of a verb: wrong durations, and the like
        raise SchemaError(f"sql: {error}") from error
    except Exception as error:
        if type(error) is not Exception:  # which the binding raises for all that DataFusion says
            raise
        raise SchemaError(f"sql: {str(error).removeprefix('DataFusion error: ')}") from error


class _Planner:
    def __init__(
        self,
        session: SessionContext,
        streams: Mapping[str, DataStream],
        tables: frozenset[str],
        names: OperatorNames,
    ) -> None:
        self._session = session
        self._streams = streams
        self._tables = tables
        self._names = names
        self._handlers: dict[str, Callable[[Any, LogicalPlan], Relation | Lookup]] = {
            "TableScan": self._scan,
            "SubqueryAlias": self._alias,
            "Projection": self._projection,
            "Filter": self._filter,
            "Unnest": self._unnest,
            "Union": self._union,
            "Aggregate": self._aggregate,
            "Distinct": self._distinct,
            "Join": self._join,
            "WindowExpr": self._window_expr,
        }

    def walk(self, plan: LogicalPlan) -> Relation | Lookup:
        """The relation that a node of the plan stands for."""
        variant = plan.to_variant()
        kind = type(variant).__name__
        if handler := self._handlers.get(kind):
            return handler(variant, plan)
        part, instead = _REFUSED.get(kind, (plan.display(), "this is not known over streams"))
        raise UnsupportedQueryError(part, instead)

    def result(self, plan: LogicalPlan) -> DataStream:
        """The stream with the names that the query gives its columns."""
        found = None if reads_tables_only(plan, self._tables) else self.walk(plan)
        if not isinstance(found, Relation):
            raise UnsupportedQueryError(
                "a query of tables alone", "select from a registered stream, and join the table"
            )
        relation = found.known()
        names = [field.name for field in relation.fields]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SchemaError(f"sql: the result has columns {twice} twice; give one an alias, with AS")
        if lost := relation.hidden:
            updates = relation.stream.updates
            assert updates is not None
            raise UnsupportedQueryError(
                f"a SELECT without {', '.join(lost)}",
                f"{updates.because}, and this tells which row a correction is about: select it too",
            )
        visible = [n for n in relation.stream.schema.names if n not in relation.unseen]
        if [field.column for field in relation.fields] == visible == names:
            return relation.stream
        return self._select(relation, [(column_named(field.column), field.name) for field in relation.fields])

    def _stream_of(self, plan: LogicalPlan, what: str) -> Relation:
        """The one input of a node, a stream."""
        found = self.walk(plan.inputs()[0])
        if isinstance(found, Lookup):
            raise UnsupportedQueryError(
                f"{what} over the table {found.alias}", "make it a subquery with a name, and join a stream with it"
            )
        return found

    # -- sources

    def _scan(self, node: TableScan, plan: LogicalPlan) -> Relation | Lookup:
        name = node.table_name()
        if any(part is not None for part in node.fqn()[:2]):
            raise UnsupportedQueryError(
                ".".join(part for part in node.fqn() if part is not None),
                f"streams and tables are in no schema; write {node.fqn()[2]}",
            )
        if name in self._tables:
            return Lookup(rows=self._session.table(_quoted(name)).to_arrow_table(), alias=name)
        if name not in self._streams and is_table_function(name):
            return Lookup(rows=rows_of(self._session, plan, name), alias=name)
        if name not in self._streams:
            raise UnsupportedQueryError(
                f"rows of {name}", "a sink is only written to; read what it wrote through a table of its own"
            )
        stream = self._streams[name]
        columns = [c for c in stream.schema.names if c not in unseen(stream)]
        return Relation(stream=stream, fields=tuple(Field(relation=name, name=c, column=c) for c in columns))

    def _alias(self, node: Any, plan: LogicalPlan) -> Relation | Lookup:
        alias = str(node.alias())
        if reads_tables_only(plan, self._tables):
            return Lookup(rows=rows_of(self._session, plan, alias), alias=alias)
        found = self.walk(plan.inputs()[0])
        return replace(found, alias=alias) if isinstance(found, Lookup) else found.renamed(alias)

    # -- row by row

    def _projection(self, node: Any, plan: LogicalPlan) -> Relation | Lookup:
        found = self._stream_of(plan, "a SELECT")
        exprs = [as_expr(e) for e in node.projections()]
        outputs = [output_name(e) for e in exprs]
        names: list[str] = []
        picked: list[tuple[Expr, str]] = []
        ranking = found.ranking
        waiting = () if ranking is None else _kept(found)
        awaited = () if ranking is None else ranking.awaited
        reserved = [*found.unseen, *waiting, *awaited]
        repeated = {g.column for g in found.fields if g.repeated}
        for expr, (_, name) in zip(exprs, outputs, strict=True):
            bound = uncast(found.bound(expr, self._session), found.stream.schema, self._session)
            if ranking is not None and (computed := ranking.computed.get(bound.canonical_name())):
                bound = column_named(computed)
            if waits := [column for column in awaited if column in _columns(bound, self._session)]:
                if bound.variant_name() != "Column":
                    raise UnsupportedQueryError(shown(expr), "select row_number() as it is, and bound it: rn <= n")
                names += waits
                continue
            plain = bound.to_variant().name() if bound.variant_name() == "Column" else None
            if plain in waiting:
                names.append(plain)
                continue
            free = name if plain == name and name not in names else free_name(name, [*names, *reserved])
            names.append(free)
            picked.append((bound, free))
        stream = self._select(found, [*picked, *((column_named(c), c) for c in waiting)])
        again = {name for plain, name in _plain_pairs(picked) if plain in repeated}
        fields = tuple(
            Field(relation=r, name=n, column=c, repeated=c in again) for (r, n), c in zip(outputs, names, strict=True)
        )
        return Relation(stream=stream, fields=fields, ranking=ranking)

    def _select(self, relation: Relation, picked: Sequence[tuple[Expr, str]]) -> DataStream:
        """These expressions under these names, and what goes along unseen; nothing new if that is all there is.

        Columns that tell which row a correction is about go along too.
        """
        stream = relation.stream
        pairs = _plain_pairs(picked)
        lost = () if stream.updates is None else set(stream.updates.key) - {column for column, _ in pairs}
        taken = [*relation.unseen, *(name for _, name in picked)]
        along = [(c, c) for c in relation.unseen]
        for column in sorted(lost):
            along.append((column, free_name(column, taken)))
            taken.append(along[-1][1])
        if len(pairs) == len(picked) and [*along, *pairs] == [(c, c) for c in stream.schema.names]:
            return stream
        exprs = [*((column_named(c), name) for c, name in along), *picked]
        return stream.select(*(expr.alias(name) for expr, name in exprs))

    def _filter(self, node: Any, plan: LogicalPlan) -> Relation:
        conditions = list(conjuncts(as_expr(node.predicate())))
        below = plan.inputs()[0]
        if type(below.to_variant()).__name__ == "Join" and _join_type(below) == "Inner":
            found: Relation | Lookup = self._joined(below, conditions)
        else:
            found = self._stream_of(plan, "a WHERE")
            if found.ranking is not None:
                n, conditions = split_bound(found, conditions, self._session)
                found = first_rows(found, n, self._names)
            found = self._filtered(found, conditions)
        assert isinstance(found, Relation)
        return found

    def _filtered(self, relation: Relation, conditions: Sequence[Expr]) -> Relation:
        if not conditions:
            return relation
        predicate = reduce(and_, (relation.bound(condition, self._session) for condition in conditions))
        return replace(relation, stream=relation.stream.filter(predicate))

    def _unnest(self, _: Any, plan: LogicalPlan) -> Relation:
        return unnested(self._stream_of(plan, "an UNNEST").known(), plan)

    def _union(self, _: Any, plan: LogicalPlan) -> Relation:
        found = [self.walk(child) for child in plan.inputs()]
        relations = [r.known() for r in found if isinstance(r, Relation)]
        if len(relations) < len(found):
            raise UnsupportedQueryError("UNION with a table", "make a stream of it, with from_batches")
        return all_rows(relations, self._names)

    def _set_operation(self, plan: LogicalPlan) -> Relation:
        found = [self.walk(side) for side in sides_of(plan)]
        relations = [r.known() for r in found if isinstance(r, Relation)]
        if len(relations) < len(found):
            raise UnsupportedQueryError("INTERSECT or EXCEPT with a table", "join with the table instead")
        return rows_by_side(plan, relations, self._names)

    # -- groups

    def _aggregate(self, node: Any, plan: LogicalPlan) -> Relation:
        found = self._stream_of(plan, "a GROUP BY").known()
        groups = [as_expr(e) for e in node.group_by_exprs()]
        calls = [as_expr(e) for e in node.aggregate_exprs()]
        sets = grouping_sets(groups, self._session)
        if sets is None:
            return self._grouped(found, groups, calls)
        windows = [place for place, expr in enumerate(sets.exprs) if self._is_window(found, expr)]
        rows = repeated(found, sets, windows, self._session, self._names)
        result = self._grouped(rows.relation, rows.groups, [call for call in calls if not is_grouping(call)])
        return rows.named(result, calls)

    def _grouped(self, found: Relation, groups: Sequence[Expr], calls: Sequence[Expr]) -> Relation:
        """The groups and aggregates, in this order."""
        places = [i for i, e in enumerate(groups) if self._is_window(found, e)]
        if len(places) > 1:
            raise UnsupportedQueryError(
                "two windows in one GROUP BY", "group twice, the second time over the first result"
            )
        _require_unique(found, groups)
        window = self._window(found, groups[places[0]]) if places else None
        stream = found.stream
        if window is not None:
            found = without_bounds(found)
            stream = found.stream
        bounds = {i: name for i, e in enumerate(calls) if (name := _bound_function(e)) is not None}
        if bounds and window is None:
            raise UnsupportedQueryError(
                f"{next(iter(bounds.values()))}() without a window", "say GROUP BY tumble(ts, INTERVAL '10 seconds')"
            )
        taken = [OP, WINDOW_START, WINDOW_END]
        keys: list[Expr] = []
        functions: list[Expr] = []
        fields: list[Field] = []
        for number, expr in enumerate([*groups, *calls]):
            relation, name = output_name(expr)
            called = bounds.get(number - len(groups))
            if number in places:
                column = WINDOW_START
            elif called is not None:
                column = called
            else:
                column = free_name(name, taken)
                (keys if number < len(groups) else functions).append(found.bound(expr, self._session).alias(column))
                taken.append(column)
            again = number in places and window is not None and window.function == "cumulate"
            fields.append(Field(relation=relation, name=name, column=column, repeated=again))
        if not functions:
            functions = [_nothing(taken)]
        words = [key.schema_name() for key in keys]
        if window is None:
            result = stream.aggregate(keys, functions, name=self._names.claim("aggregate", *words))
        else:
            name = self._names.claim(window.function, *words, *map(str, window.spans))
            result = window.aggregate(stream, keys, functions, name)
        return Relation(stream=result, fields=tuple(fields))

    def _is_window(self, relation: Relation, expr: Expr) -> bool:
        """Whether a group is a window; a ``date_bin`` of another column than event time is a key like any."""
        if not is_window(expr):
            return False
        if self._is_window_of_join(relation, expr):
            return True
        if not is_date_bin(expr):
            return True
        places = mentions(expr, self._session)
        return len(places) == 1 and relation.column(*places[0]) == relation.stream.event_time

    def _is_window_of_join(self, relation: Relation, expr: Expr) -> bool:
        """Whether a group is the window in which rows were joined, whose start is their event time."""
        found = relation.calls.get(bare(expr).canonical_name())
        return found is not None and found == relation.stream.event_time

    def _window(self, relation: Relation, expr: Expr) -> Window:
        window = window_of(expr)
        time = bare(window.time)
        event_time = relation.stream.event_time
        if self._is_window_of_join(relation, expr) and window.function == "tumble":
            return window
        if time.variant_name() != "Column" or relation.column(*output_name(time)) != event_time:
            has = "this stream has none" if event_time is None else f"here that is {event_time!r}"
            raise UnsupportedQueryError(shown(expr), f"its first argument must be the stream's event time; {has}")
        return window

    def _distinct(self, _: Any, plan: LogicalPlan) -> Relation:
        if plan.display().startswith("DistinctOn"):
            raise UnsupportedQueryError("DISTINCT ON", "use row_number() OVER (PARTITION BY … ORDER BY …) = 1")
        found = self._stream_of(plan, "a DISTINCT").known()
        keys = [column_named(field.column) for field in found.fields]
        taken = [field.column for field in found.fields]
        name = self._names.claim("distinct", *taken)
        return replace(found, stream=found.stream.aggregate(keys, [_nothing(taken)], name=name))

    def _window_expr(self, node: Any, plan: LogicalPlan) -> Relation:
        return ranked(self._stream_of(plan, "a row_number()").known(), node.get_window_expr(), self._session)

    # -- joins

    def _join(self, _: Any, plan: LogicalPlan) -> Relation:
        return self._joined(plan, [])

    def _joined(self, plan: LogicalPlan, where: list[Expr]) -> Relation:
        """A join; ``where``: conditions of a filter right above an inner join, which are conditions of it."""
        node = plan.to_variant()
        kind = _join_type(plan)
        if is_set_operation(plan):
            return self._set_operation(plan)
        if kind in ("Right", "Full") and "Using" in str(node.join_constraint()):
            raise UnsupportedQueryError(
                f"a {kind} join with USING or NATURAL",
                "DataFusion takes the common columns from the left; write ON, and coalesce(a.k, b.k) for such a column",
            )
        if (lateral := lateral_of(plan.inputs()[1])) is not None:
            return self._with_newest(plan, kind, lateral, where)
        left, right = (self.walk(child) for child in plan.inputs())
        conditions = [as_expr(a) == as_expr(b) for a, b in node.on()]
        if (condition := node.filter()) is not None:
            conditions += conjuncts(as_expr(condition))
        conditions += where
        if isinstance(left, Lookup):
            if isinstance(right, Lookup):
                raise UnsupportedQueryError("a join of two tables", "join them before they are registered")
            order = [f"{left.alias}.{name}" for name in left.rows.schema.names]
            joined, rest = join_lookup(right.known(), left, _mirrored(kind), conditions, self._session, self._names)
            fields = sorted(joined.fields, key=lambda g: f"{g.relation}.{g.name}" not in order)
            return self._filtered(replace(joined, fields=tuple(fields)), rest)
        if isinstance(right, Lookup):
            joined, rest = join_lookup(left.known(), right, kind, conditions, self._session, self._names)
            return self._filtered(joined, rest)
        return join_streams(left.known(), right.known(), kind, conditions, self._session, self._names)

    def _with_newest(self, plan: LogicalPlan, kind: str, lateral: Lateral, where: Sequence[Expr]) -> Relation:
        """A join with a LATERAL subquery."""
        left, versions = self.walk(plan.inputs()[0]), self.walk(lateral.versions)
        if isinstance(left, Lookup) or isinstance(versions, Lookup):
            raise UnsupportedQueryError(f"LATERAL {lateral.alias} with a table", "join with the table by its key")
        condition = plan.to_variant().filter()
        conditions = [] if condition is None else [c for c in conjuncts(as_expr(condition)) if not _is_true(c)]
        if kind not in ("Inner", "Left") or (kind == "Left" and conditions):
            raise UnsupportedQueryError(
                f"the {kind} join with LATERAL {lateral.alias}", "write JOIN or LEFT JOIN LATERAL (…) ON true"
            )
        joined = join_newest(left.known(), versions.known(), lateral, kind.lower(), self._session, self._names)
        return self._filtered(joined, [*conditions, *where])


def _join_type(plan: LogicalPlan) -> str:
    return str(plan.to_variant().join_type()).removeprefix("JoinType.")


def _is_true(condition: Expr) -> bool:
    return condition.variant_name() == "Literal" and condition.python_value() == pa.scalar(value=True)


def _mirrored(kind: str) -> str:
    other = kind.replace("Left", "Right")
    return kind.replace("Right", "Left") if other == kind else other


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _kept(relation: Relation) -> tuple[str, ...]:
    """The columns that a row number waits for, and the event time, which tells which operator computes it."""
    assert relation.ranking is not None
    time = relation.stream.event_time
    return tuple(dict.fromkeys([*relation.ranking.needs, *([time] if time else [])]))


def _require_unique(relation: Relation, groups: Sequence[Expr]) -> None:
    """Refuse to group by what DataFusion takes for unique and is not: it adds groups that the query does not have."""
    plain = {relation.column(*output_name(e)) for e in map(bare, groups) if e.variant_name() == "Column"}
    if found := [field.name for field in relation.fields if field.repeated and field.column in plain]:
        raise UnsupportedQueryError(
            f"GROUP BY {found[0]}, the start of cumulate() windows",
            "several of them have the same start: group by window_end_time(), or by tumble() of the start",
        )


def _nothing(taken: Sequence[str]) -> Expr:
    """An aggregate that is always 0, also when rows are taken back, for groups of which nothing else is asked."""
    return f.count(lit(None).cast(pa.int64())).alias(free_name("nothing", taken))


def _plain_pairs(picked: Sequence[tuple[Expr, str]]) -> list[tuple[str, str]]:
    return [(e.to_variant().name(), name) for e, name in picked if e.variant_name() == "Column"]


def _columns(expr: Expr, session: SessionContext) -> set[str]:
    return {name for _, name in mentions(expr, session)}


def _bound_function(expr: Expr) -> str | None:
    inner = bare(expr)
    if inner.variant_name() != "AggregateFunction":
        return None
    name = inner.to_variant().aggregate_type()
    return name if name in BOUND_FUNCTIONS else None
