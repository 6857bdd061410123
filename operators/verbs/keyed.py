"""Verbs by key, without windows: deduplication, the first n rows, aggregation, and the valid rows of a changelog."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypeVar

import pyarrow as pa
from datafusion import Expr, lit
from datafusion import functions as f
from datafusion.expr import SortExpr

from operators.changelog import Emit, Updates
from operators.engine import column_named, plain_column
from operators.errors import SchemaError
from operators.graph import Port
from operators.ordering import SortTerm, is_sortable
from operators.stateful.deduplicate import DeduplicateNode, DeduplicateSpec, Keep
from operators.stateful.group_aggregate import TICK, GroupAggregateNode, GroupSpec
from operators.stateful.materialize import MaterializeNode
from operators.stateful.tables import unused_name
from operators.stateful.top_n import TopNNode, TopNSpec
from operators.verbs.base import Column, StreamBase, expression_text
from operators.windows import Duration, milliseconds
from statebackend import Aggregation

__all__ = ["KeyedVerbs", "Order"]

_Choice = TypeVar("_Choice", Keep, Emit)

Order = SortExpr | Expr | str
"""One term of an ORDER BY: ``col("x").sort(ascending=False)``, or a column, ascending with nulls last."""


class KeyedVerbs(StreamBase):
    """One row, or a few, per key, kept up to date."""

    def deduplicate(
        self,
        key: Sequence[str] | str,
        *,
        keep: str = "first",
        order_by: Sequence[Order] | Order = (),
        ttl: Duration | None = None,
        emit: str = "changelog",
        name: str | None = None,
    ) -> Self:
        """Of all rows with one key, the first or the last by event time.

        ``order_by`` breaks ties of event time; rows that agree in it too come in the order of the stream, so
        the earliest is the first and the latest the last.

        ``emit``: "changelog": the kept row at once, with a column ``op``; another row that takes its place is
        an update. "upserts": the kept row at once, again for each that takes its place. "final": every
        row once, in the end; the first row of a key when the watermark has passed it (an append-only stream
        in the order of event time), the last row at the end of the input.

        ``ttl`` (timedelta or milliseconds): forget a key when the watermark has passed its row by as
        much; a row that comes later begins it anew. With "final" the first row is that of a span of ``ttl``: what comes
        within it is a duplicate, what comes after it begins the next, whatever the watermark. Rows
        older than the watermark by more than ``ttl`` go to `late_rows`. State: one row per key, for ever without a ttl.

        Raises `SchemaError` for a stream without event time or that corrects itself, and for wrong columns.
        """
        verb = "deduplicate"
        self._require_append_only(verb, "; use final_rows() first")
        event_time = self._require_event_time(verb)
        columns = self._key_columns(verb, key)
        kept, emitted = _one_of(Keep, keep, f"{verb}: keep"), _one_of(Emit, emit, f"{verb}: emit")
        ttl_ms = self._ttl(verb, ttl)
        if ttl_ms is not None and emitted is Emit.FINAL and kept is Keep.LAST:
            raise ValueError(f"{verb}: with a ttl the last row of a key is never final: use emit='upserts'")
        spec = DeduplicateSpec(
            schema=self._schema,
            event_time=event_time,
            key=columns,
            keep=kept,
            order_by=self._sort_terms(verb, order_by),
            ttl_ms=ttl_ms,
            emit=emitted,
        )
        schema = self._checked(verb, spec)
        node = DeduplicateNode(
            operator_id=self._claim(name, verb, *columns, str(kept)),
            input=self._port,
            spec=spec,
        )
        return self._derive(
            Port(node), schema, event_time=event_time, updates=_updates(emitted, columns, verb, node.operator_id)
        )

    def top_n(
        self,
        n: int,
        partition_by: Sequence[str] | str,
        order_by: Sequence[Order] | Order,
        *,
        ties: str = "first",
        with_rank: str | None = None,
        window: Duration | None = None,
        emit: str | None = None,
        name: str | None = None,
    ) -> Self:
        """The first ``n`` rows of every partition, in the order of ``order_by``.

        ``partition_by``: columns, or none for one partition of all rows. Rows that agree in the whole order come
        as they came in the stream. ``ties``: "first" keeps exactly n rows; "all" keeps every row with
        ``rank() <= n``, so more than n where some agree. ``with_rank`` names a column for the rank, from 1 (int64).

        With ``window`` (timedelta or milliseconds) partitions are cut into tumbling windows of
        event time; the result begins with ``window_start_time`` and ``window_end_time``. With it, or if the
        event time is among the columns of ``partition_by`` (as in the result of `window`), a partition is emitted
        once, when the watermark has passed it; rows that come later go to `late_rows`, and state is bounded.

        Otherwise partitions go on for ever, and ``emit`` is "changelog" (default) or "upserts", both by partition
        and rank (by partition alone with n = 1), which needs ``with_rank`` and ``ties="first"``, or "final", at the end
        of the input. State: n rows per partition.

        Raises `SchemaError` for a stream that corrects itself and for wrong columns, `ValueError` for the rest.
        """
        verb = "top_n"
        self._require_append_only(verb, "; use final_rows() first")
        if n < 1:
            raise ValueError(f"{verb}: n must be at least 1, not {n}")
        if ties not in ("first", "all"):
            raise ValueError(f"{verb}: ties must be 'first' or 'all', not {ties!r}")
        columns = self._key_columns(verb, partition_by) if partition_by else ()
        terms = self._sort_terms(verb, order_by)
        if not terms:
            raise ValueError(f"{verb}: order_by needs at least one column")
        span = None if window is None else _positive(window, f"{verb}: window")
        closing = self._require_event_time(verb) if span is not None else None
        if closing is None and self._event_time in columns:
            closing = self._event_time
        emitted = _one_of(Emit, emit or ("final" if closing else "changelog"), f"{verb}: emit")
        self._check_top_n(emitted, closing, with_rank, ties)
        spec = TopNSpec(
            schema=self._schema,
            n=n,
            partition_by=columns,
            order_by=terms,
            all_ties=ties == "all",
            rank=with_rank,
            emit=emitted,
            closing=closing,
            window_ms=span,
        )
        schema = self._checked(verb, spec)
        words = [verb, str(n), *columns, *([] if span is None else [str(span)])]
        node = TopNNode(operator_id=self._claim(name, *words), input=self._port, spec=spec)
        event_time = spec.window[0] if span is not None else self._event_time
        only = n == 1 and bool(columns)
        updates = _updates(emitted, columns if only else (*columns, with_rank or ""), verb, node.operator_id)
        return self._derive(Port(node), schema, event_time=event_time, time_note=self._time_note, updates=updates)

    def aggregate(
        self,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        *,
        emit: str = "changelog",
        emit_every: Duration | None = None,
        ttl: Duration | None = None,
        name: str | None = None,
    ) -> Self:
        """Aggregate by group over all rows so far.

        The result has the group columns and the aggregates; without group columns it is one row.

        ``emit``: "changelog": after each batch, every group whose result changed, with a column ``op``.
        "upserts": the same without what was before. "final": every group once, at the end of the input, for
        which state is written without being read. ``emit_every`` (timedelta or milliseconds): not after each
        batch but whenever event time passes a multiple of it, so that a group is emitted at most once per interval.

        A changelog as input is aggregated by adding what is inserted and subtracting what is taken back, which
        count, sum and avg allow; a group without rows is deleted. (Sums of floats are rounded each time, and a NaN
        or an infinity cannot be subtracted again.) A stream of upserts does not tell what it replaces and is refused.

        ``ttl`` (timedelta or milliseconds): forget a group when the watermark has passed its newest row by as
        much; nothing is emitted then, and rows that are older than that go to `late_rows`. State: one
        row of partial states per group, for ever without a ttl.

        Raises `SchemaError` for a wrong column or type, `UnsupportedAggregateError` for an aggregate that cannot
        be kept as state or cannot take rows back, `ValueError` for the rest.
        """
        verb = "aggregate"
        keys = [group_by] if isinstance(group_by, (Expr, str)) else list(group_by)
        functions = [aggregates] if isinstance(aggregates, Expr) else list(aggregates)
        emitted = _one_of(Emit, emit, f"{verb}: emit")
        every = None if emit_every is None else _positive(emit_every, f"{verb}: emit_every")
        spec = self._group_spec(keys, functions, emitted, every, self._ttl(verb, ttl))
        groups = tuple(spec.plain_schema.names[: len(keys)])
        schema = self._checked(verb, spec)
        node = GroupAggregateNode(
            operator_id=self._claim(name, verb, *groups),
            input=self._port,
            spec=spec,
            group_by=tuple(expression_text([key]) for key in keys),
            aggregates=tuple(expression_text([function]) for function in functions),
        )
        note = f"the rows of aggregate {node.operator_id} stand for all rows of their group"
        updates = _updates(emitted, groups, verb, node.operator_id)
        return self._derive(Port(node), schema, event_time=None, time_note=note, updates=updates)

    def final_rows(self, *, name: str | None = None) -> Self:
        """The rows of a stream that corrects itself that are valid at the end of the input, each once.

        An append-only stream, without ``op``. State: one row per key.

        Raises `SchemaError` if the stream does not correct itself.
        """
        return self._materialize("final_rows", None, name)

    def updates_every(self, interval: Duration, *, name: str | None = None) -> Self:
        """A stream that corrects itself, thinned out: each key that changed, once per interval of event time.

        ``interval``: timedelta or milliseconds. Emitted whenever event time passes a multiple of it, in the
        form of the input: of a changelog the difference to what was emitted before, of upserts the newest row.
        State: one row per key for a changelog, and what changed since the last interval.

        Raises `SchemaError` if the stream does not correct itself or has no event time.
        """
        self._require_updates("updates_every")
        return self._materialize("updates_every", _positive(interval, "updates_every: interval"), name)

    # -- helpers

    def _materialize(self, verb: str, every: int | None, name: str | None) -> Self:
        updates = self._require_updates(verb)
        node = MaterializeNode(
            operator_id=self._claim(name, verb, *([] if every is None else [str(every)])),
            input=self._port,
            input_schema=self._schema,
            updates=updates,
            every_ms=every,
        )
        final = every is None
        return self._derive(
            Port(node),
            node.schema if final else self._schema,
            event_time=self._event_time,
            time_note=self._time_note,
            updates=None if final else updates,
        )

    def _require_updates(self, verb: str) -> Updates:
        if self._updates is None:
            raise SchemaError(f"{verb}: every row of the input is a fact of its own, so all of them are valid")
        return self._updates

    def _group_spec(
        self, keys: Sequence[Column], functions: Sequence[Expr], emit: Emit, every: int | None, ttl: int | None
    ) -> GroupSpec:
        verb = "aggregate"
        changelog = self._updates is not None and self._updates.changelog
        if not changelog:
            self._require_append_only(verb, "; use final_rows() first, or a changelog")
        if emit is Emit.FINAL and (every is not None or ttl is not None):
            raise ValueError(f"{verb}: with emit='final' there is neither emit_every nor a ttl")
        if changelog and ttl is not None:
            raise ValueError(f"{verb}: no ttl over a changelog: rows may be taken back from a group that is forgotten")
        if changelog and emit is Emit.UPSERTS:
            raise ValueError(f"{verb}: over a changelog groups can vanish, which upserts cannot tell; use 'changelog'")
        if every is not None:
            self._require_event_time(f"{verb}: emit_every")
        names = [*self._schema.names, *(function.schema_name() for function in functions)]
        whole, rows, newest = (unused_name(base, names) for base in ("all", "rows", "newest"))
        tick = None if every is None else unused_name(TICK, names)
        hidden, added = set(), list(functions)
        exprs = [self._column(key) for key in keys]
        if not exprs:
            exprs = [lit(True).alias(whole)]
            hidden.add(whole)
        if ttl is not None:
            added.insert(0, f.max(column_named(self._require_event_time(verb))).alias(newest))
            hidden.add(newest)
        if changelog:
            added.append(f.count(lit(1)).alias(rows))
            hidden.add(rows)
        schema = self._schema
        if tick is not None:
            schema = schema.append(pa.field(tick, pa.int64()))
            exprs.insert(0, column_named(tick))
        return GroupSpec(
            input_schema=self._schema,
            event_time=self._event_time,
            aggregation=self._compile_groups(schema, exprs, added, retractable=changelog),
            hidden=frozenset(hidden),
            emit=emit,
            changelog_input=changelog,
            rows_name=rows if changelog else None,
            tick_name=tick,
            every_ms=every,
            ttl_ms=ttl,
        )

    def _compile_groups(
        self, schema: pa.Schema, keys: Sequence[Expr], functions: Sequence[Expr], *, retractable: bool
    ) -> Aggregation:
        try:
            return Aggregation.compile(schema, keys, functions, udafs=self._context.udafs, retractable=retractable)
        except (ValueError, TypeError) as error:
            raise SchemaError(f"aggregate: {error}; available columns: {', '.join(self._schema.names)}") from error

    def _key_columns(self, verb: str, key: Sequence[str] | str) -> tuple[str, ...]:
        columns = (key,) if isinstance(key, str) else tuple(key)
        if not columns:
            raise ValueError(f"{verb}: needs at least one key column")
        self._require(verb, columns)
        return columns

    def _sort_terms(self, verb: str, order_by: Sequence[Order] | Order) -> tuple[SortTerm, ...]:
        terms = [order_by] if isinstance(order_by, (SortExpr, Expr, str)) else order_by
        return tuple(self._sort_term(verb, term) for term in terms)

    def _sort_term(self, verb: str, term: Order) -> SortTerm:
        expr = term.expr() if isinstance(term, SortExpr) else term
        named = (expr, expr) if isinstance(expr, str) else plain_column(expr)
        if named is None:
            raise SchemaError(
                f"{verb}: order_by takes columns; compute {expression_text([expr])} with with_column first"
            )
        self._require(verb, [named[0]])
        kind = self._schema.field(named[0]).type
        if not is_sortable(kind):
            raise SchemaError(f"{verb}: rows cannot be ordered by column {named[0]!r} of type {kind}")
        if isinstance(term, SortExpr):
            return SortTerm(named[0], ascending=term.ascending(), nulls_first=term.nulls_first())
        return SortTerm(named[0])

    def _ttl(self, verb: str, ttl: Duration | None) -> int | None:
        if ttl is None:
            return None
        self._require_event_time(f"{verb}: ttl")
        return _positive(ttl, f"{verb}: ttl")

    def _check_top_n(self, emit: Emit, closing: str | None, rank: str | None, ties: str) -> None:
        if closing is not None and emit is not Emit.FINAL:
            raise ValueError("top_n: a partition that event time closes is emitted once: emit='final'")
        if emit is not Emit.FINAL and (rank is None or ties == "all"):
            raise ValueError(f"top_n: emit={str(emit)!r} tells rows apart by their rank: give with_rank=, ties='first'")

    def _checked(self, verb: str, spec: DeduplicateSpec | TopNSpec | GroupSpec) -> pa.Schema:
        """The columns of the result; `SchemaError` if a name is there twice or not free for the result."""
        try:
            schema = spec.result_schema
        except SchemaError as error:
            raise SchemaError(f"{verb}: {error}") from error
        if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
            raise SchemaError(f"{verb}: the result would have columns {twice} twice; rename those of the input first")
        if reserved := [name for name in schema.names if name.startswith("__")]:
            raise SchemaError(f"{verb}: columns {reserved} cannot be kept: names that begin with '__' are reserved")
        return schema


def _one_of(kind: type[_Choice], value: str, what: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{what} must be one of {', '.join(repr(str(k)) for k in kind)}, not {value!r}") from None


def _positive(duration: Duration, what: str) -> int:
    span = milliseconds(duration, what)
    if span <= 0:
        raise ValueError(f"{what} ({span} ms) must be positive")
    return span


def _updates(emit: Emit, key: tuple[str, ...], verb: str, operator_id: str) -> Updates | None:
    if emit is Emit.FINAL:
        return None
    return Updates(key=key, changelog=emit is Emit.CHANGELOG, because=f"{verb} {operator_id} emits {emit}")
