"""Everything in this process that streams can be made of, one source after another, and how fast they are read."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import StreamContext
from operators.errors import SchemaError, SourceChangedError, SourceNotReplayableError
from operators.nexmark.generator import generate
from operators.nexmark.live import NexmarkSource
from operators.nexmark.model import Kind, NexmarkConfig
from operators.sinks import MemorySink
from operators.sources import (
    IDLE,
    AsyncSource,
    IterableSource,
    MultiSource,
    ParquetSource,
    RateLimit,
    Source,
    SourceBatch,
    ThenSource,
)
from operators.testing import check_exactly_once, check_source

SCHEMA = pa.schema([("id", pa.int64()), ("t", pa.timestamp("ms"))])


def rows(start: int, count: int = 10) -> pa.RecordBatch:
    ids = range(start, start + count)
    return pa.record_batch([pa.array(ids), pa.array([i * 1000 for i in ids], pa.timestamp("ms"))], schema=SCHEMA)


BATCHES = [rows(10 * n) for n in range(4)]
TABLE = pa.Table.from_batches(BATCHES)


def ids(context: StreamContext, stream: Any) -> list[int]:
    sink = MemorySink()
    stream.sink(sink)
    context.run()
    return [i for batch in sink.batches for i in batch.column("id").to_pylist()]


# --- what a stream can be made of --------------------------------------------------------------------------------


async def feed(start: int = 0) -> AsyncIterator[pa.RecordBatch]:
    for batch in BATCHES[start:]:
        await asyncio.sleep(0)
        yield batch


class Frame:
    """Anything with an Arrow C stream, as a DataFrame of Polars is."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return TABLE.__arrow_c_stream__(requested_schema)


THINGS: dict[str, Any] = {
    "a table": lambda: TABLE,
    "a list": lambda: BATCHES,
    "a function": lambda: lambda: iter(BATCHES),
    "pandas": lambda: pd.DataFrame({"id": range(40)}),
    "DuckDB": lambda: duckdb.sql("SELECT range AS id FROM range(40) ORDER BY id"),
    "an Arrow C stream": Frame,
    "a reader": lambda: TABLE.to_reader(),
    "a source": lambda: IterableSource(TABLE),
}


@pytest.mark.parametrize("kind", THINGS)
def test_a_stream_is_made_of_whatever_has_batches(kind: str) -> None:
    context = StreamContext()
    assert ids(context, context.read(THINGS[kind]())) == list(range(40))


@pytest.mark.parametrize("kind", ["pandas", "DuckDB", "an Arrow C stream"])
def test_what_has_an_arrow_c_stream_is_replayed(kind: str) -> None:
    assert check_source(lambda: IterableSource(THINGS[kind]())) == 40


def test_files_are_told_by_their_endings(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path)
    context = StreamContext()
    assert ids(context, context.read(path, event_time="t", columns=["id", "t"])) == list(range(40))
    with pytest.raises(ValueError, match="read_parquet, read_csv, read_json or read_arrow"):
        context.read(tmp_path)


# --- async -------------------------------------------------------------------------------------------------------


def test_an_async_generator_is_a_stream() -> None:
    context = StreamContext()
    assert ids(context, context.read(feed, schema=SCHEMA)) == list(range(40))
    again = StreamContext()
    assert ids(again, again.from_batches(feed(), SCHEMA)) == list(range(40))
    with pytest.raises(SchemaError, match="needs schema="):
        context.from_batches(feed)


@pytest.mark.parametrize("make", [feed, lambda: feed()])
def test_an_async_function_is_replayed(make: Any) -> None:
    assert check_source(lambda: AsyncSource(make, SCHEMA)) == 40


def test_an_async_generator_that_was_made_already_is_read_once() -> None:
    source = AsyncSource(feed(), SCHEMA)
    with pytest.raises(SourceNotReplayableError, match="asked to start at batch 2"):
        source.open({"batches": 2, "rows": 20})
    source.open(None)
    source.close()
    with pytest.raises(SourceNotReplayableError, match="opened a second time"):
        source.open(None)
    with pytest.raises(SourceChangedError, match="expected 90 rows in 9 batches, found 40 rows in 4"):
        AsyncSource(lambda: feed(), SCHEMA).open({"batches": 9, "rows": 90})


def test_a_generator_that_waits_for_ever_leaves_the_source_idle_and_is_cancelled() -> None:
    ended = threading.Event()

    async def quiet() -> AsyncIterator[pa.RecordBatch]:
        try:
            yield BATCHES[0]
            await asyncio.Event().wait()
        finally:
            ended.set()

    source = AsyncSource(quiet, SCHEMA)
    source.open(None)
    while (item := source.poll()) is IDLE:
        pass
    assert isinstance(item, SourceBatch)
    assert source.poll() is IDLE
    source.close()
    assert ended.is_set()
    assert not [t for t in threading.enumerate() if t.name == "async-source"]


def test_an_error_of_an_async_generator_tells_the_batch() -> None:
    async def breaks() -> AsyncIterator[pa.RecordBatch]:
        yield BATCHES[0]
        raise OSError("connection lost")

    context = StreamContext()
    with pytest.raises(OSError, match="connection lost") as raised:
        ids(context, context.read(breaks, schema=SCHEMA))
    assert raised.value.__notes__ == ["raised by the user's async generator in place of batch 1"]


def test_an_async_generator_does_not_run_ahead_of_the_job() -> None:
    made = 0

    async def endless() -> AsyncIterator[pa.RecordBatch]:
        nonlocal made
        while True:
            made += 1
            yield BATCHES[0]

    source = AsyncSource(endless, SCHEMA)
    source.open(None)
    for _ in range(3):
        while source.poll() is IDLE:
            pass
    assert made <= 3 + 6  # the depth of the readahead, one that waits to get in, and one that is being made
    source.close()


# --- one after another -------------------------------------------------------------------------------------------


def splits(batches: list[pa.RecordBatch]) -> Source:
    return MultiSource({"x": IterableSource(batches), "y": IterableSource(batches)})


@pytest.mark.parametrize("live", [IterableSource, splits])
def test_one_source_is_read_after_another(live: Any) -> None:
    def make() -> ThenSource:
        return ThenSource(IterableSource(BATCHES[:2]), live(BATCHES[2:]))

    count = 40 if live is IterableSource else 60
    assert check_source(make) == count

    def pipeline(context: StreamContext, place: Path) -> None:
        context.from_source(make(), name="in", event_time="t").write_parquet(
            f"memory://then/{place.parent.name}/{place.name}", name="out", roll_rows=1
        )

    assert check_exactly_once(pipeline, times_per_step=1, steps=("poll", "committed")).rows == {"out": count}


def test_an_event_time_says_where_the_first_ends_and_the_second_begins() -> None:
    at = dt.datetime(1970, 1, 1, 0, 0, 15)  # noqa: DTZ001 - the column has no zone
    source = ThenSource(IterableSource(BATCHES[:3]), IterableSource(BATCHES), column="t", at=at)
    context = StreamContext()
    assert ids(context, context.read(source, event_time="t")) == list(range(40))
    assert (
        check_source(lambda: ThenSource(IterableSource(BATCHES[:3]), IterableSource(BATCHES), column="t", at=at)) == 40
    )


def test_sources_that_do_not_go_together_are_refused() -> None:
    other = IterableSource(pa.table({"id": [1]}))
    with pytest.raises(SchemaError, match=r"(?s)the first has columns.*the second"):
        ThenSource(IterableSource(BATCHES), other)
    with pytest.raises(SchemaError, match="no column 'u'"):
        ThenSource(other, other, column="u", at=dt.date(2013, 1, 1))
    with pytest.raises(SchemaError, match="cannot be compared with 't'"):
        ThenSource(IterableSource(BATCHES), IterableSource(BATCHES), column="t", at="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belong together"):
        ThenSource(other, other, column="id")


# --- how fast ----------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_source_rests_after_a_batch_for_as_long_as_its_rows_take() -> None:
    clock = Clock()
    limit = RateLimit(10, clock=clock)
    assert limit.ready()
    limit.took(5)
    clock.now = 100.49
    assert not limit.ready()
    clock.now = 100.5
    assert limit.ready()
    clock.now = 200.0  # a job that was busy may catch up a tenth of a second, not a hundred
    limit.took(1)
    assert limit.ready()
    limit.took(1)
    clock.now = 200.09
    assert not limit.ready()
    for wrong in (0, -1, float("inf")):
        with pytest.raises(ValueError, match="max_rows_per_second"):
            RateLimit(wrong)


def test_a_limit_changes_nothing_of_what_is_read() -> None:
    context = StreamContext()
    assert ids(context, context.read(TABLE, max_rows_per_second=10_000)) == list(range(40))


# --- Nexmark -----------------------------------------------------------------------------------------------------


def test_nexmark_events_are_made_while_they_are_read() -> None:
    config = NexmarkConfig(seed=7)

    def make() -> NexmarkSource:
        return NexmarkSource("bid", config=config, events=2_500, batch_events=1_000)

    assert check_source(make) == 2_500 * 46 // 50
    source = make()
    source.open(None)
    batches = [item.batch for item in iter(source.poll, None) if isinstance(item, SourceBatch)]
    assert pa.Table.from_batches(batches).equals(pa.Table.from_batches([generate(config, Kind.BID, 0, 2_500)]))
    assert NexmarkSource("bid", ["auction", "price"]).schema.names == ["auction", "price"]


def test_nexmark_events_come_at_their_rate() -> None:
    clock = Clock()
    source = NexmarkSource("person", events_per_second=1_000, batch_events=500, clock=clock)
    source.open({"events": 10_000})
    assert source.poll() is IDLE
    clock.now += 0.499
    assert source.poll() is IDLE
    clock.now += 0.001
    item = source.poll()
    assert isinstance(item, SourceBatch)
    assert item.position == {"events": 10_500}
    assert source.poll() is IDLE
    clock.now += 0.5
    assert isinstance(source.poll(), SourceBatch)
    with pytest.raises(ValueError, match="events_per_second"):
        NexmarkSource("person", events_per_second=0)


def test_a_job_asks_a_source_that_rests_for_nothing(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    clock, waits = Clock(), 0
    context = StreamContext()
    stream = context.from_source(ParquetSource(tmp_path, batch_rows=10))
    sink = MemorySink()
    stream.sink(sink)
    (node,) = (n for n in context.graph.nodes() if hasattr(n, "limit"))
    object.__setattr__(node, "limit", RateLimit(10, clock=clock))

    def wait() -> None:
        nonlocal waits
        waits += 1
        clock.now += 0.5

    context._settings = context._settings.__class__(hook=lambda step: wait() if step == "idle" else None)
    context.run()
    assert sum(batch.num_rows for batch in sink.batches) == 40
    assert waits == 8  # a second after each batch of ten, looked at twice
