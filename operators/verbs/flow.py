"""Verbs that direct rows: union, split, another event time."""

from __future__ import annotations

from datetime import timedelta
from typing import Self

import pyarrow as pa
from datafusion import DataFrame

from operators.changelog import require_append_only
from operators.engine import plan_step
from operators.errors import SchemaError
from operators.flow import EventTimeNode, ProcessingTimeNode, SplitNode, UnionNode
from operators.graph import Port
from operators.verbs.base import Column, StreamBase, expression_text
from operators.watermark import BadEventTime, EventTimeColumn, EventTimeSpec
from operators.windows import Duration, milliseconds

__all__ = ["FlowVerbs"]


class FlowVerbs(StreamBase):
    """Which rows go where, and what time it is for them."""

    def union(self, *others: Self, name: str | None = None) -> Self:
        """The rows of this stream and of the others, which have the same columns; of each in its order.

        Event time is that of the stream furthest behind. Streams that correct themselves are refused: the same
        key may come from two of them.

        Raises `SchemaError` if columns, types or event time columns differ.
        """
        streams = (self, *others)
        if not others:
            raise ValueError("union: needs at least one other stream")
        for number, stream in enumerate(streams):
            require_append_only("union", stream.updates)
            if stream.schema.names != self._schema.names or stream.schema.types != self._schema.types:
                raise SchemaError(f"union: stream {number} has columns\n{stream.schema}\nexpected\n{self._schema}")
            if stream.event_time != self._event_time:
                raise SchemaError(
                    f"union: stream {number} has event time {stream.event_time!r}, the first {self._event_time!r}; "
                    "use assign_event_time() after the union"
                )
        node = UnionNode(
            operator_id=self._claim(name, "union", keeps_state=False),
            inputs=tuple(stream.port for stream in streams),
            schema=self._schema,
        )
        return self._derive(Port(node), self._schema, event_time=self._event_time, time_note=self._time_note)

    def split(self, *, name: str | None = None, **branches: Column) -> dict[str, Self]:
        """Several streams: each row goes to the first branch whose predicate holds, else to ``rest``.

        ``branches``: predicates (expressions, or names of boolean columns) by branch name, in the order in which
        they are tried. Null is not true. Returns the streams by name, ``rest`` among them. Of a changelog each is
        one too: an update that leads from one to another is a delete and an insert. Upserts are refused.
        """
        self._require_tellable("split")
        if not branches or "rest" in branches:
            raise ValueError("split: give at least one branch=predicate; the others go to 'rest'")
        picked = [self._column(predicate).alias(branch) for branch, predicate in branches.items()]

        def apply(frame: DataFrame) -> DataFrame:
            return frame.select(*picked)

        step = plan_step("split", self._schema, apply)
        for field in step.schema:
            if not pa.types.is_boolean(field.type):
                raise SchemaError(f"split: {field.name} must be true or false, its predicate gives {field.type}")
        node = SplitNode(
            operator_id=self._claim(name, "split", *branches, keeps_state=False),
            input=self._port,
            branches=tuple(branches),
            predicates=step,
            changelog=self._updates is not None,
            texts=tuple(expression_text([predicate]) for predicate in branches.values()),
        )
        return {
            branch: self._derive(
                Port(node, index),
                self._schema,
                event_time=self._event_time,
                time_note=self._time_note,
                updates=self._updates,
            )
            for index, branch in enumerate(node.output_names)
        }

    def assign_event_time(
        self,
        column: str,
        *,
        max_disorder: Duration = 0,
        future_limit: Duration | None = timedelta(days=1),
        on_bad_event_time: str = "error",
        name: str | None = None,
    ) -> Self:
        """Follow event time in this column from here on, whatever it was before.

        Arguments as in `operators.reading.ReadOptions`; with ``on_bad_event_time="divert"`` bad rows are found
        in `bad_rows`. Kept: the watermark.
        """
        self._refuse_changelog("assign_event_time")
        try:
            EventTimeColumn(self._schema, column)
        except (TypeError, ValueError) as error:
            raise SchemaError(f"assign_event_time: {error}") from error
        spec = EventTimeSpec(
            column=column,
            max_disorder_ms=milliseconds(max_disorder, "max_disorder"),
            future_limit_ms=None if future_limit is None else milliseconds(future_limit, "future_limit"),
            on_bad=BadEventTime(on_bad_event_time),
        )
        node = EventTimeNode(
            operator_id=self._claim(name, "event_time", column), input=self._port, schema=self._schema, event_time=spec
        )
        return self._derive(Port(node), self._schema, event_time=column, updates=self._updates)

    def with_processing_time(self, column: str = "processing_time", *, name: str | None = None) -> Self:
        """Append the wall-clock time at which each row is processed (timestamp[ms, UTC]), as its event time.

        Windows then close by the clock, also while no rows come, and no row is late. What such a job emits depends on
        when it runs: rows that are replayed after a crash get the time of the replay.
        """
        self._refuse_changelog("with_processing_time")
        if column in self._schema.names:
            raise SchemaError(f"with_processing_time: there is a column {column!r} already")
        schema = self._schema.append(pa.field(column, pa.timestamp("ms", "UTC")))
        node = ProcessingTimeNode(operator_id=self._claim(name, "processing_time"), input=self._port, schema=schema)
        return self._derive(Port(node), schema, event_time=column, updates=self._updates)
