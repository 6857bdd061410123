"""Windowed aggregations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import pyarrow as pa
from datafusion import Expr

from operators.changelog import Updates
from operators.engine import column_named
from operators.errors import SchemaError
from operators.graph import Port
from operators.stateful.window_aggregate import WINDOW_START, WindowNode, window_schema
from operators.verbs.base import Column, StreamBase, expression_text
from operators.watermark import EventTimeColumn
from operators.windows import Duration, WindowSpec, milliseconds

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
        name: str | None = None,
    ) -> Self:
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
        aggregation = self._compile("window", schema, [column_named(WINDOW_START), *keys], functions)
        groups = aggregation.merger.key_schema.names[1:]
        node = WindowNode(
            operator_id=self._claim(name, "window", *groups, str(span), *([str(step)] if step != span else [])),
            input=self._port,
            input_schema=self._schema,
            event_time=event_time,
            windows=spec,
            aggregation=aggregation,
            group_by=tuple(expression_text([key]) for key in keys),
            aggregates=tuple(expression_text([function]) for function in functions),
        )
        updates = Updates(
            key=(WINDOW_START, *groups), changelog=False, because=f"window {node.operator_id} has allowed_lateness"
        )
        return self._derive(
            Port(node), window_schema(aggregation), event_time=WINDOW_START, updates=updates if late else None
        )

    def late_rows(self) -> Self:
        """The input rows of a window that came after all their windows were closed."""
        node = self._port.node
        if not isinstance(node, WindowNode):
            raise ValueError("late_rows: only the result of window() has late rows; call it right there")
        return self._derive(Port(node, 1), node.input_schema, event_time=None, time_note="late rows have no watermark")

    def _window_time(self) -> str:
        self._require_append_only("window")
        event_time = self._require_event_time("window")
        if WINDOW_START in self._schema.names:
            raise SchemaError(
                f"window: the input has a column {WINDOW_START!r}, as its result will; "
                f"rename it first, with with_column_renamed({WINDOW_START!r}, ...)"
            )
        return event_time
