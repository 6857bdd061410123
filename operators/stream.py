"""The user's face: a `DataStream` has the verbs of a DataFusion DataFrame, over batches without end.

Expressions are datafusion's own (``col``, ``lit``, ``functions``). A verb checks its columns and
types when it is called and returns a new stream; nothing runs before `StreamContext.run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
from datafusion import DataFrame, Expr

from operators.engine import Columns, column_named, plain_column, plan_step
from operators.errors import SchemaError
from operators.graph import Port, SinkNode, SourceNode, StepNode, WindowNode, derived_id, explain, upstream_id
from operators.sinks import CallbackSink, ParquetSink, PrintSink
from operators.sinks.base import Sink
from operators.watermark import BadEventTime, EventTimeColumn, EventTimeSpec
from operators.window_aggregate import WINDOW_START, window_schema
from operators.windows import Duration, WindowSpec, milliseconds
from statebackend import Aggregation

if TYPE_CHECKING:
    from operators.context import StreamContext

__all__ = ["DataStream"]

Column: TypeAlias = Expr | str
"""An expression, or the exact name of a column."""


class DataStream:
    """A stream of record batches with one schema; immutable, and usable by several consumers.

    ``event_time`` names the column by which windows are cut, or is None where the stream has none.
    """

    def __init__(
        self,
        context: StreamContext,
        port: Port,
        schema: pa.Schema,
        *,
        event_time: str | None,
        time_note: str = "",
        updates: bool = False,
    ) -> None:
        self._context = context
        self._port = port
        self._schema = schema
        self._event_time = event_time
        self._time_note = time_note
        self._updates = updates

    @property
    def schema(self) -> pa.Schema:
        """Columns of every batch."""
        return self._schema

    @property
    def event_time(self) -> str | None:
        """The event time column."""
        return self._event_time

    def explain(self) -> str:
        """The operators that lead here, as text: this one first, its input indented below it."""
        columns = ", ".join(f"{f.name}: {f.type}" for f in self._schema)
        return f"{explain(self._port)}\n[{columns}]"

    def __repr__(self) -> str:
        return f"DataStream\n{self.explain()}"

    # -- stateless verbs

    def filter(self, *predicates: Column) -> DataStream:
        """The rows for which all predicates hold (expressions, or SQL text over the columns)."""

        def apply(frame: DataFrame) -> DataFrame:
            return frame.filter(*predicates)

        return self._step(f"filter({_text(predicates)})", apply)

    def select(self, *exprs: Column) -> DataStream:
        """These columns or expressions, in this order."""
        picked = [self._column(e) for e in exprs]
        if not picked:
            raise ValueError("select: needs at least one column")

        def apply(frame: DataFrame) -> DataFrame:
            return frame.select(*picked)

        plain = [plain_column(e) for e in picked]
        columns = tuple(p for p in plain if p is not None and p[0] in self._schema.names)
        label = f"select({_text(exprs)})"
        return self._step(label, apply, columns if len(columns) == len(picked) else None, plain)

    def with_column(self, name: str, expr: Expr) -> DataStream:
        """All columns and a new one; replaces the column if the name is taken."""
        return self.with_columns(**{name: expr})

    def with_columns(self, *exprs: Expr, **named: Expr) -> DataStream:
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

    def with_column_renamed(self, old: str, new: str) -> DataStream:
        """The same columns, one under another name."""
        self._require("with_column_renamed", [old])
        columns = [(n, new if n == old else n) for n in self._schema.names]
        return self._pick(f"with_column_renamed({old}, {new})", columns)

    def drop(self, *columns: str) -> DataStream:
        """All columns but these."""
        self._require("drop", columns)
        kept = [(n, n) for n in self._schema.names if n not in columns]
        if not kept:
            raise ValueError("drop: no column would be left")
        return self._pick(f"drop({', '.join(columns)})", kept)

    def drop_columns(self, *columns: str | Sequence[str]) -> DataStream:
        """The same as `drop`; also takes lists of names."""
        return self.drop(*(n for c in columns for n in ([c] if isinstance(c, str) else c)))

    def cast(self, mapping: Mapping[str, pa.DataType]) -> DataStream:
        """The same columns, some of another Arrow type."""
        self._require("cast", list(mapping))
        return self.with_columns(**{name: column_named(name).cast(kind) for name, kind in mapping.items()})

    # -- windows

    def window(
        self,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        length: Duration,
        slide: Duration | None = None,
        *,
        allowed_lateness: Duration = 0,
        name: str | None = None,
    ) -> DataStream:
        """Aggregate by group in event-time windows ``[start, start + length)`` aligned to the epoch.

        ``length``, ``slide`` (default: ``length``, tumbling) and ``allowed_lateness`` are timedeltas
        or integer milliseconds. The result has ``window_start_time`` and ``window_end_time``
        (timestamp[ms] in the zone of the event time), the group columns and the aggregates. A window
        is emitted when the watermark reaches its end; rows that come later, but not later than
        ``allowed_lateness``, emit the changed groups again. What comes still later: `late_rows`.

        Raises `SchemaError` for a wrong column or type, `UnsupportedAggregateError` for an aggregate
        that cannot be kept as state, `ValueError` for wrong durations or a name that is taken.
        """
        span = milliseconds(length, "window length")
        step = span if slide is None else milliseconds(slide, "window slide")
        late = milliseconds(allowed_lateness, "allowed_lateness")
        spec = WindowSpec(length=span, slide=step, allowed_lateness=late)
        event_time = self._window_time()
        keys = [self._column(k) for k in ([group_by] if isinstance(group_by, (Expr, str)) else group_by)]
        functions = [aggregates] if isinstance(aggregates, Expr) else list(aggregates)
        zone = EventTimeColumn(self._schema, event_time).zone
        schema = self._schema.append(pa.field(WINDOW_START, pa.timestamp("ms", zone)))
        aggregation = self._compile(schema, keys, functions)
        within = upstream_id(self._port)
        words = ["window", *aggregation.merger.key_schema.names[1:], str(span), *([str(step)] if step != span else [])]
        node = WindowNode(
            operator_id=self._context.graph.claim(name, lambda: derived_id(*words, within=within)),
            input=self._port,
            input_schema=self._schema,
            event_time=event_time,
            windows=spec,
            aggregation=aggregation,
            group_by=tuple(_text([key]) for key in keys),
            aggregates=tuple(_text([function]) for function in functions),
        )
        return DataStream(
            self._context, Port(node), window_schema(aggregation), event_time=WINDOW_START, updates=late > 0
        )

    def late_rows(self) -> DataStream:
        """The input rows of a window that came after all their windows were closed."""
        node = self._port.node
        if not isinstance(node, WindowNode):
            raise ValueError("late_rows: only the result of window() has late rows; call it right there")
        return DataStream(
            self._context, Port(node, 1), node.input_schema, event_time=None, time_note="late rows have no watermark"
        )

    def bad_rows(self) -> DataStream:
        """The rows of a source whose event time is null or too far in the future.

        Only with ``on_bad_event_time="divert"``.
        """
        node = self._port.node
        spec = node.event_time if isinstance(node, SourceNode) else None
        if not isinstance(spec, EventTimeSpec) or spec.on_bad is not BadEventTime.DIVERT:
            raise ValueError('bad_rows: call it right on a source that is read with on_bad_event_time="divert"')
        return DataStream(
            self._context,
            Port(node, 1),
            self._schema,
            event_time=None,
            time_note="bad rows have no watermark",
        )

    # -- ends of a stream; each returns the stream, so that it can have several

    def sink(self, sink: Sink, *, name: str | None = None) -> DataStream:
        """Hand every batch to a sink."""
        return self._end(sink, name, str(sink.describe().get("kind", type(sink).__name__)))

    def write_parquet(
        self, path: str | os.PathLike[str], partition_by: Sequence[str] = (), *, name: str | None = None, **options: Any
    ) -> DataStream:
        """Write a directory of Parquet files, exactly once; ``options`` as for `operators.sinks.ParquetSink`."""
        self._require("write_parquet", partition_by)
        sink = ParquetSink(path, partition_by, **options)
        return self._end(sink, name, "parquet", PurePath(os.fspath(path)).name)

    def print(self, *, name: str | None = None, **options: Any) -> DataStream:
        """Print every batch; ``options`` as for `operators.sinks.PrintSink`."""
        return self._end(PrintSink(**options), name, "print")

    def print_stream(self, *, name: str | None = None, **options: Any) -> DataStream:
        """The same as `print`."""
        return self.print(name=name, **options)

    def for_each(self, function: Callable[..., object], *, name: str | None = None, **options: Any) -> DataStream:
        """Call a function with every batch; ``options`` as for `operators.sinks.CallbackSink`."""
        return self._end(CallbackSink(function, **options), name, "for_each")

    # -- helpers

    def _end(self, sink: Sink, name: str | None, *words: str) -> DataStream:
        graph, within = self._context.graph, upstream_id(self._port)
        node = SinkNode(
            operator_id=graph.claim(name, lambda: derived_id(*words, within=within)),
            input=self._port,
            schema=self._schema,
            sink=sink,
        )
        graph.sinks.append(node)
        return self

    def _pick(self, label: str, columns: Iterable[tuple[str, str]]) -> DataStream:
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
    ) -> DataStream:
        """A stream after one more step; ``plain`` tells which result columns are input columns."""
        step = plan_step(label, self._schema, apply, columns)
        event_time, note = self._event_time, self._time_note
        if plain is not None and event_time is not None:
            event_time = next((pair[1] for pair in plain if pair is not None and pair[0] == self._event_time), None)
            note = note if event_time else f"{label} dropped or replaced the event time column {self._event_time!r}"
        port = Port(StepNode(input=self._port, step=step))
        return DataStream(
            self._context, port, step.schema, event_time=event_time, time_note=note, updates=self._updates
        )

    def _window_time(self) -> str:
        if self._updates:
            raise SchemaError(
                "window: the input is the result of a window with allowed_lateness, which emits a window again "
                "when it changes; those rows would be counted twice"
            )
        if self._event_time is None:
            raise SchemaError(f"window: the stream has no event time: {self._time_note}")
        if WINDOW_START in self._schema.names:
            raise SchemaError(
                f"window: the input has a column {WINDOW_START!r}, as its result will; "
                f"rename it first, with with_column_renamed({WINDOW_START!r}, ...)"
            )
        return self._event_time

    def _compile(self, schema: pa.Schema, keys: list[Expr], functions: list[Expr]) -> Aggregation:
        try:
            return Aggregation.compile(
                schema, [column_named(WINDOW_START), *keys], functions, udafs=self._context.udafs
            )
        except (ValueError, TypeError) as error:
            raise SchemaError(f"window: {error}; available columns: {', '.join(self._schema.names)}") from error

    def _column(self, column: Column) -> Expr:
        if isinstance(column, str):
            self._require("column", [column])
            return column_named(column)
        return column

    def _require(self, what: str, columns: Sequence[str]) -> None:
        missing = [name for name in columns if name not in self._schema.names]
        if missing:
            raise SchemaError(f"{what}: no column {missing[0]!r}; available columns: {', '.join(self._schema.names)}")


def _text(exprs: Iterable[Column]) -> str:
    return ", ".join(e if isinstance(e, str) else e.canonical_name() for e in exprs)
