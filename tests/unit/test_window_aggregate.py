"""Windows over a stream equal one SQL query over all the rows, whatever the batches and barriers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import Expr, SessionContext, col, functions, lit

from operators import DataStream, SchemaError, StreamContext
from operators.sinks import MemorySink
from operators.stateful import window_aggregate as module
from statebackend import UnsupportedAggregateError
from tests.support.restarts import survive
from tests.support.streams import AGGREGATES, as_multiset, cut, events, milliseconds_of, one_shot

SHAPES = [(1000, 1000), (1000, 400), (900, 250), (600, 200), (300, 1000), (5000, 5000), (1, 1)]


def five() -> list[Expr]:
    return [
        functions.count(lit(1)).alias("n"),
        functions.sum(col("v")).alias("total"),
        functions.min(col("v")).alias("low"),
        functions.max(col("v")).alias("high"),
        functions.avg(col("x")).alias("mean"),
        functions.max(col("s")).alias("last"),
    ]


def read(batches: Sequence[pa.RecordBatch], schema: pa.Schema, **options: Any) -> tuple[StreamContext, DataStream]:
    context = StreamContext(checkpoint_interval=options.pop("checkpoint_interval", None), worker_threads=2)
    return context, context.from_batches(list(batches), schema, event_time="t", **options)


def collect(stream: DataStream) -> MemorySink:
    sink = MemorySink()
    stream.sink(sink)
    return sink


@pytest.fixture(params=[1 << 18, 100], ids=["large buffer", "small buffer"])
def buffer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PARTIAL_ROWS", request.param)
    monkeypatch.setattr(module, "_FIRE_ROWS", request.param)


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize(("length", "slide"), SHAPES)
def test_windows_equal_one_query_over_all_rows(length: int, slide: int) -> None:
    seed = length + slide
    table = events(seed, 1500, disorder_ms=700)
    context, stream = read(cut(table, seed), table.schema, max_disorder=700, checkpoint_interval=0.005)
    windows = stream.window(["k", col("j")], five(), length, slide)
    sink, late = collect(windows), collect(windows.late_rows())
    context.run()
    assert late.table().num_rows == 0
    expected = one_shot(table, length, slide)
    assert as_multiset(sink.table()) == as_multiset(expected)
    assert sink.table().schema.names == expected.schema.names
    assert windows.schema.types[:2] == [pa.timestamp("ms", "UTC")] * 2


@pytest.mark.parametrize(
    "kind",
    [pa.timestamp("s"), pa.timestamp("ms", "UTC"), pa.timestamp("us", "Asia/Tokyo"), pa.timestamp("ns")],
    ids=str,
)
def test_every_unit_and_zone_of_event_time_cuts_the_same_windows(kind: pa.DataType) -> None:
    table = events(7, 600, kind=kind, step_ms=1000)
    context, stream = read(cut(table, 8), table.schema)
    sink = collect(stream.window([col("k")], five(), timedelta(seconds=10), timedelta(seconds=4)))
    context.run()
    assert as_multiset(sink.table()) == as_multiset(one_shot(table, 10_000, 4_000, keys=["k"]))
    assert sink.table().schema.field(0).type == pa.timestamp("ms", kind.tz)


def test_dates_cut_windows_of_days() -> None:
    days = [0, 0, 1, 3, -1, 8]
    table = pa.table({"t": pa.array(days, pa.int32()).view(pa.date32()), "v": days})
    context, stream = read(table.to_batches(max_chunksize=2), table.schema, max_disorder=timedelta(days=10))
    sink = collect(stream.window([], [functions.count(lit(1)).alias("n")], timedelta(days=1)))
    context.run()
    starts = [t // 86_400_000 for t in milliseconds_of(sink.table()["window_start_time"])]
    assert dict(zip(starts, sink.table()["n"].to_pylist(), strict=True)) == {-1: 1, 0: 2, 1: 1, 3: 1, 8: 1}


def test_no_group_columns_means_one_row_per_window() -> None:
    table = events(3, 500)
    context, stream = read(cut(table, 3), table.schema)
    sink = collect(stream.window([], five(), 1000))
    context.run()
    assert as_multiset(sink.table()) == as_multiset(one_shot(table, 1000, 1000, keys=[]))


def test_sketches_ordered_and_distinct_aggregates_keep_their_state() -> None:
    table = events(5, 900)
    select = (
        "median(v) AS middle, count(DISTINCT s) AS kinds, last_value(s ORDER BY t, s) AS latest, stddev(x) AS spread"
    )
    aggregates = [
        functions.median(col("v")).alias("middle"),
        functions.count(col("s"), distinct=True).alias("kinds"),
        functions.last_value(col("s"), order_by=[col("t"), col("s")]).alias("latest"),
        functions.stddev(col("x")).alias("spread"),
    ]
    context, stream = read(cut(table, 4), table.schema, checkpoint_interval=0.005)
    sink = collect(stream.window(["k"], aggregates, 2000, 800))
    context.run()

    assert as_multiset(sink.table()) == as_multiset(one_shot(table, 2000, 800, keys=["k"], select=select))


def test_a_window_is_emitted_once_and_only_when_the_watermark_reaches_its_end() -> None:
    table = pa.table({"t": pa.array([0, 900, 999, 1000, 1999, 2500]).cast(pa.timestamp("ms")), "v": [1, 2, 3, 4, 5, 6]})
    seen: list[tuple[str, int]] = []

    class Recorder(MemorySink):
        def write(self, batch: pa.RecordBatch) -> None:
            seen.extend(("window", s) for s in batch["window_start_time"].cast(pa.int64()).to_pylist())

    def batches() -> Any:
        for batch in table.to_batches(max_chunksize=1):
            seen.append(("row", batch["v"][0].as_py()))
            yield batch

    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(batches, table.schema, event_time="t")
    stream.window([], [functions.sum(col("v")).alias("s")], 1000).sink(Recorder())
    context.run()
    windows = [("row", 1), ("row", 2), ("row", 3), ("row", 4), ("window", 0), ("row", 5), ("row", 6), ("window", 1000)]
    assert seen == [*windows, ("window", 2000)]


def test_rows_of_closed_windows_go_to_the_side_output_and_are_counted() -> None:
    times = [0, 5000, 100, 4999, 5100, 12_000, 5200]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "v": list(range(7))})
    context, stream = read(table.to_batches(max_chunksize=1), table.schema)
    windows = stream.window([], [functions.count(lit(1)).alias("n")], 1000, name="w")
    sink, late = collect(windows), collect(windows.late_rows())
    result = context.run()
    assert late.table()["v"].to_pylist() == [2, 3, 6]
    assert late.table().schema == table.schema
    assert result.operators["w"].side_rows == 3
    assert sink.table()["n"].to_pylist() == [1, 2, 1]


def test_of_a_sliding_window_a_row_counts_in_the_windows_that_are_still_open() -> None:
    table = pa.table({"t": pa.array([0, 2500, 1500, 9000]).cast(pa.timestamp("ms")), "v": [1, 10, 100, 0]})
    context, stream = read(table.to_batches(max_chunksize=1), table.schema)
    windows = stream.window([], [functions.sum(col("v")).alias("s")], 2000, 1000)
    sink, late = collect(windows), collect(windows.late_rows())
    context.run()
    sums = dict(zip(milliseconds_of(sink.table()["window_start_time"]), sink.table()["s"].to_pylist(), strict=True))
    # At 2500 the window [0, 2000) has fired; the row at 1500 still counts in [1000, 3000).
    assert sums == {-1000: 1, 0: 1, 1000: 110, 2000: 10, 8000: 0, 9000: 0}
    assert late.table().num_rows == 0


def final_rows(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """The last emitted row of each window and group."""
    last = {tuple(r[k] for k in ("window_start_time", *keys)): r for r in table.to_pylist()}
    return pa.Table.from_pylist(list(last.values()), schema=table.schema)


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize(("length", "slide"), SHAPES)
def test_with_allowed_lateness_the_last_update_of_each_window_is_right(length: int, slide: int) -> None:
    table = events(length * 7 + slide, 1200, disorder_ms=2000)
    batches = cut(table, slide)
    context, stream = read(batches, table.schema, max_disorder=100, checkpoint_interval=0.005)
    windows = stream.window(["k", "j"], five(), length, slide, allowed_lateness=2500)
    sink, late = collect(windows), collect(windows.late_rows())
    context.run()
    assert late.table().num_rows == 0
    if length > 1:
        assert sink.table().num_rows > one_shot(table, length, slide).num_rows, "no window was updated"
    assert as_multiset(final_rows(sink.table(), ["k", "j"])) == as_multiset(one_shot(table, length, slide))


def test_an_update_holds_only_the_groups_that_changed_and_follows_the_batch_at_once() -> None:
    times = [0, 10, 20, 3000, 30, 3100]
    keys = ["a", "b", "c", "a", "b", "a"]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": keys})
    context, stream = read(table.to_batches(max_chunksize=1), table.schema)
    windows = stream.window(["k"], [functions.count(lit(1)).alias("n")], 1000, allowed_lateness=5000)
    sink = collect(windows)
    context.run()
    first, second, third = sink.batches
    assert sorted(zip(first["k"].to_pylist(), first["n"].to_pylist(), strict=True)) == [("a", 1), ("b", 1), ("c", 1)]
    assert (second["k"].to_pylist(), second["n"].to_pylist()) == (["b"], [2])
    assert (third["k"].to_pylist(), third["n"].to_pylist()) == (["a"], [2])


def test_rows_later_than_the_allowed_lateness_are_late() -> None:
    times = [0, 3000, 500, 6001, 600]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "v": [0, 1, 2, 3, 4]})
    context, stream = read(table.to_batches(max_chunksize=1), table.schema)
    windows = stream.window([], [functions.count(lit(1)).alias("n")], 1000, allowed_lateness=5000)
    late = collect(windows.late_rows())
    collect(windows)
    context.run()
    assert late.table()["v"].to_pylist() == [4]


def test_windows_of_windows_equal_the_query_of_the_query() -> None:
    table = events(11, 1500, disorder_ms=300)
    context, stream = read(cut(table, 11), table.schema, max_disorder=300)
    small = stream.window(["k"], [functions.count(lit(1)).alias("n"), functions.sum(col("v")).alias("s")], 500, 250)
    large = small.with_column_renamed("window_start_time", "t").window(
        ["k"], [functions.sum(col("n")).alias("n"), functions.sum(col("s")).alias("s")], 4000
    )
    sink, late = collect(large), collect(large.late_rows())
    context.run()
    inner = one_shot(table, 500, 250, keys=["k"], select="count(1) AS n, sum(v) AS s")
    outer = one_shot(
        inner.rename_columns({"window_start_time": "t"}).drop_columns("window_end_time"),
        4000,
        4000,
        keys=["k"],
        select="sum(n) AS n, sum(s) AS s",
    )
    assert late.table().num_rows == 0
    assert as_multiset(sink.table()) == as_multiset(outer)


def test_dead_panes_leave_the_table_and_the_watermark_jumps_far_in_no_time() -> None:
    step = 10**12
    times = [0, 1, step, step + 1, 40 * step]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "v": times})
    context, stream = read(table.to_batches(max_chunksize=1), table.schema, future_limit=None)
    sink = collect(stream.window([], [functions.count(lit(1)).alias("n")], 10, 5))
    context.run()
    assert sum(sink.table()["n"].to_pylist()) == 2 * len(times)


def test_a_failing_user_function_names_the_operator_and_the_batch() -> None:
    from datafusion import udf

    from operators import UserFunctionError

    def explode(values: pa.Array) -> pa.Array:
        if pc.max(values).as_py() == 42:
            raise ValueError("forty-two")
        return values

    broken = udf(explode, [pa.int64()], pa.int64(), "immutable", "explode")
    table = pa.table({"t": pa.array([0, 1, 2]).cast(pa.timestamp("ms")), "v": [1, 42, 3]})
    for within in ("window", "verb"):
        context, stream = read(table.to_batches(max_chunksize=1), table.schema)
        if within == "window":
            stream = stream.window([], [functions.sum(broken(col("v"))).alias("s")], 1000, name="sums")
        else:
            stream = stream.with_column("w", broken(col("v")))
        collect(stream)
        with pytest.raises(UserFunctionError, match="forty-two") as caught:
            context.run()
        assert caught.value.operator_id == ("sums" if within == "window" else "batches:with_columns")
        assert "batches, batch" in str(caught.value)


def test_wrong_windows_are_refused_when_the_stream_is_built() -> None:
    table = events(1, 10)
    _, stream = read(cut(table, 1), table.schema)
    count = [functions.count(lit(1)).alias("n")]
    with pytest.raises(SchemaError, match=r"nope.*available columns: t, k, j, v, x, s"):
        stream.window(["nope"], count, 1000)
    with pytest.raises(SchemaError, match=r"(?s)nope.*available columns: t, k, j, v, x, s"):
        stream.window([col("nope")], count, 1000)
    with pytest.raises(SchemaError, match=r"(?s)nope.*available columns"):
        stream.window(["k"], [functions.sum(col("nope"))], 1000)
    with pytest.raises(UnsupportedAggregateError, match="sum"):
        stream.window(["k"], [functions.sum(col("k"))], 1000)
    with pytest.raises((SchemaError, UnsupportedAggregateError)):
        stream.window(["k"], [col("v")], 1000)
    with pytest.raises(SchemaError, match=r"drop\(t\) dropped or replaced the event time column 't'"):
        stream.drop("t").window(["k"], count, 1000)
    with pytest.raises(SchemaError, match="counted twice"):
        stream.window(["k"], count, 10, allowed_lateness=1).window(["k"], count, 1000)
    with pytest.raises(SchemaError, match="rename it"):
        stream.window(["k"], count, 10, name="a").window(["k"], count, 1000)
    with pytest.raises(SchemaError, match="late rows have no watermark"):
        stream.window(["k"], count, 10, name="b").late_rows().window(["k"], count, 1000)
    with pytest.raises(ValueError, match="must be positive"):
        stream.window(["k"], count, 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_windows_over_random_batches_equal_one_query(seed: int) -> None:
    rng = random.Random(seed)
    disorder = rng.choice([0, 30, 1500])
    table = events(seed + 100, rng.randrange(1, 2500), disorder_ms=disorder)
    length, slide = rng.randrange(1, 4000), rng.randrange(100, 4000)
    context, stream = read(
        cut(table, seed, rng.choice([3, 100, 5000])), table.schema, max_disorder=disorder, checkpoint_interval=0.01
    )
    filtered = stream.filter(col("v") > lit(-500)).with_column("x", col("x") * lit(2.0)).drop("s")
    sink = collect(
        filtered.window(["j"], [functions.count(lit(1)).alias("n"), functions.sum(col("x")).alias("y")], length, slide)
    )
    context.run()
    kept = table.filter(pc.greater(table["v"], -500))
    expected = one_shot(kept, length, slide, keys=["j"], select="count(1) AS n, sum(2.0 * x) AS y")
    assert as_multiset(sink.table()) == as_multiset(expected)


def cumulated(table: pa.Table, step: int, length: int) -> pa.Table:
    """What one SQL query says of cumulate windows: each row once per window that holds it."""
    places, starts, ends = [], [], []
    for row, time in enumerate(milliseconds_of(table["t"])):
        start = time // length * length
        for end in range(start + step, start + length + 1, step):
            if time < end:
                places.append(row)
                starts.append(start)
                ends.append(end)
    rows = table.take(pa.array(places, pa.int64()))
    kind = pa.timestamp("ms", table["t"].type.tz)
    rows = rows.append_column("window_start_time", pa.array(starts, pa.int64()).cast(kind))
    rows = rows.append_column("window_end_time", pa.array(ends, pa.int64()).cast(kind))
    session = SessionContext()
    session.register_record_batches("rows", [rows.to_batches()])
    group = "window_start_time, window_end_time, k"
    return session.sql(f"SELECT {group}, {AGGREGATES} FROM rows GROUP BY {group}").to_arrow_table()


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize(("step", "length"), [(500, 2000), (1000, 1000), (300, 9000)])
def test_cumulate_windows_grow_by_their_step(step: int, length: int) -> None:
    table = events(step, 1200, disorder_ms=400)
    batches = cut(table, step)

    def pipeline(inputs: Any) -> Any:
        return {"out": inputs["in"].cumulate_window("k", five(), step, length, name="w")}

    expected = as_multiset(cumulated(table, step, length))
    assert as_multiset(survive(pipeline, {"in": batches}, crashes=0, max_disorder=400)["out"]) == expected
    assert as_multiset(survive(pipeline, {"in": batches}, seed=step, max_disorder=400)["out"]) == expected


def test_an_update_of_a_cumulate_window_holds_all_of_its_steps() -> None:
    table = pa.table({"t": pa.array([0, 2500, 600, 9000]).cast(pa.timestamp("ms")), "v": [1, 10, 100, 1000]})
    context, stream = read(table.to_batches(max_chunksize=1), table.schema)
    total = [functions.sum(col("v")).alias("s")]
    sink = collect(stream.cumulate_window([], total, 1000, 3000, allowed_lateness=10_000))
    context.run()
    last = {}
    for row in sink.table().to_pylist():
        last[row["window_start_time"].second, row["window_end_time"].second] = row["s"]
    assert last == {(0, 1): 101, (0, 2): 101, (0, 3): 111, (9, 10): 1000, (9, 11): 1000, (9, 12): 1000}


@pytest.mark.parametrize("slide", [2000, 500])
def test_early_results_stand_for_what_has_come_and_the_last_ones_are_right(slide: int) -> None:
    table = events(17, 1500, disorder_ms=300)
    batches = cut(table, 17)

    def pipeline(inputs: Any) -> Any:
        return {"out": inputs["in"].window(["k", "j"], five(), 2000, slide, emit_every=700, name="w")}

    undisturbed = survive(pipeline, {"in": batches}, crashes=0, max_disorder=300)["out"]
    expected = as_multiset(one_shot(table, 2000, slide))
    assert undisturbed.num_rows > 1.5 * one_shot(table, 2000, slide).num_rows
    assert as_multiset(final_rows(undisturbed, ["k", "j"])) == expected
    assert as_multiset(survive(pipeline, {"in": batches}, seed=3, max_disorder=300)["out"]) == as_multiset(undisturbed)


def test_early_results_come_when_event_time_passes_a_multiple_of_the_interval() -> None:
    times = [0, 1000, 2999, 3100, 5000, 9000]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "v": [1, 2, 3, 4, 5, 6]})
    context, stream = read(table.to_batches(max_chunksize=1), table.schema)
    sums = stream.window([], [functions.sum(col("v")).alias("s")], 8000, emit_every=3000, name="w")
    assert "emitted early every 3000 ms" in sums.explain()
    assert sums.updates is not None
    sink = collect(sums)
    context.run()
    # The first watermark counts as a passing, then 3100 passes 3000; 9000 closes the first window and opens another.
    assert sink.table()["s"].to_pylist() == [1, 10, 15, 6, 6]
