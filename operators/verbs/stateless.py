"""Stateless verbs: those of a DataFusion DataFrame that look at one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import and_
from typing import Self

import pyarrow as pa
from datafusion import DataFrame, Expr

from operators.changelog import OP, Updates
from operators.engine import Columns, Step, column_named, plain_column, plan_step
from operators.errors import SchemaError
from operators.graph import Port, StepNode
from operators.verbs.base import Column, StreamBase, expression_text

__all__ = ["StatelessVerbs"]


class StatelessVerbs(StreamBase):
    """Filters, projections and casts; chains of them run as one plan."""

    def filter(self, *predicates: Column) -> Self:
        """The rows for which all predicates hold (expressions, or SQL text over the columns).

        Of a changelog the result is one too: an update of which only the new row passes is an insert, one of which
        only the old row passes a delete. Upserts are refused unless the predicates look at their key alone.
        """

        def apply(frame: DataFrame) -> DataFrame:
            return frame.filter(*predicates)

        label = f"filter({expression_text(predicates)})"
        updates = self._updates
        if updates is not None and updates.changelog:
            return self._filter_changelog(label, predicates, updates)
        if updates is not None and not self._fits(label, updates.key, apply):
            self._require_tellable("filter")
        return self._step(label, apply)

    def select(self, *exprs: Column) -> Self:
        """These columns or expressions, in this order."""
        picked = [self._column(e) for e in exprs]
        if not picked:
            raise ValueError("select: needs at least one column")

        def apply(frame: DataFrame) -> DataFrame:
            return frame.select(*picked)

        plain = [plain_column(e) for e in picked]
        return self._step(f"select({expression_text(exprs)})", apply, self._picked(picked), plain)

    def with_column(self, name: str, expr: Expr) -> Self:
        """All columns and a new one; replaces the column if the name is taken."""
        return self.with_columns(**{name: expr})

    def with_columns(self, *exprs: Expr, **named: Expr) -> Self:
        """All columns and several new ones: aliased expressions, or ``name=expression``."""
        new = [*exprs, *(expr.alias(name) for name, expr in named.items())]
        names = [expr.schema_name() for expr in new]
        kept = [column_named(n) for n in self._schema.names]
        replaced = dict(zip(names, new, strict=True))
        picked = [replaced.pop(n, k) for n, k in zip(self._schema.names, kept, strict=True)]
        picked += replaced.values()

        def apply(frame: DataFrame) -> DataFrame:
            return frame.select(*picked)

        return self._step(f"with_columns({', '.join(names)})", apply, None, [plain_column(e) for e in picked])

    def with_column_renamed(self, old: str, new: str) -> Self:
        """The same columns, one under another name."""
        self._require("with_column_renamed", [old])
        columns = [(n, new if n == old else n) for n in self._schema.names]
        return self._pick(f"with_column_renamed({old}, {new})", columns)

    def drop(self, *columns: str) -> Self:
        """All columns but these."""
        self._require("drop", columns)
        kept = [(n, n) for n in self._schema.names if n not in columns]
        if not kept:
            raise ValueError("drop: no column would be left")
        return self._pick(f"drop({', '.join(columns)})", kept)

    def drop_columns(self, *columns: str | Sequence[str]) -> Self:
        """The same as `drop`; also takes lists of names."""
        return self.drop(*(n for c in columns for n in ([c] if isinstance(c, str) else c)))

    def cast(self, mapping: Mapping[str, pa.DataType]) -> Self:
        """The same columns, some of another Arrow type."""
        self._require("cast", list(mapping))
        return self.with_columns(**{name: column_named(name).cast(kind) for name, kind in mapping.items()})

    def unnest(self, column: str) -> Self:
        """One row for each element of a list column, which takes the place of the list; none if it is empty or null.

        Raises `SchemaError` for a stream that corrects itself, and for a column that is no list.
        """
        self._require("unnest", [column])
        self._require_append_only("unnest", "; use final_rows() first")
        if not _is_list(self._schema.field(column).type):
            raise SchemaError(f"unnest: {column!r} is no list but {self._schema.field(column).type}")

        def apply(frame: DataFrame) -> DataFrame:
            return frame.unnest_columns('"' + column.replace('"', '""') + '"', preserve_nulls=False)

        kept = [(name, name) for name in self._schema.names if name != column]
        return self._step(f"unnest({column})", apply, None, kept)

    # -- helpers

    def _fits(self, label: str, columns: Sequence[str], apply: Callable[[DataFrame], DataFrame]) -> bool:
        """Whether a verb needs no other columns than these."""
        try:
            plan_step(label, pa.schema([self._schema.field(name) for name in columns]), apply)
        except SchemaError:
            return False
        return True

    def _filter_changelog(self, label: str, predicates: Sequence[Column], updates: Updates) -> Self:
        def apply(frame: DataFrame) -> DataFrame:
            exprs = [frame.parse_sql_expr(p) if isinstance(p, str) else p for p in predicates]
            return frame.select(reduce(and_, exprs).alias("kept"))

        step = plan_step(label, self._schema, apply)
        if not pa.types.is_boolean(step.schema.field(0).type):
            raise SchemaError(f"{label}: non-boolean predicate of type {step.schema.field(0).type}")
        masked = Step(label=label, input_schema=self._schema, schema=self._schema, apply=apply, mask=True)
        port = Port(StepNode(input=self._port, step=masked))
        return self._derive(port, self._schema, event_time=self._event_time, time_note=self._time_note, updates=updates)

    def _pick(self, label: str, columns: Iterable[tuple[str, str]]) -> Self:
        pairs = tuple(columns)
        picked = [column_named(source).alias(name) for source, name in pairs]

        def apply(frame: DataFrame) -> DataFrame:
            return frame.select(*picked)

        return self._step(label, apply, pairs, list(pairs))

    def _step(
        self,
        label: str,
        apply: Callable[[DataFrame], DataFrame],
        columns: Columns | None = None,
        plain: Sequence[tuple[str, str] | None] | None = None,
    ) -> Self:
        """A stream after one more step; ``plain`` tells which result columns are input columns."""
        step = plan_step(label, self._schema, apply, columns)
        event_time, note, copies = self._event_time, self._time_note, self._time_copies
        if plain is not None and event_time is not None:
            same = [pair for pair in plain if pair is not None and pair[0] in {event_time, *copies}]
            same.sort(key=lambda pair: pair[0] != self._event_time)
            event_time = same[0][1] if same else None
            copies = frozenset(name for _, name in same[1:])
            note = note if event_time else f"{label} dropped or replaced the event time column {self._event_time!r}"
        port = Port(StepNode(input=self._port, step=step))
        updates = self._updates if plain is None else _kept_updates(label, self._updates, plain)
        return self._derive(
            port, step.schema, event_time=event_time, time_note=note, time_copies=copies, updates=updates
        )


def _is_list(kind: pa.DataType) -> bool:
    return any((pa.types.is_list(kind), pa.types.is_large_list(kind), pa.types.is_fixed_size_list(kind)))


def _kept_updates(label: str, updates: Updates | None, plain: Sequence[tuple[str, str] | None]) -> Updates | None:
    """How the result corrects itself, if what tells that is still there; else `SchemaError`."""
    if updates is None:
        return None
    names = dict(reversed([pair for pair in plain if pair is not None]))
    kind = "a changelog" if updates.changelog else "upserts"
    lost = [name for name in updates.key if name not in names]
    if updates.changelog and names.get(OP) != OP:
        lost.append(OP)
    if lost:
        raise SchemaError(
            f"{label}: the input is {kind} ({updates.because}), whose columns {', '.join(lost)} tell which row is "
            "replaced: keep them as they are, or use final_rows() first"
        )
    return replace(updates, key=tuple(names[name] for name in updates.key))
