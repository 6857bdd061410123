"""Aggregation without windows equals one SQL query over all the rows, at the end and at every moment before."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import Expr, SessionContext, col, lit
from datafusion import functions as f

from operators import DataStream, SchemaError, StreamContext
from statebackend import UnsupportedAggregateError, open_backend
from tests.support.changelogs import replayed, rows_of
from tests.support.restarts import random_fate, run_through
from tests.support.streams import as_multiset, cut, events

SELECT = "count(1) AS n, sum(v) AS total, max(v) AS high, avg(x) AS mean"
RICH = "count(DISTINCT s) AS kinds, median(v) AS middle, count(1) FILTER (WHERE v > 0) AS up, stddev(x) AS spread"


def four() -> list[Expr]:
    return [
        f.count(lit(1)).alias("n"),
        f.sum(col("v")).alias("total"),
        f.max(col("v")).alias("high"),
        f.avg(col("x")).alias("mean"),
    ]


def rich() -> list[Expr]:
    return [
        f.count(col("s"), distinct=True).alias("kinds"),
        f.median(col("v")).alias("middle"),
        f.count(lit(1), filter=col("v") > lit(0)).alias("up"),
        f.stddev(col("x")).alias("spread"),
    ]


def sql(query: str, table: pa.Table) -> pa.Table:
    session = SessionContext()
    session.register_record_batches("rows", [table.to_batches()])
    return session.sql(query).to_arrow_table()


def verb(aggregates: Callable[[], list[Expr]], emit: str, **options: Any) -> Callable[[DataStream], DataStream]:
    return lambda s: s.aggregate(["k", "j"], aggregates(), emit=emit, name="g", **options)


def as_table(found: pa.Table, emit: str, key: Sequence[str] = ("k", "j")) -> pa.Table:
    """What is valid in the end."""
    if emit == "changelog":
        rows = list(replayed(found, key).values())
        schema = pa.schema(list(found.schema)[1:])
    elif emit == "final":
        return found
    else:
        rows = list({tuple(row[k] for k in key): row for row in found.to_pylist()}.values())
        schema = found.schema
    return pa.Table.from_pylist(rows, schema=schema)


@pytest.mark.parametrize("emit", ["changelog", "upserts", "final"])
@pytest.mark.parametrize(("aggregates", "select"), [(four, SELECT), (rich, RICH)])
def test_groups_equal_one_query_over_all_rows(emit: str, aggregates: Any, select: str) -> None:
    table = events(4, 900)
    found = run_through(verb(aggregates, emit), cut(table, 4))
    expected = sql(f"SELECT k, j, {select} FROM rows GROUP BY k, j", table)
    assert as_multiset(as_table(found, emit)) == as_multiset(expected)


def test_after_every_batch_the_changelog_tells_what_the_query_over_the_rows_so_far_does() -> None:
    table = events(5, 200)
    batches = table.to_batches(max_chunksize=25)
    for count in range(1, len(batches) + 1):
        rows = run_through(verb(four, "changelog"), batches[:count])
        expected = sql(f"SELECT k, j, {SELECT} FROM rows GROUP BY k, j", pa.Table.from_batches(batches[:count]))
        assert as_multiset(as_table(rows, "changelog")) == as_multiset(expected)


def test_a_group_whose_result_stays_the_same_is_not_emitted() -> None:
    table = pa.table({"t": pa.array([0, 1, 2]).cast(pa.timestamp("ms")), "k": ["a", "a", "b"], "v": [3, 2, 1]})
    found = run_through(lambda s: s.aggregate("k", f.max(col("v")).alias("m")), table.to_batches(max_chunksize=1))
    assert found.to_pylist() == [{"op": "insert", "k": "a", "m": 3}, {"op": "insert", "k": "b", "m": 1}]


def test_without_group_columns_there_is_one_row() -> None:
    table = events(6, 300)
    for emit in ("changelog", "final"):
        found = run_through(lambda s, emit=emit: s.aggregate([], four(), emit=emit), cut(table, 6))  # type: ignore[misc]
        assert as_multiset(as_table(found, emit, [])) == as_multiset(sql(f"SELECT {SELECT} FROM rows", table))


OPTIONS: dict[str, dict[str, Any]] = {
    "changelog": {"emit": "changelog"},
    "upserts": {"emit": "upserts"},
    "final": {"emit": "final"},
    "every": {"emit": "changelog", "emit_every": 2000},
    "ttl": {"emit": "changelog", "ttl": 700},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("aggregates", [four, rich])
def test_a_crash_between_any_two_batches_changes_no_output(options: dict[str, Any], aggregates: Any) -> None:
    table = events(7, 240, disorder_ms=300)
    batches = cut(table, 7, 20)
    build = verb(aggregates, **options)
    whole = run_through(build, batches, disorder_ms=300)
    for crash in range(0, len(batches), 1 if aggregates is four else 4):
        found = run_through(
            build, batches, disorder_ms=300, crashes=[crash], checkpoints={crash - 1, crash - 4, crash - 5}
        )
        assert as_multiset(found) == as_multiset(whole), f"crash before batch {crash}"


@pytest.mark.parametrize("seed", range(3))
def test_crashes_at_random_places_change_no_output_over_a_store_of_files(seed: int, tmp_path: Path) -> None:
    table = events(seed, 800, disorder_ms=300)
    batches = cut(table, seed, 40)
    crashes, checkpoints = random_fate(seed, len(batches))
    options = random.Random(seed).choice(list(OPTIONS.values())[:4])
    found = run_through(
        verb(four, **options),
        batches,
        disorder_ms=300,
        crashes=crashes,
        checkpoints=checkpoints,
        open_state=lambda: open_backend(str(tmp_path / "state")),
    )
    expected = sql(f"SELECT k, j, {SELECT} FROM rows GROUP BY k, j", table)
    assert as_multiset(as_table(found, options["emit"])) == as_multiset(expected)


def test_with_emit_every_each_group_is_emitted_at_most_once_per_interval_of_event_time() -> None:
    times = [0, 400, 900, 1000, 1500, 3200, 3300]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": ["a"] * 7, "v": [1, 2, 4, 8, 16, 32, 64]})
    build = lambda s: s.aggregate("k", f.sum(col("v")).alias("s"), emit="upserts", emit_every=1000)  # noqa: E731
    found = run_through(build, table.to_batches(max_chunksize=1))
    # The watermark enters an interval with the row at 0, 1000 and 3200; the rest comes at the end.
    assert found["s"].to_pylist() == [1, 15, 63, 127]


# -- over a changelog


def counted() -> list[Expr]:
    return [
        f.count(lit(1)).alias("n"),
        f.count(col("high")).alias("some"),
        f.sum(col("high")).alias("total"),
        f.avg(col("high")).alias("mean"),
        f.sum(col("high"), filter=col("n") > lit(3)).alias("large"),
    ]


NESTED = """SELECT high % 3 AS rest, count(1) AS n, count(high) AS some, sum(high) AS total, avg(high) AS mean,
  sum(high) FILTER (WHERE n > 3) AS large
  FROM (SELECT k, s, count(1) AS n, max(v) AS high FROM rows GROUP BY k, s) GROUP BY high % 3"""


def nested(emit: str, **options: Any) -> Callable[[DataStream], DataStream]:
    inner = [f.count(lit(1)).alias("n"), f.max(col("v")).alias("high")]
    return lambda s: s.aggregate(["k", "s"], inner, name="inner").aggregate(
        [(col("high") % lit(3)).alias("rest")], counted(), emit=emit, name="outer", **options
    )


@pytest.mark.parametrize("emit", ["changelog", "final"])
@pytest.mark.parametrize("seed", range(3))
def test_an_aggregation_over_a_changelog_takes_back_what_no_longer_holds(emit: str, seed: int) -> None:
    """Groups of the inner aggregation wander between those of the outer one, which become empty at times."""
    table = events(seed, 500)
    batches = cut(table, seed, 30)
    expected = as_multiset(sql(NESTED, table))
    found = run_through(nested(emit), batches)
    assert as_multiset(as_table(found, emit, ["rest"])) == expected
    crashes, checkpoints = random_fate(seed, len(batches))
    again = run_through(nested(emit), batches, crashes=crashes, checkpoints=checkpoints)
    assert as_multiset(again) == as_multiset(found)


def test_a_group_without_rows_is_deleted() -> None:
    table = pa.table({"t": pa.array([0, 1]).cast(pa.timestamp("ms")), "k": ["a", "a"], "v": [1, 2]})
    found = run_through(
        lambda s: s.aggregate("k", f.max(col("v")).alias("m"), name="inner").aggregate(
            "m", f.count(lit(1)).alias("n"), name="outer"
        ),
        table.to_batches(max_chunksize=1),
    )
    assert [(r["op"], r["m"], r["n"]) for r in found.to_pylist()] == [
        ("insert", 1, 1),
        ("delete", 1, 1),
        ("insert", 2, 1),
    ]


# -- ttl


def test_a_group_is_forgotten_when_the_watermark_has_passed_its_newest_row_by_the_ttl() -> None:
    times = [0, 900, 1800, 5000, 5100, 100]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": ["a", "a", "a", "b", "a", "a"]})
    batches = table.to_batches(max_chunksize=1)
    build = lambda s: s.aggregate("k", f.count(lit(1)).alias("n"), ttl=1000, name="g")  # noqa: E731
    found = run_through(build, batches)
    assert [(r["op"], r["k"], r["n"]) for r in found.to_pylist()] == [
        ("insert", "a", 1),
        ("update-before", "a", 1),
        ("update-after", "a", 2),
        ("update-before", "a", 2),
        ("update-after", "a", 3),
        ("insert", "b", 1),
        ("insert", "a", 1),
    ]
    late = run_through(lambda s: build(s).late_rows(), batches)
    assert rows_of(late)[0]["k"] == "a"
    assert late.num_rows == 1


# -- refusals


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda s: s.aggregate("nope", four()), SchemaError, "nope.*available columns"),
        (lambda s: s.aggregate("k", [col("v")]), (SchemaError, UnsupportedAggregateError), "aggregate"),
        (lambda s: s.aggregate("k", four(), emit="final", ttl=1), ValueError, "neither emit_every nor a ttl"),
        (lambda s: s.aggregate("k", four(), emit_every=0), ValueError, "must be positive"),
        (lambda s: s.drop("t").aggregate("k", four(), ttl=1), SchemaError, "ttl: the stream has no event time"),
        (
            lambda s: s.aggregate(["k", "j"], four(), name="a").aggregate("k", f.max(col("n")), name="b"),
            UnsupportedAggregateError,
            "rows can be taken back from avg, count, sum",
        ),
        (
            lambda s: s.aggregate("k", four(), emit="upserts", name="a").aggregate("k", f.sum(col("n")), name="b"),
            SchemaError,
            "counted twice",
        ),
        (
            lambda s: s.aggregate("k", four(), name="a").aggregate("k", f.sum(col("n")), ttl=1, name="b"),
            (SchemaError, ValueError),
            "ttl",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_the_stream_is_built(build: Any, error: Any, match: str) -> None:
    table = events(1, 10)
    stream = StreamContext().from_batches(cut(table, 1), table.schema, event_time="t")
    with pytest.raises(error, match=match):
        build(stream)
