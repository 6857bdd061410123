"""The API of Denormalized (``denormalized.Context``, ``DataStream``), over the streams of this package.

A program written for it runs with its imports changed::

    from operators.denormalized import Context, col, functions as f

    ctx = Context(state="state/sensors")
    ds = ctx.from_topic("temperature", json.dumps(sample), "localhost:9092", "occurred_at_ms")
    ds.window([col("sensor_name")], [f.count(col("reading")).alias("count")], 1000, None).print_stream()

What differs is what was missing there: windows keep their keys over a restart, a checkpoint holds positions and state
together, and ``state`` says where it is kept (None: in memory). As there, `DataStream.print_stream` and
`DataStream.sink` run the stream, until its topics end or the process is told to stop.

Topics are those of Kafka (extra ``kafka``), read as `operators.sources.KafkaSource` reads them. Instead a ``transport``
can bring messages (`operators.topics.Transport`); `operators.topics.MemoryTopics` keeps them in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datafusion import Accumulator, Expr, col, functions, lit, udf
from datafusion import udaf as _udaf

from operators.context import StreamContext
from operators.errors import SchemaError
from operators.formats import FormatError, JsonFormat
from operators.sinks.callback import ImmediateCallbackSink
from operators.sources import KafkaSource, Source
from operators.stream import DataStream as Stream
from operators.topics import TopicSink, TopicSource, Transport, schema_of_json
from statebackend import StateBackend

__all__ = ["Accumulator", "Context", "DataStream", "Expr", "col", "functions", "lit", "udaf", "udf"]

_TIME = "_event_time"
"""The event time as a timestamp: a column that is carried along and never shown."""

_RIGHT_TIME = f"{_TIME}_right"

_udafs: list[Any] = []


def udaf(
    accum: Callable[[], Any],
    input_types: list[pa.DataType],
    return_type: pa.DataType,
    state_type: list[pa.DataType],
    volatility: str = "stable",
    name: str | None = None,
) -> Any:
    """A Python aggregate function; streams built afterwards can use it.

    ``accum``: an `Accumulator` class. As there, its ``merge`` gets the one state column, and ``state`` and
    ``evaluate`` may return an Arrow array of one value. Python per group: slow with many groups.
    """
    title = name or getattr(accum, "__name__", "accumulator").lower()
    made = _udaf(lambda: _Adapted(accum()), input_types, return_type, state_type, volatility, title)
    _udafs.append(made)
    return made


class _Adapted(Accumulator):
    """An accumulator written for the older interface, behind that of DataFusion."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def update(self, *values: pa.Array) -> None:
        self._inner.update(*values)

    def merge(self, states: list[pa.Array]) -> None:
        self._inner.merge(states[0] if len(states) == 1 else states)

    def state(self) -> list[pa.Scalar]:
        state = self._inner.state()
        return [state[0]] if isinstance(state, pa.Array) else list(state)

    def evaluate(self) -> pa.Scalar:
        value = self._inner.evaluate()
        if isinstance(value, pa.Array):
            return value[0] if len(value) else pa.scalar(None, value.type)
        return value


class Context:
    """Where streams begin.

    ``state``: URL of the state, a `StateBackend`, or None for memory. ``transport``: brings the messages instead
    of Kafka.
    ``checkpoint_interval``: seconds.
    """

    def __init__(
        self,
        state: str | StateBackend | None = None,
        *,
        transport: Transport | None = None,
        checkpoint_interval: float = 1.0,
        name: str = "denormalized",
    ) -> None:
        self.transport = transport
        self.streams = StreamContext(name, state=state, checkpoint_interval=checkpoint_interval)

    def __repr__(self) -> str:
        return f"Context({self.streams.name!r})"

    def from_topic(
        self,
        topic: str,
        sample_json: str,
        bootstrap_servers: str,
        timestamp_column: str,
        group_id: str = "default_group",
    ) -> DataStream:
        """A stream of the JSON messages of a topic, with the columns of ``sample_json``, from its first message on.

        ``timestamp_column``: integer epoch milliseconds, or a timestamp. ``group_id`` is told how far the job has
        come; positions are kept in the state, never in the group. Neither it nor ``bootstrap_servers`` matters to a
        ``transport``.
        """
        if not topic:
            raise ValueError("from_topic: the topic has no name")
        schema = schema_of_json(sample_json)
        if timestamp_column not in schema.names:
            raise SchemaError(f"from_topic: no column {timestamp_column!r} in the sample; it has {schema.names}")
        format_ = _Timed(JsonFormat(schema), timestamp_column)
        source: Source = (
            KafkaSource(topic, bootstrap_servers, format=format_, group_id=group_id, tombstones="drop")
            if self.transport is None
            else TopicSource(self.transport, topic, format_)
        )
        stream = self.streams.from_source(
            source, event_time=_TIME, future_limit=None, on_bad_event_time="drop", name=topic
        )
        return DataStream(self, stream)


class _Timed:
    """A format with its event time as a timestamp besides."""

    takes_nulls = False

    def __init__(self, inner: JsonFormat, column: str) -> None:
        self.schema = inner.schema.append(pa.field(_TIME, pa.timestamp("ms")))
        self._inner = inner
        self._column = column

    def describe(self) -> Mapping[str, Any]:
        return {**self._inner.describe(), "time": self._column}

    def decode(self, values: Sequence[bytes]) -> pa.RecordBatch:
        batch = self._inner.decode(values)
        try:
            time = batch.column(self._column).cast(pa.timestamp("ms"))
        except pa.ArrowInvalid as error:
            raise FormatError(f"{self._column!r} is no time: {error}") from error
        return pa.RecordBatch.from_arrays([*batch.columns, time], schema=self.schema)


class DataStream:
    """A stream with Denormalized's verbs."""

    def __init__(self, context: Context, stream: Stream) -> None:
        self._context = context
        self._stream = stream

    def __repr__(self) -> str:
        return repr(self._shown())

    def schema(self) -> pa.Schema:
        """The columns."""
        return self._shown().schema

    def select(self, expr_list: list[Expr]) -> DataStream:
        """These columns and expressions."""
        hidden = [_TIME] if self._hides_time() else []
        return self._then(self._stream.select(*expr_list, *hidden))

    def filter(self, predicate: Expr) -> DataStream:
        """The rows for which the predicate holds."""
        return self._then(self._stream.filter(predicate))

    def with_column(self, name: str, predicate: Expr) -> DataStream:
        """All columns and one more."""
        return self._then(self._stream.with_column(name, predicate))

    def drop_columns(self, columns: list[str]) -> DataStream:
        """All columns but these."""
        return self._then(self._stream.drop_columns(columns))

    def join_on(self, right: DataStream, join_type: str, on_exprs: list[Expr]) -> DataStream:
        """Join by conditions; see `operators.DataStream.join_on`."""
        return self._joined(self._stream.join_on(right._for_join(), *on_exprs, how=_how(join_type)))

    def join(
        self,
        right: DataStream,
        join_type: str,
        left_cols: list[str],
        right_cols: list[str],
        filter: Expr | None = None,  # noqa: A002 - the name there
    ) -> DataStream:
        """Join by columns; windows join by their start as one of them. See `operators.DataStream.join`."""
        joined = self._stream.join(
            right._for_join(), how=_how(join_type), left_on=left_cols, right_on=right_cols, filter=filter
        )
        return self._joined(joined)

    def window(
        self,
        group_exprs: list[Expr],
        aggr_exprs: list[Expr],
        window_length_millis: int,
        slide_millis: int | None = None,
    ) -> DataStream:
        """Aggregate in event-time windows; the result has ``window_start_time`` and ``window_end_time``."""
        for made in _udafs:
            self._context.streams.register_udaf(made)
        return self._then(self._stream.window(group_exprs, aggr_exprs, window_length_millis, slide_millis))

    def print_stream(self) -> None:
        """Run, printing every batch."""
        self._run(self._shown().print())

    def print_schema(self) -> DataStream:
        """Print the columns."""
        print(self.schema())  # noqa: T201 - what it is for
        return self

    def print_plan(self) -> DataStream:
        """Print the operators."""
        print(self._shown().explain())  # noqa: T201
        return self

    def print_physical_plan(self) -> DataStream:
        """Print the operators; there is one plan here."""
        return self.print_plan()

    def sink_kafka(self, bootstrap_servers: str, topic: str) -> None:
        """Run, sending every row as JSON to a topic of Kafka, exactly once; see `operators.DataStream.write_kafka`.

        With a transport of the context it is a topic of that, at least once.
        """
        transport, name = self._context.transport, f"topic-{topic}"
        if transport is None:
            self._run(self._shown().write_kafka(topic, bootstrap_servers, name=name))
        else:
            self._run(self._shown().sink(TopicSink(transport, topic), name=name))

    def sink(self, func: Callable[[pa.RecordBatch], Any]) -> None:
        """Run, calling a function with every batch as soon as it is there."""
        self._run(self._shown().sink(ImmediateCallbackSink(func), name="sink"))

    # -- helpers

    def _then(self, stream: Stream) -> DataStream:
        return DataStream(self._context, stream)

    def _hides_time(self) -> bool:
        return _TIME in self._stream.schema.names

    def _shown(self) -> Stream:
        return self._stream.drop(_TIME) if self._hides_time() else self._stream

    def _for_join(self) -> Stream:
        """The right side of a join: its hidden time may not meet the left one's."""
        return self._stream.with_column_renamed(_TIME, _RIGHT_TIME) if self._hides_time() else self._stream

    def _joined(self, stream: Stream) -> DataStream:
        """One hidden time goes on: that which is the event time of the result."""
        if _RIGHT_TIME in stream.schema.names:
            if stream.event_time == _RIGHT_TIME:
                kept = stream.drop(_TIME) if _TIME in stream.schema.names else stream
                stream = kept.with_column_renamed(_RIGHT_TIME, _TIME)
            else:
                stream = stream.drop(_RIGHT_TIME)
        return self._then(stream)

    def _run(self, ended: Stream) -> None:
        del ended
        self._context.streams.run()


def _how(join_type: str) -> str:
    """DataFusion's names of joins, in any case: inner, left, right, full, leftsemi, leftanti."""
    return join_type.lower().replace("leftsemi", "semi").replace("leftanti", "anti")
