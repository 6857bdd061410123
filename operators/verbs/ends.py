"""The ends of a stream, and its side outputs. Each end returns the stream, so that it can have several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Self

import pyarrow as pa

from operators.changelog import OP, require_append_only
from operators.flow import EventTimeNode
from operators.graph import Port, SinkNode, SourceNode, StepNode
from operators.sinks import ArrowSink, CallbackSink, CsvSink, DeltaSink, FileSink, JsonSink, ParquetSink, PrintSink
from operators.sinks.base import Sink
from operators.sources.base import DeadLetterSource
from operators.verbs.base import StreamBase
from operators.watermark import BadEventTime, EventTimeSpec

__all__ = ["EndVerbs"]


class EndVerbs(StreamBase):
    """Sinks, and the rows that a source set aside."""

    def bad_rows(self) -> Self:
        """The rows of a source (or of `assign_event_time`) whose event time is null or too far in the future.

        Only with ``on_bad_event_time="divert"``.
        """
        node = self._port.node
        spec = node.event_time if isinstance(node, SourceNode | EventTimeNode) else None
        if not isinstance(spec, EventTimeSpec) or spec.on_bad is not BadEventTime.DIVERT:
            raise ValueError('bad_rows: call it right on a source that is read with on_bad_event_time="divert"')
        return self._derive(
            Port(node, 1),
            self._schema,
            event_time=None,
            time_note="bad rows have no watermark",
        )

    def dead_letters(self) -> Self:
        """The records of a source that could not be decoded, as they were, with the reason.

        Of Kafka: topic, partition, offset, timestamp, key, value (binary) and error. Only of a source that is read with
        ``on_bad_record="divert"``.
        """
        node = self._port.node
        source = node.source if isinstance(node, SourceNode) else None
        if not isinstance(source, DeadLetterSource) or not source.diverts:
            raise ValueError('dead_letters: call it right on a source that is read with on_bad_record="divert"')
        return self._derive(
            Port(node, 2), source.dead_letters, event_time=None, time_note="dead letters have no watermark"
        )

    def late_rows(self) -> Self:
        """The input rows of a window, a deduplication and the like that came too late to count."""
        node = self._port.node
        if isinstance(node, StepNode | SinkNode) or "late" not in node.output_names:
            raise ValueError("late_rows: only an operator that sets late rows aside has them; call it right there")
        schema: pa.Schema = getattr(node, "input_schema")  # noqa: B009 - every node with late rows has one
        port = Port(node, node.output_names.index("late"))
        return self._derive(port, schema, event_time=None, time_note="late rows have no watermark")

    def sink(self, sink: Sink, *, name: str | None = None) -> Self:
        """Hand every batch to a sink."""
        return self._end(sink, name, str(sink.describe().get("kind", type(sink).__name__)))

    def write_parquet(
        self, path: str | os.PathLike[str], partition_by: Sequence[str] = (), *, name: str | None = None, **options: Any
    ) -> Self:
        """Write a directory of Parquet files, exactly once; ``options`` as for `operators.sinks.ParquetSink`."""
        return self._write_files(ParquetSink, path, partition_by, name, options)

    def write_csv(
        self, path: str | os.PathLike[str], partition_by: Sequence[str] = (), *, name: str | None = None, **options: Any
    ) -> Self:
        """Write a directory of CSV files, exactly once; ``options`` as for `operators.sinks.CsvSink`."""
        return self._write_files(CsvSink, path, partition_by, name, options)

    def write_json(
        self, path: str | os.PathLike[str], partition_by: Sequence[str] = (), *, name: str | None = None, **options: Any
    ) -> Self:
        """Write a directory of JSON lines, exactly once; ``options`` as for `operators.sinks.JsonSink`."""
        return self._write_files(JsonSink, path, partition_by, name, options)

    def write_arrow(
        self, path: str | os.PathLike[str], partition_by: Sequence[str] = (), *, name: str | None = None, **options: Any
    ) -> Self:
        """Write a directory of Arrow IPC files, exactly once; ``options`` as for `operators.sinks.ArrowSink`."""
        return self._write_files(ArrowSink, path, partition_by, name, options)

    def write_delta(
        self,
        path: str | os.PathLike[str],
        *,
        mode: str | None = None,
        key: Sequence[str] = (),
        name: str | None = None,
        **options: Any,
    ) -> Self:
        """Write to a Delta Lake table, exactly once; ``options`` as for `operators.sinks.DeltaSink` (extra ``delta``).

        ``mode``: ``"append"`` (the default), or ``"upsert"``: the table holds the newest row of each ``key``. A stream
        that corrects itself is always upserted, by its own key unless another is given; rows that are gone are deleted.
        """
        updates = self._updates
        if updates is not None:
            if mode == "append":
                require_append_only("write_delta", updates, '; mode="upsert" keeps the rows that are valid')
            mode, key = "upsert", key or updates.key
            options = {**options, "changes": OP if updates.changelog else None}
        self._require("write_delta", [*key, *options.get("partition_by", ())])
        sink = DeltaSink(path, mode=mode or "append", key=key, **options)
        return self._end(sink, name, "delta", PurePath(os.fspath(path)).name)

    def print(self, *, name: str | None = None, **options: Any) -> Self:
        """Print every batch; ``options`` as for `operators.sinks.PrintSink`."""
        return self._end(PrintSink(**options), name, "print")

    def print_stream(self, *, name: str | None = None, **options: Any) -> Self:
        """The same as `print`."""
        return self.print(name=name, **options)

    def for_each(self, function: Callable[..., object], *, name: str | None = None, **options: Any) -> Self:
        """Call a function with every batch; ``options`` as for `operators.sinks.CallbackSink`."""
        return self._end(CallbackSink(function, **options), name, "for_each")

    def _write_files(
        self,
        make: Callable[..., FileSink],
        path: str | os.PathLike[str],
        partition_by: Sequence[str],
        name: str | None,
        options: Mapping[str, Any],
    ) -> Self:
        sink = make(path, partition_by, **options)
        kind = str(sink.describe()["kind"])
        self._require(f"write_{kind}", partition_by)
        return self._end(sink, name, kind, PurePath(os.fspath(path)).name)

    def _end(self, sink: Sink, name: str | None, *words: str) -> Self:
        node = SinkNode(
            operator_id=self._claim(name, *words),
            input=self._port,
            schema=self._schema,
            sink=sink,
        )
        self._context.graph.sinks.append(node)
        return self
