"""The first n rows of every partition equal DuckDB's window functions over all rows, and every moment is right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import DataStream, SchemaError, StreamContext
from statebackend import open_backend
from tests.support.changelogs import replayed
from tests.support.restarts import random_fate, run_through
from tests.support.streams import as_multiset, cut, events

DISORDER_MS = 300
BY_VALUE = [col("v").sort(ascending=False, nulls_first=False), "x"]
BY_SHARED = [col("j").sort(ascending=False), col("k").sort(nulls_first=False)]


def sql(table: pa.Table, function: str, n: int, partition: str, order: str) -> pa.Table:
    """``function``: row_number or rank, over the rows numbered as they came."""
    table = table.append_column("came", pa.array(range(table.num_rows)))
    partition = f"PARTITION BY {partition}" if partition else ""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.register("rows", table)
    return connection.sql(
        f"SELECT * EXCLUDE came FROM (SELECT *, {function}() OVER ({partition} ORDER BY {order}) AS r FROM rows) "
        f"WHERE r <= {n}"
    ).to_arrow_table()


def verb(n: int, partition: list[str], order: Any, **options: Any) -> Callable[[DataStream], DataStream]:
    return lambda s: s.top_n(n, partition, order, with_rank="r", name="top", **options)


def valid(found: pa.Table, emit: str, partition: list[str]) -> pa.Table:
    if emit == "final":
        return found
    if emit == "changelog":
        rows = list(replayed(found, [*partition, "r"]).values())
        return pa.Table.from_pylist(rows, schema=pa.schema(list(found.schema)[1:]))
    rows = list({tuple(row[k] for k in [*partition, "r"]): row for row in found.to_pylist()}.values())
    return pa.Table.from_pylist(rows, schema=found.schema)


@pytest.mark.parametrize("emit", ["changelog", "upserts", "final"])
@pytest.mark.parametrize("partition", [["k"], ["k", "j"], []], ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_the_first_rows_are_those_of_row_number(n: int, partition: list[str], emit: str) -> None:
    table = events(n, 700)
    found = run_through(verb(n, partition, BY_VALUE, emit=emit), cut(table, n))
    expected = sql(table, "row_number", n, ", ".join(partition), "v DESC NULLS LAST, x, came")
    assert as_multiset(valid(found, emit, partition)) == as_multiset(expected)


@pytest.mark.parametrize("n", [1, 3])
def test_with_all_ties_they_are_those_of_rank(n: int) -> None:
    """Ties come and go: a row above them all puts them out."""
    table = events(n, 500)
    found = run_through(verb(n, ["s"], BY_SHARED, ties="all", emit="final"), cut(table, n, 20))
    expected = sql(table, "rank", n, "s", "j DESC NULLS LAST, k NULLS LAST")
    assert as_multiset(found) == as_multiset(expected)
    assert found.num_rows > n * len(set(found["s"].to_pylist())), "there was no tie"


def test_after_every_batch_the_changelog_tells_the_first_rows_so_far() -> None:
    table = events(5, 120)
    batches = table.to_batches(max_chunksize=15)
    for count in range(1, len(batches) + 1):
        found = run_through(verb(3, ["k"], BY_VALUE), batches[:count])
        so_far = pa.Table.from_batches(batches[:count])
        expected = sql(so_far, "row_number", 3, "k", "v DESC NULLS LAST, x, came")
        assert as_multiset(valid(found, "changelog", ["k"])) == as_multiset(expected)


def windowed(table: pa.Table, length: int) -> pa.Table:
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.register("rows", table)
    return connection.sql(
        f"SELECT *, epoch_ms(t) - ((epoch_ms(t) % {length}) + {length}) % {length} AS w FROM rows"
    ).to_arrow_table()


@pytest.mark.parametrize("ties", ["first", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_in_windows_of_event_time_the_first_rows_come_out_when_the_window_closes(ties: str, seed: int) -> None:
    table = events(seed, 800, disorder_ms=DISORDER_MS)
    batches = cut(table, seed, 30)
    order, text = (BY_SHARED, "j DESC, k NULLS LAST") if ties == "all" else (BY_VALUE, "v DESC NULLS LAST, x")
    build = verb(2, ["s"], order, ties=ties, window=3000)
    found = run_through(build, batches, disorder_ms=DISORDER_MS)
    function = "rank" if ties == "all" else "row_number"
    order_text = text if ties == "all" else f"{text}, came"
    expected = sql(windowed(table, 3000), function, 2, "w, s", order_text)
    kept = found.drop_columns(["window_start_time", "window_end_time"])
    assert as_multiset(kept) == as_multiset(expected.drop_columns(["w"]))
    starts = found["window_start_time"].cast(pa.int64()).to_pylist()
    assert starts == sorted(starts)
    assert found["window_end_time"].cast(pa.int64()).to_pylist() == [s + 3000 for s in starts]
    crashes, checkpoints = random_fate(seed, len(batches))
    again = run_through(build, batches, disorder_ms=DISORDER_MS, crashes=crashes, checkpoints=checkpoints)
    assert as_multiset(again) == as_multiset(found)


def test_over_the_result_of_a_window_it_gives_the_greatest_groups_of_each_with_all_ties() -> None:
    table = events(8, 600, disorder_ms=DISORDER_MS)
    batches = cut(table, 8)

    def build(stream: DataStream) -> DataStream:
        counts = stream.window(["s"], f.count(lit(1)).alias("n"), 4000, 1000)
        return counts.top_n(1, "window_start_time", col("n").sort(ascending=False), ties="all", name="top")

    found = run_through(build, batches, disorder_ms=DISORDER_MS)
    counts = run_through(lambda s: s.window(["s"], f.count(lit(1)).alias("n"), 4000, 1000), batches, disorder_ms=300)
    expected = sql(counts, "rank", 1, "window_start_time", "n DESC").drop_columns(["r"])
    assert as_multiset(found) == as_multiset(expected)


def test_a_window_is_emitted_once_as_soon_as_the_watermark_has_passed_it_and_later_rows_are_late() -> None:
    times = [0, 500, 999, 1000, 400, 3000]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "v": [1, 2, 3, 4, 5, 6]})
    batches = table.to_batches(max_chunksize=1)
    build = lambda s: s.top_n(1, [], "v", window=1000)  # noqa: E731
    assert run_through(build, batches)["v"].to_pylist() == [1, 4, 6]
    assert run_through(lambda s: build(s).late_rows(), batches)["v"].to_pylist() == [5]


OPTIONS: dict[str, dict[str, Any]] = {
    "changelog": {"emit": "changelog"},
    "final": {"emit": "final"},
    "ties": {"emit": "final", "ties": "all"},
    "window": {"window": 1500},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_crash_between_any_two_batches_changes_no_output(options: dict[str, Any]) -> None:
    table = events(7, 240, disorder_ms=DISORDER_MS)
    batches = cut(table, 7, 20)
    build = verb(2, ["k"], BY_VALUE, **options)
    whole = run_through(build, batches, disorder_ms=DISORDER_MS)
    for crash in range(len(batches)):
        found = run_through(
            build, batches, disorder_ms=DISORDER_MS, crashes=[crash], checkpoints={crash - 1, crash - 4, crash - 5}
        )
        assert as_multiset(found) == as_multiset(whole), f"crash before batch {crash}"


@pytest.mark.parametrize("seed", range(3))
def test_crashes_at_random_places_change_no_output_over_a_store_of_files(seed: int, tmp_path: Path) -> None:
    table = events(seed, 800, disorder_ms=DISORDER_MS)
    batches = cut(table, seed, 40)
    crashes, checkpoints = random_fate(seed, len(batches))
    emit = random.Random(seed).choice(["changelog", "final"])
    found = run_through(
        verb(3, ["k"], BY_VALUE, emit=emit),
        batches,
        disorder_ms=DISORDER_MS,
        crashes=crashes,
        checkpoints=checkpoints,
        open_state=lambda: open_backend(str(tmp_path / "state")),
    )
    expected = sql(table, "row_number", 3, "k", "v DESC NULLS LAST, x, came")
    assert as_multiset(valid(found, emit, ["k"])) == as_multiset(expected)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda s: s.top_n(0, "k", "v"), ValueError, "at least 1"),
        (lambda s: s.top_n(1, "nope", "v", with_rank="r"), SchemaError, "nope.*available columns"),
        (lambda s: s.top_n(1, "k", "nope", with_rank="r"), SchemaError, "nope"),
        (lambda s: s.top_n(1, "k", []), ValueError, "order_by needs"),
        (lambda s: s.top_n(1, "k", "v"), ValueError, "with_rank"),
        (lambda s: s.top_n(1, "k", "v", with_rank="r", ties="all"), ValueError, "ties='first'"),
        (lambda s: s.top_n(1, "k", "v", ties="some"), ValueError, "'first' or 'all'"),
        (lambda s: s.top_n(1, "k", "v", window=10, emit="changelog"), ValueError, "emitted once"),
        (lambda s: s.top_n(1, "k", "v", with_rank="v", emit="final"), SchemaError, "twice"),
        (lambda s: s.drop("t").top_n(1, "k", "v", window=10), SchemaError, "no event time"),
        (lambda s: s.deduplicate("k").top_n(1, "k", "v", emit="final"), SchemaError, "final_rows"),
    ],
)
def test_what_cannot_work_is_refused_when_the_stream_is_built(build: Any, error: Any, match: str) -> None:
    table = events(1, 10)
    stream = StreamContext().from_batches(cut(table, 1), table.schema, event_time="t")
    with pytest.raises(error, match=match):
        build(stream)
