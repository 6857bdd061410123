"""Joins of streams equal one query over all rows, whatever the batches, the order of arrival and the crashes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from datafusion import col, functions, lit, udf

from operators import DataStream, SchemaError, StreamContext, UserFunctionError
from operators.sinks import MemorySink
from operators.stateful import interval_join
from operators.stateful.join_state import MatchFlags
from statebackend import MemoryStateBackend, MemoryStateSpace
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut

HOWS = ["inner", "left", "right", "full", "semi", "anti"]
DUCK = {"inner": "INNER", "left": "LEFT", "right": "RIGHT", "full": "FULL", "semi": "SEMI", "anti": "ANTI"}


def rows(seed: int, count: int, tag: str, *, disorder_ms: int = 200, kind: pa.DataType | None = None) -> pa.Table:
    """Rows (t, k, j, <tag>) with nulls and repetitions in the keys, ties in time, and disorder."""
    rng = np.random.default_rng(seed)
    kind = kind or pa.timestamp("ms", "UTC")
    per_s = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[kind.unit]
    times = (np.sort(rng.integers(0, 12_000, count)) - rng.integers(0, disorder_ms + 1, count)) // 100 * 100
    names = np.array([None, "a", "b", "c", "long key " * 3], dtype=object)
    return pa.table(
        {
            "t": pa.array(times * per_s // 1000).view(kind),
            "k": pa.array(list(names[rng.integers(0, 5, count)]), pa.string()),
            "j": pa.array(rng.integers(0, 3, count), pa.int32(), mask=rng.random(count) < 0.1),
            tag: pa.array(np.arange(count) + seed * 100_000),
        }
    )


def sides(seed: int, left: int = 120, right: int = 140, **options: Any) -> dict[str, pa.Table]:
    """Two inputs whose event times and values have names of their own."""
    one, other = rows(seed, left, "v", **options), rows(seed + 1, right, "w", **options)
    return {"left": one, "right": other.rename_columns({"t": "u"})}


def batches(tables: Mapping[str, pa.Table], seed: int, mean_rows: int = 12) -> dict[str, list[pa.RecordBatch]]:
    return {name: cut(table, seed + n, mean_rows) for n, (name, table) in enumerate(tables.items())}


def read(
    context: StreamContext, tables: Mapping[str, pa.Table], seed: int = 1, **options: Any
) -> dict[str, DataStream]:
    options.setdefault("max_disorder", 300)
    return {
        name: context.from_batches(
            cut(table, seed + n, 12), table.schema, event_time=table.schema.names[0], name=name, **options
        )
        for n, (name, table) in enumerate(tables.items())
    }


def run(
    tables: Mapping[str, pa.Table], build: Callable[[Mapping[str, DataStream]], DataStream], **options: Any
) -> pa.Table:
    context = StreamContext(checkpoint_interval=None)
    sink = MemorySink()
    stream = build(read(context, tables, **options))
    stream.sink(sink)
    context.run()
    assert sink.table().schema.equals(stream.schema) or not sink.batches
    return sink.table() if sink.batches else stream.schema.empty_table()


def query(tables: Mapping[str, pa.Table], sql: str) -> pa.Table:
    with duckdb.connect() as database:
        for name, table in tables.items():
            database.register(f"{name}_rows", table)
        database.execute("SET TimeZone = 'UTC'")
        return database.sql(sql).to_arrow_table()


def same(found: pa.Table, expected: pa.Table) -> None:
    assert found.schema.names == expected.schema.names
    expected = expected.cast(pa.schema([pa.field(f.name, f.type) for f in found.schema]))
    assert as_multiset(found) == as_multiset(expected)


def interval_sql(how: str, condition: str, *, keys: str = "(l.k = r.k AND l.j = r.j)") -> str:
    columns = {"semi": "l.*", "anti": "l.*"}.get(how, "coalesce(l.k, r.k) AS k, coalesce(l.j, r.j) AS j, t, v, u, w")
    return f"SELECT {columns} FROM left_rows l {DUCK[how]} JOIN right_rows r ON {keys} AND {condition}"


def in_order(table: pa.Table, how: str) -> pa.Table:
    return table if how in ("semi", "anti") else table.select(["k", "j", "t", "v", "u", "w"])


BOUNDS = [(500, 200), (0, 700), (-100, 400), (600, -200), (0, 0), (3000, 3000)]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("before", "after"), BOUNDS)
def test_an_interval_join_equals_one_query_over_all_rows(how: str, before: int, after: int) -> None:
    tables = sides(abs(before) + after)
    found = run(
        tables,
        lambda s: s["left"].interval_join(s["right"], ["k", "j"], how, before=before, after=after),
    )
    near = f"t BETWEEN u - INTERVAL ({before}) MILLISECOND AND u + INTERVAL ({after}) MILLISECOND"
    expected = query(tables, interval_sql(how, near))
    assert expected.num_rows
    same(in_order(found, how), expected)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("seed", range(4))
def test_a_join_that_dies_again_and_again_publishes_the_same_rows(how: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    before, after = rng.choice(BOUNDS)
    tables = sides(seed * 10)
    inputs = {
        name: [b.rename_columns(["t" if c in "tu" else c for c in b.schema.names]) for b in found]
        for name, found in batches(tables, seed).items()
    }

    def build(s: Mapping[str, DataStream]) -> dict[str, DataStream]:
        right = s["right"].with_column_renamed("t", "u")
        joined = s["left"].interval_join(
            right, ["k", "j"], how, before=before, after=after, filter=(col("v") + col("w")) % lit(3) != lit(0)
        )
        return {"rows": joined}

    directory = tmp_path if seed % 2 else None
    found = survive(build, inputs, seed=seed, max_disorder=300, directory=directory)["rows"]
    near = f"t BETWEEN u - INTERVAL ({before}) MILLISECOND AND u + INTERVAL ({after}) MILLISECOND AND (v + w) % 3 <> 0"
    same(in_order(found, how), query(tables, interval_sql(how, near)))


# -- windows

SHAPES = [(1000, 1000), (1500, 400), (700, 1000)]


def copies(table: pa.Table, time: str, length: int, slide: int) -> pa.Table:
    """Each row once per window that holds it, with the window's start in milliseconds."""
    values = table[time].combine_chunks().cast(pa.timestamp("ms", "UTC")).view(pa.int64()).to_pylist()
    places, starts = [], []
    for row, value in enumerate(values):
        start = value // slide * slide
        while start + length > value:
            places.append(row)
            starts.append(start)
            start -= slide
    return table.take(pa.array(places, pa.int64())).append_column("start", pa.array(starts, pa.int64()))


def window_sql(how: str, condition: str = "true") -> str:
    columns = {"semi": "l.*", "anti": "l.*"}.get(how, "coalesce(l.k, r.k) AS k, coalesce(l.j, r.j) AS j, t, v, u, w")
    columns = columns.replace("l.*", "l.t, l.k, l.j, l.v")
    start = "l.start" if how in ("semi", "anti") else "coalesce(l.start, r.start)"
    on = f"l.k = r.k AND l.j = r.j AND l.start = r.start AND {condition}"
    return f"SELECT {start} AS start, {columns} FROM left_rows l {DUCK[how]} JOIN right_rows r ON {on}"


def started(table: pa.Table, length: int) -> pa.Table:
    """With the start in milliseconds in place of the bounds of the window."""
    start, end = (table[name].cast(pa.int64()) for name in ("window_start_time", "window_end_time"))
    assert end.to_pylist() == [s + length for s in start.to_pylist()]
    rest = table.drop_columns(["window_start_time", "window_end_time"])
    names = ["t", "k", "j", "v"] if "u" not in rest.column_names else ["k", "j", "t", "v", "u", "w"]
    return rest.select(names).add_column(0, "start", start)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("length", "slide"), SHAPES)
def test_a_window_join_equals_one_query_over_all_rows(how: str, length: int, slide: int) -> None:
    tables = sides(length)
    found = run(tables, lambda s: s["left"].window_join(s["right"], length, slide, on=["k", "j"], how=how))
    of_windows = {name: copies(t, t.schema.names[0], length, slide) for name, t in tables.items()}
    same(started(found, length), query(of_windows, window_sql(how)))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("seed", range(4))
def test_a_window_join_that_dies_again_and_again_publishes_the_same_rows(how: str, seed: int, tmp_path: Path) -> None:
    length, slide = random.Random(seed).choice(SHAPES)
    tables = sides(seed * 10)
    inputs = {
        name: [b.rename_columns(["t" if c in "tu" else c for c in b.schema.names]) for b in found]
        for name, found in batches(tables, seed).items()
    }

    def build(s: Mapping[str, DataStream]) -> dict[str, DataStream]:
        right = s["right"].with_column_renamed("t", "u")
        odd = (col("v") + col("w")) % lit(3) != lit(0)
        return {"rows": s["left"].window_join(right, length, slide, on=["k", "j"], how=how, filter=odd)}

    directory = tmp_path if seed % 2 else None
    found = survive(build, inputs, seed=seed, max_disorder=300, directory=directory)["rows"]
    of_windows = {name: copies(t, t.schema.names[0], length, slide) for name, t in tables.items()}
    same(started(found, length), query(of_windows, window_sql(how, "(v + w) % 3 <> 0")))


# -- event time


def at(times: Sequence[int], **columns: Any) -> pa.Table:
    return pa.table({"t": pa.array(times, pa.int64()).cast(pa.timestamp("ms")), **columns})


def one_by_one(
    left: pa.Table, right: pa.Table, build: Callable[[DataStream, DataStream], DataStream]
) -> list[tuple[str, Any]]:
    """What happens in order: ("left", v) and ("right", w) as rows come, ("out", row) as rows come out."""
    seen: list[tuple[str, Any]] = []

    class Recorder(MemorySink):
        def write(self, batch: pa.RecordBatch) -> None:
            seen.extend(("out", tuple(row.values())) for row in batch.to_pylist())

    def reader(name: str, table: pa.Table) -> Callable[[], Any]:
        def batches() -> Any:
            for batch in table.to_batches(max_chunksize=1):
                seen.append((name, batch.column(table.num_columns - 1)[0].as_py()))
                yield batch

        return batches

    context = StreamContext(checkpoint_interval=None)
    streams = [
        context.from_batches(reader(name, table), table.schema, event_time=table.schema.names[0], name=name)
        for name, table in (("left", left), ("right", right))
    ]
    build(*streams).sink(Recorder())
    context.run()
    return seen


def test_pairs_come_out_at_once_and_a_row_without_partner_when_none_can_come_any_more() -> None:
    left = at([0, 1000, 2000, 9000], k=[1, 2, 3, 4], v=["a", "b", "c", "d"])
    right = at([500, 1200, 8000, 9900], k=[1, 7, 9, 9], w=["p", "q", "r", "s"]).rename_columns(["u", "k", "w"])
    seen = one_by_one(left, right, lambda a, b: a.interval_join(b, "k", "left", before=1000, after=0).select("v", "w"))
    outs = [row for kind, row in seen if kind == "out"]
    assert outs == [("a", "p"), ("b", None), ("c", None), ("d", None)]
    assert seen.index(("out", ("a", "p"))) == seen.index(("right", "p")) + 1
    # b (at 1000) waits for partners up to 2000, and the right is at 1200 when the left is at 2000 already.
    assert seen.index(("out", ("b", None))) > seen.index(("right", "r"))


def test_a_left_row_of_a_semi_join_comes_out_once_at_its_first_partner() -> None:
    left = at([0, 100], k=[1, 2], v=["a", "b"])
    right = at([10, 20, 30], k=[1, 1, 2], w=["p", "q", "r"]).rename_columns(["u", "k", "w"])
    seen = one_by_one(left, right, lambda a, b: a.interval_join(b, "k", "semi", before=500, after=500).select("v"))
    assert [row for kind, row in seen if kind == "out"] == [("a",), ("b",)]


def test_rows_behind_the_watermark_join_nothing_and_go_to_the_side_output() -> None:
    left = at([0, 5000, 4000, 6000], k=[1, 1, 1, 1], v=[1, 2, 3, 4])
    right = at([0, 4500, 5500], k=[1, 1, 1], w=[1, 2, 3]).rename_columns(["u", "k", "w"])
    context = StreamContext(checkpoint_interval=None)
    streams = [
        context.from_batches(table.to_batches(max_chunksize=1), table.schema, event_time=time, name=name)
        for name, table, time in (("left", left, "t"), ("right", right, "u"))
    ]
    joined = streams[0].interval_join(streams[1], "k", before=1000, after=1000)
    sinks = [MemorySink() for _ in range(3)]
    for stream, sink in zip([joined, joined.late_rows_of("left"), joined.late_rows_of("right")], sinks, strict=True):
        stream.sink(sink)
    context.run()
    assert sinks[1].table()["v"].to_pylist() == [3]
    assert sinks[1].table().schema == left.schema
    assert not sinks[2].batches
    assert 3 not in sinks[0].table()["v"].to_pylist()


@pytest.mark.parametrize("how", ["inner", "left", "right", "semi", "anti"])
@pytest.mark.parametrize(("before", "after"), BOUNDS)
def test_no_row_of_a_join_is_late_for_a_window_after_it(how: str, before: int, after: int) -> None:
    tables = sides(7)
    context = StreamContext(checkpoint_interval=None)
    streams = read(context, tables)
    joined = streams["left"].interval_join(streams["right"], ["k", "j"], how, before=before, after=after)
    windows = joined.window([], [functions.count(lit(1)).alias("n")], 1)
    sinks = [MemorySink() for _ in range(3)]
    for stream, sink in zip([joined, windows, windows.late_rows()], sinks, strict=True):
        stream.sink(sink)
    context.run()
    assert joined.event_time == ("u" if how == "right" else "t")
    assert not sinks[2].batches
    assert sum(sinks[1].table()["n"].to_pylist()) == sinks[0].table().num_rows > 0


def test_no_row_of_a_window_join_is_late_for_a_window_after_it() -> None:
    context = StreamContext(checkpoint_interval=None)
    streams = read(context, sides(7))
    joined = streams["left"].window_join(streams["right"], 900, 300, on=["k", "j"], how="full")
    joined = joined.with_column_renamed("window_start_time", "start").drop("window_end_time")
    windows = joined.window([], [functions.count(lit(1)).alias("n")], 1)
    sinks = [MemorySink(), MemorySink()]
    for stream, sink in zip([windows, windows.late_rows()], sinks, strict=True):
        stream.sink(sink)
    context.run()
    assert sinks[0].batches
    assert not sinks[1].batches


KINDS = [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("ns")]


@pytest.mark.parametrize("how", ["inner", "full"])
@pytest.mark.parametrize("one", KINDS, ids=str)
@pytest.mark.parametrize("other", KINDS, ids=str)
def test_event_times_of_different_units_are_compared_exactly(how: str, one: pa.DataType, other: pa.DataType) -> None:
    tables = {
        "left": rows(1, 80, "v", kind=one),
        "right": rows(2, 80, "w", kind=other).rename_columns({"t": "u"}),
    }
    found = run(
        tables,
        lambda s: s["left"].interval_join(s["right"], ["k", "j"], how, before=300, after=700),
        max_disorder=1300,
    )
    assert (found.schema.field("t").type, found.schema.field("u").type) == (one, other)
    near = "t BETWEEN u - INTERVAL 300 MILLISECOND AND u + INTERVAL 700 MILLISECOND"
    same(in_order(found, how), query(tables, interval_sql(how, near)))


@pytest.mark.parametrize("how", ["inner", "full"])
def test_a_time_beyond_what_the_finer_unit_can_say_is_near_nothing_there(how: str) -> None:
    far = 32_503_680_000_000  # the year 3000, which nanoseconds do not reach
    left = at([0, far], k=[1, 1], v=[1, 2])
    right = at([5, 100], k=[1, 1], w=[1, 2])
    right = pa.table({"u": right["t"].cast(pa.timestamp("ns")), "k": right["k"], "w": right["w"]})
    joined = run(
        {"left": left, "right": right},
        lambda s: s["left"].interval_join(s["right"], "k", how, before=10, after=timedelta(days=10_000)),
        future_limit=None,
    )
    found = list(zip(joined["v"].to_pylist(), joined["w"].to_pylist(), strict=True))
    assert sorted(found, key=str) == sorted([(1, 1), *([(2, None), (None, 2)] if how == "full" else [])], key=str)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("seed", range(2))
def test_rows_that_come_too_late_are_the_same_ones_after_crashes(how: str, seed: int) -> None:
    tables = {"left": rows(seed, 150, "v", disorder_ms=2000), "right": rows(seed + 1, 150, "w", disorder_ms=2000)}

    def build(s: Mapping[str, DataStream]) -> dict[str, DataStream]:
        right = s["right"].with_column_renamed("t", "u")
        near = s["left"].interval_join(right, ["k", "j"], how, before=600, after=200, name="near")
        same_window = s["left"].window_join(right, 900, 400, on=["k", "j"], how=how, name="window")
        latest = s["left"].asof_join(right, ["k", "j"], name="latest")
        late = {
            f"{n}-{side}": joined.late_rows_of(side)
            for n, joined in (("near", near), ("window", same_window))
            for side in ("left", "right")
        }
        return {"near": near, "window": same_window, "latest": latest, "too-late": latest.late_rows_of("left"), **late}

    found, expected = (
        survive(build, batches(tables, seed), seed=seed, crashes=crashes, max_disorder=100) for crashes in (4, 0)
    )
    for name, table in expected.items():
        assert as_multiset(found[name]) == as_multiset(table), name
        assert table.num_rows or name == "latest", name


def test_dates_join_within_days() -> None:
    days = pa.array([0, 1, 5], pa.int32()).view(pa.date32())
    tables = {"left": pa.table({"t": days, "v": [1, 2, 3]}), "right": pa.table({"u": days, "w": [1, 2, 3]})}
    found = run(tables, lambda s: s["left"].interval_join(s["right"], how="full", before=timedelta(days=1), after=0))
    expected = {(1, 1), (1, 2), (2, 2), (3, 3)}
    assert set(zip(found["v"].to_pylist(), found["w"].to_pylist(), strict=True)) == expected
    assert found.schema.field("t").type == pa.date32()


# -- regular joins, and keys


@pytest.mark.parametrize("how", ["inner", "semi"])
@pytest.mark.parametrize("seed", range(3))
def test_a_join_without_event_time_keeps_both_sides_and_survives_crashes(how: str, seed: int) -> None:
    tables = sides(seed * 10)

    def build(s: Mapping[str, DataStream]) -> dict[str, DataStream]:
        return {"rows": s["left"].join(s["right"], ["k", "j"], how)}

    found = survive(build, batches(tables, seed), seed=seed, event_time=None)["rows"]
    same(in_order(found, how), query(tables, interval_sql(how, "true")))


@pytest.mark.parametrize("how", HOWS)
def test_with_ttl_rows_join_that_are_at_most_so_far_apart(how: str) -> None:
    tables = sides(3)
    found = run(tables, lambda s: s["left"].join(s["right"], ["k", "j"], how, ttl=400))
    near = "t BETWEEN u - INTERVAL 400 MILLISECOND AND u + INTERVAL 400 MILLISECOND"
    same(in_order(found, how), query(tables, interval_sql(how, near)))


@pytest.mark.parametrize("how", HOWS)
def test_equal_event_times_are_a_key_that_bounds_the_state(how: str) -> None:
    tables = {"left": rows(1, 150, "v"), "right": rows(2, 150, "w")}
    found = run(
        tables,
        lambda s: s["left"].drop("j").join(s["right"].drop("j"), ["t", "k"], how),
    )
    expected = query(
        tables,
        f"SELECT * FROM (SELECT t, k, v FROM left_rows) l {DUCK[how]} JOIN "
        "(SELECT t, k, w FROM right_rows) r USING (t, k)",
    )
    same(found, expected)


def test_half_a_bound_drops_the_rows_of_one_side_only() -> None:
    tables = sides(5)
    context = StreamContext(checkpoint_interval=None)
    streams = read(context, tables)
    joined = streams["left"].interval_join(streams["right"], ["k", "j"], before=0, after=None)
    text = joined.explain()
    assert "left: the rows of the last 0 ms of event time\n" in text
    assert "right: every row; GROWS FOR EVER" in text
    found = run(tables, lambda s: s["left"].interval_join(s["right"], ["k", "j"], before=0, after=None))
    same(in_order(found, "inner"), query(tables, interval_sql("inner", "t >= u")))


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), pa.string()),
        pa.large_string(),
        pa.string_view(),
        pa.float64(),
        pa.decimal128(22, 3),
        pa.bool_(),
        pa.date32(),
        pa.binary(),
    ],
    ids=str,
)
def test_keys_of_every_plain_type_match_by_value(kind: pa.DataType) -> None:
    values = {
        "double": [1.5, float("nan"), 0.0, -0.0, None],
        "bool": [True, False, None, True, True],
        "date32[day]": [1, 2, 3, 3, None],
        "binary": [b"a", b"", None, b"a", b"b"],
        "decimal128(22, 3)": [1, 2, None, 2, 5],
    }.get(str(kind), ["a", "b", None, "a", ""])
    keys = pa.array(values, pa.int32()).view(kind) if kind == pa.date32() else None
    if keys is None:
        plain = pa.array(values)
        keys = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    expected = sorted(
        (i, j)
        for i, a in enumerate(values)
        for j, b in enumerate(values)
        if a is not None and b is not None and (a == b or (a != a and b != b))
    )
    tables = {"left": at(range(5), k=keys, v=list(range(5))), "right": at(range(5), k=keys, w=list(range(5)))}
    tables["right"] = tables["right"].rename_columns(["u", "k", "w"])
    for how in ("interval", "window"):
        found = run(
            tables,
            lambda s, how=how: (
                s["left"].interval_join(s["right"], "k", before=10, after=10)
                if how == "interval"
                else s["left"].window_join(s["right"], 1000, on="k")
            ),
        )
        assert sorted(zip(found["v"].to_pylist(), found["w"].to_pylist(), strict=True)) == expected


def test_a_stream_joins_itself() -> None:
    table = at([0, 1, 2, 3], k=[1, 1, 2, 2], v=[1, 2, 3, 4])
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(table.to_batches(max_chunksize=2), table.schema, event_time="t")
    sink = MemorySink()
    other = stream.select(col("t").alias("u"), "k", col("v").alias("w"))
    stream.interval_join(other, "k", before=5, after=5, filter="v < w").sink(sink)
    context.run()
    assert sorted(zip(sink.table()["v"].to_pylist(), sink.table()["w"].to_pylist(), strict=True)) == [(1, 2), (3, 4)]


def test_many_pairs_come_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interval_join, "_PAIRS_AT_ONCE", 7)
    tables = sides(2)
    found = run(tables, lambda s: s["left"].interval_join(s["right"], ["k", "j"], "full", before=900, after=900))
    near = "t BETWEEN u - INTERVAL 900 MILLISECOND AND u + INTERVAL 900 MILLISECOND"
    same(in_order(found, "full"), query(tables, interval_sql("full", near)))


@pytest.mark.parametrize("how", HOWS)
def test_a_finished_join_that_is_run_again_emits_nothing(how: str) -> None:
    tables = sides(4)
    space = MemoryStateSpace()
    out = []
    for _ in range(2):
        backend = MemoryStateBackend(space)
        context = StreamContext(state=backend, checkpoint_interval=None)
        streams = read(context, tables)
        streams["left"].interval_join(streams["right"], ["k", "j"], how, before=100, after=100, name="j").sink(
            MemorySink(), name="out"
        )
        streams["left"].window_join(streams["right"], 100, on=["k", "j"], how=how, name="w").sink(
            MemorySink(), name="windows"
        )
        result = context.run()
        out.append([result.operators[name].rows_out for name in ("j", "w")])
        backend.close()
    assert min(out[0]) > 0
    assert out[1] == [0, 0]


def test_a_failing_function_in_a_filter_names_the_join_and_the_batch() -> None:
    def explode(values: pa.Array) -> pa.Array:
        raise ValueError("forty-two")

    odd = udf(explode, [pa.int64()], pa.bool_(), "immutable", "explode")(col("w"))
    for build in (
        lambda s: s["left"].interval_join(s["right"], "k", "semi", before=9, after=9, filter=odd, name="x"),
        lambda s: s["left"].drop("j").window_join(s["right"].drop("j"), 900, on="k", filter=odd, name="x"),
    ):
        with pytest.raises(UserFunctionError, match="forty-two") as caught:
            run(sides(1), build)
        assert caught.value.operator_id == "x"


def test_what_cannot_be_joined_is_refused_when_the_stream_is_built() -> None:
    tables = sides(1)
    context = StreamContext()
    s = read(context, tables)
    left, right = s["left"], s["right"].drop("j")
    with pytest.raises(SchemaError, match=r"no column 'nope'; available columns: t, k, j, v"):
        left.join(right, "nope")
    with pytest.raises(SchemaError, match=r"both sides have columns \['j'\].*with_column_renamed"):
        left.join(s["right"], "k")
    with pytest.raises(SchemaError, match=r"'v' of the left is int64, 'k' of the right is string.*cast"):
        left.join(right, left_on="v", right_on="k")
    with pytest.raises(ValueError, match="not both"):
        left.join(right, "k", left_on="k", right_on="k")
    with pytest.raises(ValueError, match="left_on has 2 columns, right_on has 1"):
        left.join(right, left_on=["k", "j"], right_on="k")
    with pytest.raises(ValueError, match="how='outer'; there are inner, left"):
        left.join(right, "k", "outer")
    for how in ("left", "right", "full", "anti"):
        with pytest.raises(SchemaError, match=r"never certain that it has none.*ttl="):
            left.join(right, "k", how)
    with pytest.raises(SchemaError, match="never certain"):
        left.interval_join(right, "k", "left", before=None, after=0)
    with pytest.raises(SchemaError, match="needs a key"):
        left.join(right.drop("k"))
    with pytest.raises(ValueError, match="no two event times are at least 5 and at most 4"):
        left.interval_join(right, "k", before=-5, after=4)
    with pytest.raises(ValueError, match="must not be negative"):
        left.join(right, "k", ttl=-1)
    with pytest.raises(SchemaError, match=r"drop\(t\) dropped or replaced the event time"):
        left.drop("t").interval_join(right, "k", before=1, after=1)
    with pytest.raises(SchemaError, match=r"(?s)filter\(nope.*available columns: t, k, j, v, u, w"):
        left.join(right, "k", filter=col("nope") > lit(1))
    with pytest.raises(SchemaError, match=r"condition names \['j'\], which both sides have"):
        left.join(s["right"], "k", "semi", filter=col("j") == lit(1))
    with pytest.raises(SchemaError, match="can only equal the event time"):
        left.with_column("t2", col("t")).interval_join(right, left_on="t2", right_on="u", before=1, after=1)
    micros = read(context, {"micros": rows(1, 9, "w", kind=pa.timestamp("us", "UTC")).drop("j")})["micros"]
    with pytest.raises(SchemaError, match=r"'t' of the left is timestamp\[ms.*cast"):
        left.join(micros, ["t", "k"])
    with pytest.raises(ValueError, match="different contexts"):
        left.join(read(StreamContext(), tables)["right"], "k")
    updating = right.window(["k"], [functions.count(lit(1)).alias("n")], 10, allowed_lateness=1)
    with pytest.raises(SchemaError, match="counted twice"):
        left.join(updating, "k")
    with pytest.raises(SchemaError, match="a row of a join without a bound"):
        left.join(right, "k", name="j").window(["k"], [functions.count(lit(1)).alias("n")], 10)
    with pytest.raises(SchemaError, match="rename it first"):
        left.with_column("window_start_time", col("v")).window_join(right, 10, on="k")
    with pytest.raises(SchemaError, match="reserved"):
        left.with_column_renamed("v", "__hash").join(right, "k")
    with pytest.raises(ValueError, match="call it right on the result of a join"):
        left.late_rows_of("left")


def stored_rows(build: Callable[[DataStream, DataStream], DataStream]) -> dict[str, int]:
    """How many rows every table holds while a long stream goes by, at most; looked at before each checkpoint."""
    table = at(range(0, 20_000, 2), k=[i % 7 for i in range(10_000)], v=list(range(10_000)))
    backend = MemoryStateBackend()
    context = StreamContext(state=backend, checkpoint_interval=None, hook=lambda name: look(name))
    most: dict[str, int] = {}

    def look(step: str) -> None:
        if step == "prepared":
            for name, stored in backend._tables.items():
                most[name] = max(most.get(name, 0), stored.memtable.rows)

    def reader(start: int) -> Any:
        for batch in table.to_batches(max_chunksize=100)[start:]:
            job.checkpoint()
            yield batch

    left = context.from_batches(reader, table.schema, event_time="t", name="left")
    right = left.select(col("t").alias("u"), "k", col("v").alias("w"))
    build(left, right).sink(MemorySink())
    job = context.job()
    job.run()
    backend.close()
    return most


@pytest.mark.parametrize("how", HOWS)
def test_what_a_join_stores_is_bounded_by_event_time(how: str) -> None:
    near = stored_rows(lambda a, b: a.interval_join(b, "k", how, before=200, after=200, name="x"))
    assert near
    assert max(near.values()) < 1000
    same = stored_rows(lambda a, b: a.window_join(b, 400, 100, on="k", how=how, name="x"))
    assert max(same.values()) < 1000


def test_the_numbers_of_rows_that_met_a_partner_are_forgotten_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MatchFlags] = []
    number = MatchFlags.number
    monkeypatch.setattr(MatchFlags, "number", lambda self, times: seen.append(self) or number(self, times))
    stored_rows(lambda a, b: a.interval_join(b, "k", "left", before=200, after=200, name="x"))
    assert seen[0]._next == 10_000
    assert len(seen[0]._met) < 4096


@pytest.mark.parametrize("how", ["inner", "full"])
def test_a_row_at_the_watermark_meets_the_oldest_row_that_can_be_its_partner(how: str) -> None:
    left = at([0, 1000, 5000], k=[1, 8, 8], v=[1, 2, 3])
    right = at([1000, 1000, 1001], k=[9, 1, 1], w=[1, 2, 3]).rename_columns(["u", "k", "w"])
    context = StreamContext(checkpoint_interval=None)
    streams = [
        context.from_batches(table.to_batches(max_chunksize=1), table.schema, event_time=time, name=name)
        for name, table, time in (("left", left, "t"), ("right", right, "u"))
    ]
    sink = MemorySink()
    streams[0].interval_join(streams[1], "k", how, before=1000, after=0).sink(sink)
    context.run()
    found = list(zip(sink.table()["v"].to_pylist(), sink.table()["w"].to_pylist(), strict=True))
    alone = [(2, None), (3, None), (None, 1), (None, 3)]
    assert sorted(found, key=str) == sorted([(1, 2), *(alone if how == "full" else [])], key=str)
