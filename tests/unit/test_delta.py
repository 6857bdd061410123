"""Delta Lake: every row once, or one row for each key, whatever crashes and whoever publishes at the same time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import col
from datafusion import functions as f
from deltalake import DeltaTable

from operators import SchemaError, StreamContext
from operators.sinks import DeltaSink, SinkContext
from operators.testing import check_exactly_once
from statebackend import MemoryStateBackend

ROWS = pa.table({"id": [*range(8), *range(4)], "word": ["a", "b", None, "c"] * 3, "n": range(12)})
BATCHES = ROWS.to_batches(max_chunksize=4)
STEPS = ("barrier", "committed", "publish", "published")


def contents(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = DeltaTable(path).to_pyarrow_table().to_pylist()
    return sorted(rows, key=lambda row: repr(row.get("word")))


def test_appending_is_exactly_once() -> None:
    def pipeline(context: StreamContext, place: Path) -> None:
        context.from_batches(BATCHES, name="in").write_delta(place / "table", name="out")

    assert check_exactly_once(pipeline, times_per_step=1, steps=STEPS, checkpoint_every=1).rows == {"out": 12}


def test_upserting_is_exactly_once() -> None:
    def pipeline(context: StreamContext, place: Path) -> None:
        stream = context.from_batches(BATCHES, name="in")
        stream.write_delta(place / "table", mode="upsert", key=["id"], name="out")

    report = check_exactly_once(pipeline, times_per_step=1, steps=STEPS, checkpoint_every=1, append_only=False)
    assert report.rows == {"out": 8}


def test_files_through_top_n_into_a_table_are_exactly_once(tmp_path: Path) -> None:
    for number, batch in enumerate(BATCHES):
        pq.write_table(pa.Table.from_batches([batch]), tmp_path / f"{number}.parquet")

    def pipeline(context: StreamContext, place: Path) -> None:
        rows = context.read_parquet(tmp_path, batch_rows=4, name="in")
        newest = rows.top_n(2, "word", col("n").sort(ascending=False), with_rank="rank")
        newest.write_delta(place / "table", name="out")

    report = check_exactly_once(pipeline, times_per_step=1, steps=STEPS, checkpoint_every=1, append_only=False)
    assert report.rows == {"out": 8}


def test_a_table_holds_the_newest_row_of_each_key(tmp_path: Path) -> None:
    context = StreamContext(checkpoint_interval=None)
    context.from_batches(BATCHES).write_delta(tmp_path, mode="upsert", key=["word"])
    context.run()
    assert [(r["word"], r["n"]) for r in contents(tmp_path)] == [("a", 8), ("b", 9), ("c", 11), (None, 10)]


def test_a_changelog_leaves_the_rows_that_are_valid(tmp_path: Path) -> None:
    context = StreamContext(checkpoint_interval=None)
    timed = ROWS.append_column("t", pa.array(range(12), pa.timestamp("us")))
    stream = context.from_batches(timed.to_batches(max_chunksize=4), event_time="t")
    newest = stream.deduplicate("word", keep="last")
    newest.write_delta(tmp_path / "newest")
    stream.aggregate("word", f.sum(col("n")).alias("total")).write_delta(tmp_path / "totals")
    context.run()
    assert [(r["word"], r["n"]) for r in contents(tmp_path / "newest")] == [("a", 8), ("b", 9), ("c", 11), (None, 10)]
    totals = {r["word"]: r["total"] for r in contents(tmp_path / "totals")}
    assert totals == {"a": 0 + 4 + 8, "b": 1 + 5 + 9, None: 2 + 6 + 10, "c": 3 + 7 + 11}
    with pytest.raises(SchemaError, match=r"write_delta.*changelog.*upsert"):
        newest.write_delta(tmp_path / "other", mode="append")


def test_of_two_that_publish_the_same_at_once_one_is_refused_and_looks_again(tmp_path: Path) -> None:
    backends = [MemoryStateBackend() for _ in range(2)]
    sinks = [DeltaSink(tmp_path / "table") for _ in range(2)]
    for sink, backend in zip(sinks, backends, strict=True):
        sink.open(SinkContext("out", ROWS.schema, backend, "one store", "attempt"), ())
        for batch in BATCHES:
            sink.write(batch)
    committables = [sink.prepare(1, final=False).committables for sink in sinks]
    assert committables[0] == committables[1]
    start = threading.Barrier(2)
    failed: list[BaseException] = []

    def publish(number: int) -> None:
        start.wait(10)
        try:
            sinks[number].publish(committables[number])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=publish, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(contents(tmp_path / "table")) == 12
    assert DeltaTable(tmp_path / "table").version() == 1
    for backend in backends:
        backend.close()


def test_columns_and_times_are_those_that_delta_has(tmp_path: Path) -> None:
    times = pa.table({"t": pa.array([1, None], pa.timestamp("ms", "UTC")), "p": ["x", "y"]})
    context = StreamContext()
    context.from_batches(times).write_delta(tmp_path / "times", partition_by=["p"])
    context.run()
    assert {row["p"]: row["t"] is None for row in contents(tmp_path / "times")} == {"x": False, "y": True}
    assert DeltaTable(tmp_path / "times").metadata().partition_columns == ["p"]
    again = StreamContext()
    again.from_batches(ROWS).write_delta(tmp_path / "times")
    with pytest.raises(SchemaError, match=r"has the columns \['t', 'p'\], the stream \['id', 'word', 'n'\]"):
        again.run()
    odd = StreamContext()
    odd.from_batches(pa.table({"i": pa.nulls(1, pa.month_day_nano_interval())})).write_delta(tmp_path / "odd")
    with pytest.raises(SchemaError, match="no Delta table of these columns"):
        odd.run()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "upsert"}, "needs key="),
        ({"key": ["id"]}, "needs key="),
        ({"mode": "merge"}, "'append' or 'upsert'"),
        ({"changes": "op"}, "needs mode='upsert'"),
        ({"memory_bytes": 0}, "memory_bytes"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DeltaSink(tmp_path, **options)
