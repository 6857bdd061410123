"""Stateless verbs: those of a DataFusion DataFrame that look at one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import pyarrow as pa
from datafusion import DataFrame, Expr

from operators.engine import Columns, column_named, plain_column, plan_step
from operators.graph import Port, StepNode
from operators.verbs.base import Column, StreamBase, expression_text

__all__ = ["StatelessVerbs"]


class StatelessVerbs(StreamBase):
    """Filters, projections and casts; chains of them run as one plan."""

    def filter(self, *predicates: Column) -> Self:
        """The rows for which all predicates hold (expressions, or SQL text over the columns)."""

        def apply(frame: DataFrame) -> DataFrame:
            return frame.filter(*predicates)

        return self._step(f"filter({expression_text(predicates)})", apply)

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

    # -- helpers

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
        event_time, note = self._event_time, self._time_note
        if plain is not None and event_time is not None:
            event_time = next((pair[1] for pair in plain if pair is not None and pair[0] == self._event_time), None)
            note = note if event_time else f"{label} dropped or replaced the event time column {self._event_time!r}"
        port = Port(StepNode(input=self._port, step=step))
        return self._derive(port, step.schema, event_time=event_time, time_note=note, updates=self._updates)
