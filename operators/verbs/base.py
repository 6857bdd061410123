"""What every verb builds on: a stream, its columns, its event time, and how to derive the next one.

A verb checks its columns and types when it is called and returns a new stream; nothing runs before
`StreamContext.run`. The verbs of `DataStream` are spread over mixins, one per family; each is a
function of streams to a stream, so they need nothing of each other but what is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self, TypeAlias

import pyarrow as pa
from datafusion import Expr

from operators.changelog import Updates, require_append_only
from operators.engine import Columns, column_named, plain_column
from operators.errors import SchemaError
from operators.explain import Explanation
from operators.graph import Port, derived_id, upstream_id
from statebackend import Aggregation
from statebackend.markup import card, details, facts, grid

if TYPE_CHECKING:
    from operators.context import StreamContext

__all__ = ["Column", "StreamBase", "expression_text"]

Column: TypeAlias = Expr | str
"""An expression, or the exact name of a column."""


class StreamBase:
    """A stream of record batches with one schema; immutable, and usable by several consumers.

    ``event_time`` names the column by which windows are cut, or is None where the stream has none;
    ``time_note`` then says why. ``time_copies``: columns that are the same as it, and can take its place when it
    is dropped. ``updates``: how the stream corrects itself, None if it is append-only.
    """

    def __init__(
        self,
        context: StreamContext,
        port: Port,
        schema: pa.Schema,
        *,
        event_time: str | None,
        time_note: str = "",
        time_copies: frozenset[str] = frozenset(),
        updates: Updates | None = None,
    ) -> None:
        self._context = context
        self._port = port
        self._schema = schema
        self._event_time = event_time
        self._time_note = time_note
        self._time_copies = time_copies
        self._updates = updates

    @property
    def schema(self) -> pa.Schema:
        """Columns of every batch."""
        return self._schema

    @property
    def event_time(self) -> str | None:
        """The event time column."""
        return self._event_time

    @property
    def context(self) -> StreamContext:
        """The job under construction to which the stream belongs."""
        return self._context

    @property
    def port(self) -> Port:
        """Where the rows come from: a node of the job's graph, for verbs that take several streams."""
        return self._port

    @property
    def updates(self) -> Updates | None:
        """How the stream corrects itself; None if every row is a fact of its own."""
        return self._updates

    def explain(self) -> Explanation:
        """The operators that lead here with their state, as text: this one first, its inputs indented below it.

        A notebook shows it as a picture.
        """
        columns = ", ".join(f"{f.name}: {f.type}" for f in self._schema)
        return Explanation.of(self._port, columns=f"[{columns}]")

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self.explain()}"

    def _repr_html_(self) -> str:
        kind = None if self._updates is None else "changelog" if self._updates.changelog else "upserts"
        named = facts({"event time": self._event_time or "none", "rows are": kind})
        columns = [(f.name, str(f.type)) for f in self._schema]
        shown = details(f"{len(columns)} columns", grid(("column", "type"), columns))
        return card(upstream_id(self._port), type(self).__name__, named, shown, self.explain().picture)

    # -- for verbs

    def _derive(
        self,
        port: Port,
        schema: pa.Schema,
        *,
        event_time: str | None,
        time_note: str = "",
        time_copies: frozenset[str] = frozenset(),
        updates: Updates | None = None,
    ) -> Self:
        """A stream of the same job."""
        return type(self)(
            self._context,
            port,
            schema,
            event_time=event_time,
            time_note=time_note,
            time_copies=time_copies,
            updates=updates,
        )

    def _claim(self, name: str | None, *words: str, keeps_state: bool = True) -> str:
        """The id of a new operator behind this stream: the user's name, or one derived from these words."""
        within = upstream_id(self._port)
        return self._context.graph.claim(name, lambda: derived_id(*words, within=within), keeps_state=keeps_state)

    def _column(self, column: Column) -> Expr:
        if isinstance(column, str):
            self._require("column", [column])
            return column_named(column)
        return column

    def _grouping(
        self, group_by: Sequence[Column] | Column, aggregates: Sequence[Expr] | Expr
    ) -> tuple[list[Expr], list[Expr]]:
        """Group keys and aggregates as lists of expressions."""
        keys = [group_by] if isinstance(group_by, (Expr, str)) else group_by
        return [self._column(k) for k in keys], [aggregates] if isinstance(aggregates, Expr) else list(aggregates)

    def _picked(self, exprs: Sequence[Expr]) -> Columns | None:
        """The expressions as a mere choice of columns, if that is what they are."""
        plain = [plain_column(e) for e in exprs]
        columns = tuple(p for p in plain if p is not None and p[0] in self._schema.names)
        return columns if len(columns) == len(plain) else None

    def _require(self, what: str, columns: Sequence[str]) -> None:
        missing = [name for name in columns if name not in self._schema.names]
        if missing:
            raise SchemaError(f"{what}: no column {missing[0]!r}; available columns: {', '.join(self._schema.names)}")

    def _require_append_only(self, verb: str, hint: str = "") -> None:
        require_append_only(verb, self._updates, hint)

    def _refuse_changelog(self, verb: str) -> None:
        """For what would not do the same to a row when it comes and when it is taken back."""
        if self._updates is not None and self._updates.changelog:
            self._require_append_only(verb, "; do it before")

    def _require_tellable(self, verb: str) -> None:
        """For what lets some rows through only: of upserts it could not tell that a row is no longer among them."""
        if self._updates is not None and not self._updates.changelog:
            raise SchemaError(
                f"{verb}: the input is upserts ({self._updates.because}): a row whose newer version goes elsewhere "
                "would seem to be valid for ever; do it before, or after final_rows(), or take the changelog"
            )

    def _require_event_time(self, verb: str) -> str:
        if self._event_time is None:
            raise SchemaError(f"{verb}: the stream has no event time: {self._time_note}")
        return self._event_time

    def _compile(self, verb: str, schema: pa.Schema, keys: Sequence[Expr], functions: Sequence[Expr]) -> Aggregation:
        """An aggregation over rows of ``schema``; `SchemaError` names the verb."""
        try:
            return Aggregation.compile(schema, keys, functions, udafs=self._context.udafs)
        except (ValueError, TypeError) as error:
            raise SchemaError(f"{verb}: {error}; available columns: {', '.join(self._schema.names)}") from error


def expression_text(exprs: Iterable[Column]) -> str:
    """Expressions as the user would write them."""
    return ", ".join(e if isinstance(e, str) else e.canonical_name() for e in exprs)
