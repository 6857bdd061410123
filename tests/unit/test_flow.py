"""Union, split, event time assigned later, processing time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, functions, lit

from operators import BadEventTimeError, SchemaError, StreamContext
from operators.sinks import MemorySink
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut, events, milliseconds_of, one_shot


def count() -> Any:
    return functions.count(lit(1)).alias("n")


def test_a_union_has_the_rows_of_all_and_the_event_time_of_the_one_furthest_behind() -> None:
    tables = {name: events(seed, 600, disorder_ms=200) for seed, name in enumerate("abc")}
    inputs = {name: cut(table, seed) for seed, (name, table) in enumerate(tables.items())}

    def pipeline(streams: Any) -> Any:
        merged = streams["a"].union(streams["b"], streams["c"].filter(col("j") > lit(0)), name="u")
        windows = merged.window("k", count(), 1000, name="w")
        return {"windows": windows, "late": windows.late_rows()}

    kept = tables["c"].filter(pa.compute.greater(tables["c"]["j"], 0))
    both = pa.concat_tables([tables["a"], tables["b"], kept])
    expected = as_multiset(one_shot(both, 1000, 1000, keys=["k"], select="count(1) AS n"))
    for crashes in (0, 4):
        found = survive(pipeline, inputs, seed=5, crashes=crashes, max_disorder=200)
        assert as_multiset(found["windows"]) == expected
        assert found["late"].num_rows == 0


def test_streams_of_other_columns_or_event_times_are_not_united() -> None:
    context = StreamContext()
    table = events(1, 10)
    a = context.from_batches(table, event_time="t", name="a")
    with pytest.raises(SchemaError, match=r"stream 1 has columns"):
        a.union(a.drop("x"))
    with pytest.raises(SchemaError, match="assign_event_time"):
        a.union(context.from_batches(table, name="b"))
    updated = a.window("k", count(), 10, allowed_lateness=5)
    with pytest.raises(SchemaError, match="counted twice"):
        updated.union(updated)
    with pytest.raises(ValueError, match="at least one other"):
        a.union()
    assert "union a.union of 2 streams" in a.union(a).explain()


def test_a_split_sends_each_row_to_the_first_branch_that_wants_it() -> None:
    table = events(9, 800)

    def pipeline(streams: Any) -> Any:
        return streams["in"].split(low=col("v") < lit(-500), even=col("v") % lit(2) == lit(0), name="s")

    found = survive(pipeline, {"in": cut(table, 9)}, seed=2)
    rows = table.to_pylist()

    def branch(v: int | None) -> str:
        return "rest" if v is None else "low" if v < -500 else "even" if v % 2 == 0 else "rest"

    for name in ("low", "even", "rest"):
        expected = pa.Table.from_pylist([r for r in rows if branch(r["v"]) == name], schema=table.schema)
        assert as_multiset(found[name]) == as_multiset(expected)


def test_the_branches_of_a_split_have_the_event_time_of_their_input() -> None:
    table = events(9, 500)

    def pipeline(streams: Any) -> Any:
        branches = streams["in"].split(few=col("j") == lit(0))
        return {n: s.window([], count(), 1000, name=f"w-{n}") for n, s in branches.items()}

    found = survive(pipeline, {"in": cut(table, 9)}, seed=3)
    zero = table.filter(pa.compute.equal(table["j"], 0))
    assert as_multiset(found["few"]) == as_multiset(one_shot(zero, 1000, 1000, keys=[], select="count(1) AS n"))


def test_wrong_splits_are_refused() -> None:
    stream = StreamContext().from_batches(events(1, 10))
    with pytest.raises(SchemaError, match="true or false"):
        stream.split(a=col("v"))
    with pytest.raises(ValueError, match="at least one"):
        stream.split()
    with pytest.raises(ValueError, match="rest"):
        stream.split(rest=col("v") > lit(1))


@pytest.mark.parametrize("crashes", [0, 3])
def test_event_time_can_be_assigned_to_a_column_that_was_computed(crashes: int) -> None:
    table = events(4, 700, disorder_ms=400)

    def pipeline(streams: Any) -> Any:
        late = streams["in"].with_column("u", col("t") + lit(pa.scalar(5000, pa.duration("us"))))
        timed = late.drop("t").assign_event_time("u", max_disorder=400, name="time")
        return {"out": timed.window("k", count(), 1000, name="w")}

    moved = table.set_column(
        0, "t", pa.compute.add(table["t"].cast(pa.int64()), 5000).cast(table.schema.field("t").type)
    )
    found = survive(pipeline, {"in": cut(table, 4)}, seed=4, crashes=crashes, event_time=None)["out"]
    expected = one_shot(moved, 1000, 1000, keys=["k"], select="count(1) AS n")
    assert as_multiset(found) == as_multiset(expected)


def test_bad_event_times_are_an_error_or_go_to_the_side_output() -> None:
    table = pa.table({"t": pa.array([0, None, 5]).cast(pa.timestamp("ms")), "v": [0, 1, 2]})
    context = StreamContext(checkpoint_interval=None)
    context.from_batches(table).assign_event_time("t").sink(MemorySink())
    with pytest.raises(BadEventTimeError, match=r"is null.*row 1"):
        context.run()
    context = StreamContext(checkpoint_interval=None)
    good, bad = MemorySink(), MemorySink()
    stream = context.from_batches(table).assign_event_time("t", on_bad_event_time="divert")
    stream.sink(good)
    stream.bad_rows().sink(bad)
    context.run()
    assert (good.table()["v"].to_pylist(), bad.table()["v"].to_pylist()) == ([0, 2], [1])
    with pytest.raises(SchemaError, match="assign_event_time"):
        stream.assign_event_time("v")


def test_processing_time_closes_windows_by_the_clock_also_while_nothing_comes() -> None:
    now = [100.0]
    seen: list[Any] = []

    class Recorder(MemorySink):
        def write(self, batch: pa.RecordBatch) -> None:
            starts = milliseconds_of(pa.chunked_array([batch["window_start_time"]]))
            seen.append((starts, batch["n"].to_pylist()))

    def batches() -> Iterator[pa.RecordBatch]:
        for step in (0.4, 0.2, 5.0, 0.1):
            now[0] += step
            yield pa.record_batch({"v": [1, 2]})

    context = StreamContext(checkpoint_interval=None, clock=lambda: now[0])
    stream = context.from_batches(batches, pa.schema([("v", pa.int64())])).with_processing_time("at")
    assert stream.event_time == "at"
    stream.window([], count(), 1000).sink(Recorder())
    context.run()
    # The window [100 s, 101 s) is closed when the clock shows 105.6, before that batch is counted.
    assert seen == [([100_000], [4]), ([105_000], [4])]
    with pytest.raises(SchemaError, match="already"):
        stream.with_processing_time("at")


def test_processing_time_never_goes_back_even_over_a_restart() -> None:
    table = events(3, 300)
    clock = iter(range(10**6, 0, -1))

    def pipeline(streams: Any) -> Any:
        return {"out": streams["in"].with_processing_time().window("k", count(), 10**12, name="w")}

    found = survive(pipeline, {"in": cut(table, 3)}, seed=8, clock=lambda: next(clock))["out"]
    assert Counter(found["k"].to_pylist()) == Counter(set(table["k"].to_pylist()))
    assert sum(found["n"].to_pylist()) == 300
