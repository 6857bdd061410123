"""Where streams begin: the readers of `StreamContext`, and the options that all of them share."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypedDict, Unpack

import pyarrow as pa

from operators.errors import SchemaError
from operators.sources import (
    ArrowSource,
    AsyncSource,
    CsvSource,
    FileSource,
    IterableSource,
    JsonSource,
    KafkaSource,
    ParquetSource,
    RateLimit,
    Source,
)
from operators.sources.text import text_suffixes
from operators.stream import DataStream
from operators.watermark import BadEventTime, EventTimeColumn, EventTimeSpec
from operators.windows import Duration, milliseconds

__all__ = ["ReadOptions", "Readers", "event_time_spec", "rate_limit"]

_DAY_MS = 86_400_000


class ReadOptions(TypedDict, total=False):
    """What can be said of every source.

    ``event_time``: names a timestamp or date column; without it the stream has no windows.
    ``max_disorder``: how far behind the latest event time a row may come and not be late; 0 by default.
    ``future_limit``: a time further ahead of the clock is bad; a day by default, None for no limit.
    ``on_bad_event_time``: a row whose time is bad or null is an error (``"error"``, the default), is left out
    (``"drop"``), or is found in `DataStream.bad_rows` (``"divert"``).
    ``idle_timeout``: a source or split that has brought no rows for so long (by the wall clock) does not hold
    event time back any more; None: it always does.
    ``max_drift``: how far a split may be ahead of the slowest one in event time before it is held back; None for no
    limit.
    ``max_rows_per_second``: no more rows than that are taken from the source, on average; None for no limit. Batches
    come whole: after one of n rows the source rests for n / max_rows_per_second seconds.
    ``name``: of the source, which names its position in every checkpoint.
    """

    event_time: str | None
    max_disorder: Duration
    future_limit: Duration | None
    on_bad_event_time: str
    idle_timeout: Duration | None
    max_drift: Duration | None
    max_rows_per_second: float | None
    name: str | None


class Readers(ABC):
    """The sources of a `StreamContext`. Every reader takes the options of `ReadOptions`."""

    def from_source(self, source: Source, **options: Unpack[ReadOptions]) -> DataStream:
        """A stream from any source.

        Raises `SchemaError` if the event time column is missing or no time.
        """
        return self._read(source, ("source", type(source).__name__), options)

    def from_batches(self, batches: Any, schema: pa.Schema | None = None, **options: Unpack[ReadOptions]) -> DataStream:
        """A stream of record batches from Python.

        ``batches``: a table, a collection of batches, anything with ``__arrow_c_stream__`` (pandas, Polars, DuckDB), an
        iterator, a function that returns one, or an async generator function (which needs the schema); see
        `operators.sources.IterableSource` and `operators.sources.AsyncSource` for what can be replayed.
        """
        if inspect.isasyncgenfunction(batches) or isinstance(batches, AsyncIterator):
            if schema is None:
                raise SchemaError("from_batches: an async generator needs schema=")
            return self._read(AsyncSource(batches, schema), ("batches",), options)
        return self._read(IterableSource(batches, schema), ("batches",), options)

    def read(self, what: Any, **options: Any) -> DataStream:
        """A stream of whatever can be read: a source, a file by its ending, or what `from_batches` takes.

        ``options``: those of the reader that fits, which `read_parquet`, `read_csv`, `read_json`, `read_arrow`
        and `from_batches` are.
        """
        if isinstance(what, str | os.PathLike):
            name = os.fspath(what)
            readers = {
                self.read_parquet: (".parquet",),
                self.read_csv: text_suffixes(".csv"),
                self.read_json: text_suffixes(".json", ".jsonl", ".ndjson"),
                self.read_arrow: (".arrow", ".arrows", ".ipc", ".feather"),
            }
            for reader, suffixes in readers.items():
                if name.endswith(suffixes):
                    return reader(what, **options)
            raise ValueError(
                f"read: the ending of {name!r} does not tell the format; "
                "use read_parquet, read_csv, read_json or read_arrow"
            )
        if hasattr(what, "poll") and hasattr(what, "open"):
            return self.from_source(what, **options)
        return self.from_batches(what, **options)

    def read_parquet(self, path: Any, **options: Any) -> DataStream:
        """A stream of Parquet files; ``options`` as for `operators.sources.ParquetSource`, and `ReadOptions`."""
        return self._read_files(ParquetSource, "parquet", path, options)

    def read_csv(self, path: Any, schema: pa.Schema | None = None, **options: Any) -> DataStream:
        """A stream of CSV files; ``options`` as for `operators.sources.CsvSource`, and `ReadOptions`."""
        return self._read_files(CsvSource, "csv", path, {"schema": schema, **options})

    def read_json(self, path: Any, schema: pa.Schema | None = None, **options: Any) -> DataStream:
        """A stream of JSON lines; ``options`` as for `operators.sources.JsonSource`, and `ReadOptions`."""
        return self._read_files(JsonSource, "json", path, {"schema": schema, **options})

    def read_arrow(self, path: Any, **options: Any) -> DataStream:
        """A stream of Arrow IPC files; ``options`` as for `operators.sources.ArrowSource`, and `ReadOptions`."""
        return self._read_files(ArrowSource, "arrow", path, options)

    def read_kafka(
        self, topics: str | Sequence[str], bootstrap_servers: str | Sequence[str], **options: Any
    ) -> DataStream:
        """A stream of topics of Kafka; ``options`` as for `operators.sources.KafkaSource`, and `ReadOptions`.

        ``event_time`` may be a column of the values, or the time of the records: ``metadata=["timestamp"],
        event_time="timestamp"``. Records that cannot be decoded: `DataStream.dead_letters`.
        """
        read, rest = _divided(options)
        words = [topics] if isinstance(topics, str) else topics
        return self._read(KafkaSource(topics, bootstrap_servers, **rest), ("kafka", *words), read)

    def _read_files(
        self, make: Callable[..., FileSource], word: str, path: Any, options: Mapping[str, Any]
    ) -> DataStream:
        read, rest = _divided(options)
        return self._read(make(path, **rest), (word, _path_word(path)), read)

    @abstractmethod
    def _read(self, source: Source, words: tuple[str, ...], options: ReadOptions) -> DataStream:
        """Add a source to the graph, under a name derived from ``words`` unless the options give one."""


def event_time_spec(schema: pa.Schema, options: ReadOptions) -> EventTimeSpec | None:
    """The event time that the options speak of, None for none; `SchemaError` if the column cannot be one."""
    column = options.get("event_time")
    if column is None:
        return None
    try:
        EventTimeColumn(schema, column)
    except (TypeError, ValueError) as error:
        raise SchemaError(str(error)) from error
    return EventTimeSpec(
        column=column,
        max_disorder_ms=milliseconds(options.get("max_disorder", 0), "max_disorder"),
        future_limit_ms=_optional_ms(options.get("future_limit", _DAY_MS), "future_limit"),
        on_bad=BadEventTime(options.get("on_bad_event_time", "error")),
        idle_timeout_ms=_optional_ms(options.get("idle_timeout"), "idle_timeout"),
        max_drift_ms=_optional_ms(options.get("max_drift"), "max_drift"),
    )


def rate_limit(options: ReadOptions) -> RateLimit | None:
    """The limit that the options ask for."""
    rows_per_s = options.get("max_rows_per_second")
    return None if rows_per_s is None else RateLimit(rows_per_s)


def _optional_ms(duration: Duration | None, name: str) -> int | None:
    return None if duration is None else milliseconds(duration, name)


def _divided(options: Mapping[str, Any]) -> tuple[ReadOptions, dict[str, Any]]:
    """What is said of every source, and what is the source's own."""
    read: ReadOptions = {}
    for key in ReadOptions.__annotations__:
        if key in options:
            read[key] = options[key]  # type: ignore[literal-required]
    return read, {key: value for key, value in options.items() if key not in ReadOptions.__annotations__}


def _path_word(path: Any) -> str:
    """The last name of a path, for the id of its source."""
    if isinstance(path, (str, os.PathLike)):
        return PurePath(os.fspath(path)).name
    return "files"
