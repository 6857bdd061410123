"""Windowed aggregations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import pyarrow as pa
from datafusion import Expr, lit
from datafusion import functions as f

from operators.changelog import Updates
from operators.engine import column_named, plan_step
from operators.errors import SchemaError
from operators.graph import Port
from operators.stateful.count_window import WINDOW_NUMBER, CountWindowNode, count_window_schema
from operators.stateful.session_window import SESSION_TIME, SessionNode, session_schema, session_time_type
from operators.stateful.shared_windows import SharedWindowNode
from operators.stateful.window_aggregate import WINDOW_END, WINDOW_START, WindowNode, window_schema
from operators.verbs.base import Column, StreamBase, expression_text
from operators.watermark import EventTimeColumn
from operators.windows import CumulateSpec, Duration, Windows, WindowSet, WindowSpec, milliseconds

__all__ = ["WindowVerbs"]


class WindowVerbs(StreamBase):
    """Aggregations over pieces of event time."""

    def window(
        self,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        length: Duration,
        slide: Duration | None = None,
        *,
        allowed_lateness: Duration = 0,
        emit_every: Duration | None = None,
        name: str | None = None,
    ) -> Self:
        """Aggregate by group in event-time windows ``[start, start + length)`` aligned to the epoch.

        ``group_by`` may be empty: one row per window. All ``aggregates`` share one pass over the rows (and several
        lengths do with `windows`). ``length``, ``slide`` (default: ``length``,
        tumbling), ``allowed_lateness`` and ``emit_every`` are timedeltas or integer milliseconds. The
        result has ``window_start_time`` and ``window_end_time`` (timestamp[ms] in the zone of the event
        time), the group columns and the aggregates. A window is emitted when the watermark reaches its
        end; rows that come later, but not later than ``allowed_lateness``, emit the changed groups
        again. What comes still later: `late_rows`. With ``emit_every`` all open windows are emitted as
        they stand whenever event time passes a multiple of it. In both cases the stream is one of upserts
        by window and group.

        State: one row of partial states per group and pane, until the window closes.

        Raises `SchemaError` for a wrong column or type, `UnsupportedAggregateError` for an aggregate
        that cannot be kept as state, `ValueError` for wrong durations or a name that is taken.
        """
        span = milliseconds(length, "window length")
        step = span if slide is None else milliseconds(slide, "window slide")
        late = milliseconds(allowed_lateness, "allowed_lateness")
        spec = WindowSpec(length=span, slide=step, allowed_lateness=late)
        words = [str(span), *([str(step)] if step != span else [])]
        return self._windows_of(*self._windowed("window", group_by, aggregates, spec, words, emit_every, name))

    def windows(
        self,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        lengths: Sequence[Duration | tuple[Duration, Duration]],
        *,
        allowed_lateness: Duration = 0,
        emit_every: Duration | None = None,
        name: str | None = None,
    ) -> tuple[Self, ...]:
        """Aggregate in windows of several lengths at the cost of one pass over the rows.

        ``lengths``: a length each, or a pair of length and slide. Returns a stream for each, in this order, with
        columns, emission and event time as of `window`. Every row is aggregated once, per group and pane; a pane is as
        long as all lengths and slides can be divided by, so they should be multiples of each other. A row is late, and
        among the `late_rows` of any of the streams, if it is too late for all of them; else it counts where it is not.

        State: one row of partial states per group and pane, until the longest window closes. Raises as `window`.
        """
        late = milliseconds(allowed_lateness, "allowed_lateness")
        kinds = []
        for size in lengths:
            length, slide = size if isinstance(size, tuple) else (size, size)
            span, step = milliseconds(length, "window length"), milliseconds(slide, "window slide")
            kinds.append(WindowSpec(length=span, slide=step, allowed_lateness=late))
        spec = WindowSet(kinds=tuple(kinds))
        words = [str(kind.length) for kind in kinds]
        node, updates = self._windowed("windows", group_by, aggregates, spec, words, emit_every, name)
        return tuple(self._windows_of(node, updates, number) for number in range(len(kinds)))

    def cumulate_window(
        self,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        step: Duration,
        length: Duration,
        *,
        allowed_lateness: Duration = 0,
        name: str | None = None,
    ) -> Self:
        """Aggregate by group in windows that grow by ``step`` up to ``length``, then begin anew.

        ``length`` must be a multiple of ``step``. Window k of a length from ``start`` is
        ``[start, start + k * step)``: totals since midnight, every hour. Columns, emission, lateness and
        errors as for `window`.

        State: one row of partial states per group and step, until the longest window closes.
        """
        spec = CumulateSpec(
            length=milliseconds(length, "window length"),
            step=milliseconds(step, "window step"),
            allowed_lateness=milliseconds(allowed_lateness, "allowed_lateness"),
        )
        words = [str(spec.step), str(spec.length)]
        return self._windows_of(*self._windowed("cumulate", group_by, aggregates, spec, words, None, name))

    def session_window(
        self,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        gap: Duration,
        *,
        name: str | None = None,
    ) -> Self:
        """Aggregate by group over sessions: rows that are at most ``gap`` apart belong together.

        ``gap`` is a timedelta or integer milliseconds. The result has ``window_start_time`` (the first
        event) and ``window_end_time`` (the last event plus ``gap``), timestamps of the event time's own
        unit, the group columns and the aggregates; its event time is ``window_end_time``. A session is
        emitted when the watermark has passed its end; a row that still joins an open session is in
        time however old it is, others that come too late: `late_rows`.

        State: one row of partial states per open session. A group whose rows never pause has one session that stays
        open until the end of the input; for what is to come out before, add the hour, say, to ``group_by``. Raises as
        `window`.
        """
        pause = milliseconds(gap, "session gap")
        if pause <= 0:
            raise ValueError(f"session_window: gap ({pause} ms) must be positive")
        event_time = self._window_time("session_window")
        keys, functions = self._grouping(group_by, aggregates)
        grouped = bool(keys)
        keys = keys or [lit(value=True).alias("all_rows")]
        bound = session_time_type(self._schema, event_time)
        schema = pa.schema([*self._schema, pa.field(WINDOW_START, bound), pa.field(SESSION_TIME, bound)])
        last = f.max(column_named(SESSION_TIME)).alias(SESSION_TIME)
        aggregation = self._compile("session_window", schema, [column_named(WINDOW_START), *keys], [last, *functions])
        names = aggregation.merger.key_schema.names[1:] if grouped else []
        node = SessionNode(
            operator_id=self._claim(name, "session", *names, str(pause)),
            input=self._port,
            input_schema=self._schema,
            event_time=event_time,
            gap=pause,
            keys=plan_step("session_window", self._schema, lambda frame: frame.select(*keys), self._picked(keys)),
            grouped=grouped,
            aggregation=aggregation,
            group_by=tuple(expression_text([key]) for key in keys) if grouped else (),
            aggregates=tuple(expression_text([function]) for function in functions),
        )
        return self._derive(Port(node), session_schema(aggregation, grouped=grouped), event_time=WINDOW_END)

    def count_window(
        self,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        size: int,
        *,
        name: str | None = None,
    ) -> Self:
        """Aggregate every ``size`` rows of a group, in the order in which they come.

        The result has the group columns and the aggregates, and no event time. A window is emitted with
        its last row; at the end of a bounded input, unfinished ones as they are.

        State: one row per group with an unfinished window. Raises as `window`.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"count_window: size ({size!r}) must be a number of rows, at least 1")
        self._require_append_only("count_window")
        keys, functions = self._grouping(group_by, aggregates)
        grouped = bool(keys)
        keys = keys or [lit(value=True).alias("all_rows")]
        schema = self._schema.append(pa.field(WINDOW_NUMBER, pa.int64()))
        aggregation = self._compile("count_window", schema, [column_named(WINDOW_NUMBER), *keys], functions)
        names = aggregation.merger.key_schema.names[1:] if grouped else []
        node = CountWindowNode(
            operator_id=self._claim(name, "count", *names, str(size)),
            input=self._port,
            input_schema=self._schema,
            size=size,
            keys=plan_step("count_window", self._schema, lambda frame: frame.select(*keys), self._picked(keys)),
            grouped=grouped,
            aggregation=aggregation,
            group_by=tuple(expression_text([key]) for key in keys) if grouped else (),
            aggregates=tuple(expression_text([function]) for function in functions),
        )
        result = count_window_schema(aggregation, grouped=grouped)
        return self._derive(Port(node), result, event_time=None, time_note="count windows have no event time")

    def _windowed(
        self,
        verb: str,
        group_by: Sequence[Column] | Column,
        aggregates: Sequence[Expr] | Expr,
        spec: Windows,
        words: Sequence[str],
        emit_every: Duration | None,
        name: str | None,
    ) -> tuple[WindowNode, Updates | None]:
        """The node of a windowed aggregation, and how its results correct themselves."""
        event_time = self._window_time(verb)
        early = None if emit_every is None else milliseconds(emit_every, "emit_every")
        if early is not None and early <= 0:
            raise ValueError(f"{verb}: emit_every ({early} ms) must be positive")
        keys, functions = self._grouping(group_by, aggregates)
        zone = EventTimeColumn(self._schema, event_time).zone
        schema = self._schema.append(pa.field(WINDOW_START, pa.timestamp("ms", zone)))
        aggregation = self._compile(verb, schema, [column_named(WINDOW_START), *keys], functions)
        groups = aggregation.merger.key_schema.names[1:]
        node_type: Callable[..., WindowNode] = SharedWindowNode if isinstance(spec, WindowSet) else WindowNode
        node = node_type(
            operator_id=self._claim(name, verb, *groups, *words),
            input=self._port,
            input_schema=self._schema,
            event_time=event_time,
            windows=spec,
            aggregation=aggregation,
            group_by=tuple(expression_text([key]) for key in keys),
            aggregates=tuple(expression_text([function]) for function in functions),
            emit_every=early,
        )
        updates = None
        if spec.allowed_lateness or early:
            why = "allowed_lateness" if spec.allowed_lateness else "emit_every"
            key = (WINDOW_START, WINDOW_END, *groups)
            updates = Updates(key=key, changelog=False, because=f"{verb} {node.operator_id} has {why}")
        return node, updates

    def _windows_of(self, node: WindowNode, updates: Updates | None, output: int = 0) -> Self:
        schema = window_schema(node.aggregation)
        return self._derive(Port(node, output), schema, event_time=WINDOW_START, updates=updates)

    def _window_time(self, verb: str) -> str:
        self._require_append_only(verb)
        event_time = self._require_event_time(verb)
        if WINDOW_START in self._schema.names:
            raise SchemaError(
                f"{verb}: the input has a column {WINDOW_START!r}, as its result will; "
                f"rename it first, with with_column_renamed({WINDOW_START!r}, ...)"
            )
        return event_time
