"""Deduplication equals a sort and a dictionary over all rows, whatever the batches, the disorder and the crashes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import DataStream, SchemaError, StreamContext
from operators.sinks import MemorySink
from statebackend import open_backend
from tests.support.changelogs import Row, replayed, rows_of
from tests.support.restarts import random_fate, run_through
from tests.support.streams import cut

DISORDER_MS = 300
SCHEMA = pa.schema(
    [("t", pa.timestamp("us", "UTC")), ("k", pa.string()), ("x", pa.float64()), ("seq", pa.int64()), ("v", pa.int32())]
)


def clicks(seed: int, rows: int = 400, keys: int = 4) -> pa.Table:
    """Rows with few keys (null and NaN among them), many equal times, and ties of ``seq`` too."""
    rng = np.random.default_rng(seed)
    times = np.maximum(np.arange(rows) * 20 - rng.integers(0, DISORDER_MS + 1, rows), 0) // 50 * 50
    floats = [0.0, -0.0, math.nan, None, 2.5]
    return pa.table(
        {
            "t": pa.array(times * 1000).view(pa.timestamp("us", "UTC")),
            "k": pa.array([[None, "a", "b", "Ä"][i % 4] for i in rng.integers(0, keys, rows)]),
            "x": pa.array([floats[i] for i in rng.integers(0, len(floats), rows)], pa.float64()),
            "seq": pa.array(rng.integers(0, 3, rows), mask=rng.random(rows) < 0.2),
            "v": pa.array(np.arange(rows, dtype=np.int32)),
        },
        schema=SCHEMA,
    )


def key_of(row: Row) -> tuple[Any, Any]:
    return row["k"], row["x"]


def order_of(row: Row) -> tuple[Any, ...]:
    """Time, then ``seq`` with nulls last, then as they came (``v`` counts the rows)."""
    return row["t"], math.inf if row["seq"] is None else row["seq"], row["v"]


def reference(table: pa.Table, keep: str) -> dict[Any, Row]:
    ordered = sorted(rows_of(table), key=order_of, reverse=keep == "first")
    return {key_of(row): row for row in ordered}


def verb(keep: str, emit: str, **options: Any) -> Callable[[DataStream], DataStream]:
    return lambda s: s.deduplicate(["k", "x"], keep=keep, order_by="seq", emit=emit, name="d", **options)


def kept(table: pa.Table, emit: str) -> dict[Any, Row]:
    if emit == "changelog":
        return replayed(table, ["k", "x"])
    rows = rows_of(table)
    if emit == "final":
        assert len({key_of(row) for row in rows}) == len(rows), "a key was emitted twice"
    return {key_of(row): row for row in rows}


@pytest.mark.parametrize("emit", ["changelog", "upserts", "final"])
@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("seed", range(3))
def test_one_row_per_key_is_kept(keep: str, emit: str, seed: int) -> None:
    table = clicks(seed)
    batches = cut(table, seed, 40)
    found = run_through(verb(keep, emit), batches, disorder_ms=DISORDER_MS)
    assert kept(found, emit) == reference(table, keep)


@pytest.mark.parametrize("emit", ["changelog", "upserts", "final"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_rows_may_come_in_any_order_within_the_watermark(keep: str, emit: str) -> None:
    shuffled = clicks(5).take(pa.array(np.random.default_rng(5).permutation(400)))
    table = shuffled.set_column(4, "v", pa.array(np.arange(400, dtype=np.int32)))
    batches = cut(table, 5, 30)
    found = run_through(verb(keep, emit), batches, disorder_ms=1_000_000)
    assert kept(found, emit) == reference(table, keep)


@pytest.mark.parametrize("emit", ["changelog", "upserts", "final"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_rows_that_agree_in_the_whole_order_are_taken_as_they_came(keep: str, emit: str) -> None:
    moment = pa.array([5, 5, 5]).cast(pa.timestamp("ms"))
    table = pa.table({"t": moment, "k": ["a", "a", "a"], "v": [1, 2, 3]})
    for rows in (1, 2, 3):
        found = run_through(lambda s: s.deduplicate("k", keep=keep, emit=emit), table.to_batches(max_chunksize=rows))
        assert found["v"].to_pylist()[-1] == (1 if keep == "first" else 3)


@pytest.mark.parametrize("emit", ["changelog", "upserts", "final"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_crash_between_any_two_batches_changes_no_output(keep: str, emit: str) -> None:
    table = clicks(7, 250)
    batches = cut(table, 7, 20)
    whole = rows_of(run_through(verb(keep, emit), batches, disorder_ms=DISORDER_MS))
    for crash in range(len(batches)):
        checkpoints = {crash - 1} if crash % 2 else {crash - 3, crash - 2}
        found = run_through(
            verb(keep, emit), batches, disorder_ms=DISORDER_MS, crashes=[crash], checkpoints=checkpoints
        )
        assert rows_of(found) == whole, f"crash before batch {crash}"


@pytest.mark.parametrize("seed", range(4))
def test_crashes_at_random_places_change_no_output_over_a_store_of_files(seed: int, tmp_path: Path) -> None:
    keep, emit = random.Random(seed).choice([("first", "final"), ("last", "final"), ("last", "changelog")])
    table = clicks(seed, 600)
    batches = cut(table, seed, 30)
    crashes, checkpoints = random_fate(seed, len(batches))
    found = run_through(
        verb(keep, emit),
        batches,
        disorder_ms=DISORDER_MS,
        crashes=crashes,
        checkpoints=checkpoints,
        open_state=lambda: open_backend(str(tmp_path / "state")),
    )
    assert kept(found, emit) == reference(table, keep)


def test_of_the_first_rows_each_is_emitted_when_the_watermark_has_passed_it_in_order_of_time() -> None:
    times = [0, 300, 200, 100, 800, 650, 700, 2000]
    names = ["b", "a", "c", "a", "d", "b", "e", "f"]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": names})
    seen: list[Any] = []

    class Recorder(MemorySink):
        def write(self, batch: pa.RecordBatch) -> None:
            seen.extend(zip(batch["t"].cast(pa.int64()).to_pylist(), batch["k"].to_pylist(), strict=True))

    def read() -> Any:
        for batch in table.to_batches(max_chunksize=1):
            seen.append(batch["t"].cast(pa.int64())[0].as_py())
            yield batch

    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(read, table.schema, event_time="t", max_disorder=250)
    stream.deduplicate("k", keep="first", emit="final").sink(Recorder())
    context.run()
    # At 300 the watermark is 50, at 800 it is 550.
    head = [0, 300, (0, "b"), 200, 100, 800, (100, "a"), (200, "c"), 650, 700]
    assert seen == [*head, 2000, (700, "e"), (800, "d"), (2000, "f")]


def test_a_late_row_is_emitted_at_once_if_its_key_is_new() -> None:
    times = [0, 5000, 100, 50, 4000]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": ["a", "b", "c", "c", "a"]})
    found = run_through(lambda s: s.deduplicate("k", keep="first", emit="final"), table.to_batches(max_chunksize=1))
    assert found["k"].to_pylist() == ["a", "c", "b"]


@pytest.mark.parametrize("seed", range(3))
def test_with_a_ttl_the_first_rows_are_those_of_spans_of_event_time(seed: int) -> None:
    table = clicks(seed, 600)
    batches = cut(table, seed, 40)
    ttl = 400
    spans: dict[Any, Any] = {}
    expected = []
    for row in sorted(rows_of(table), key=order_of):
        since = spans.get(key_of(row))
        if since is None or (row["t"] - since).total_seconds() * 1000 >= ttl:
            spans[key_of(row)] = row["t"]
            expected.append(row["v"])
    build = verb("first", "final", ttl=ttl)
    found = run_through(build, batches, disorder_ms=DISORDER_MS)
    assert sorted(found["v"].to_pylist()) == sorted(expected)
    crashes, checkpoints = random_fate(seed, len(batches))
    again = run_through(build, batches, disorder_ms=DISORDER_MS, crashes=crashes, checkpoints=checkpoints)
    assert rows_of(again) == rows_of(found)


@pytest.mark.parametrize("emit", ["changelog", "upserts"])
def test_a_key_is_forgotten_when_the_watermark_has_passed_its_row_by_the_ttl(emit: str) -> None:
    times = [0, 900, 1000, 1999, 3100, 100, 2500]
    names = ["a", "a", "b", "a", "a", "c", "c"]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": names, "v": list(range(7))})
    batches = table.to_batches(max_chunksize=1)
    found = run_through(lambda s: s.deduplicate("k", keep="first", ttl=1000, emit=emit), batches)
    # 1999 comes when the watermark is 1000, so the row at 0 is not forgotten yet; 3100 comes when it is.
    assert found["v"].to_pylist() == [0, 2, 4, 6]
    if emit == "changelog":
        assert set(found["op"].to_pylist()) == {"insert"}
    late = run_through(lambda s: s.deduplicate("k", keep="first", ttl=1000, emit=emit).late_rows(), batches)
    assert late["v"].to_pylist() == [5]


def test_an_aggregation_over_the_first_rows_is_one_over_an_append_only_stream() -> None:
    table = clicks(3)
    build = verb("first", "final")
    found = run_through(
        lambda s: build(s).window([], [f.count(lit(1)).alias("n")], 1000), cut(table, 3), disorder_ms=DISORDER_MS
    )
    assert sum(found["n"].to_pylist()) == len(reference(table, "first"))


def refused(build: Callable[[DataStream], Any], error: type[Exception], match: str) -> None:
    context = StreamContext()
    stream = context.from_batches(cut(clicks(0, 10), 0), SCHEMA, event_time="t")
    with pytest.raises(error, match=match):
        build(stream)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda s: s.deduplicate("nope"), SchemaError, "nope.*available columns: t, k, x, seq, v"),
        (lambda s: s.deduplicate("k", order_by="nope"), SchemaError, "nope"),
        (lambda s: s.deduplicate("k", order_by=col("v") + lit(1)), SchemaError, "with_column first"),
        (lambda s: s.deduplicate([]), ValueError, "at least one key"),
        (lambda s: s.deduplicate("k", keep="best"), ValueError, "'first', 'last', not 'best'"),
        (lambda s: s.deduplicate("k", emit="soon"), ValueError, "'changelog', 'upserts', 'final', not 'soon'"),
        (lambda s: s.deduplicate("k", keep="last", emit="final", ttl=10), ValueError, "never final"),
        (lambda s: s.deduplicate("k", ttl=0), ValueError, "must be positive"),
        (lambda s: s.drop("t").deduplicate("k"), SchemaError, "no event time"),
        (lambda s: s.with_column_renamed("v", "op").deduplicate("k"), SchemaError, "rename"),
        (lambda s: s.deduplicate("k").deduplicate("k", name="b"), SchemaError, r"final_rows\(\) first"),
        (lambda s: s.deduplicate("k").window([], [f.count(lit(1))], 10), SchemaError, "counted twice"),
        (lambda s: s.final_rows(), SchemaError, "fact of its own"),
        (lambda s: s.late_rows(), ValueError, "late_rows"),
    ],
)
def test_what_cannot_work_is_refused_when_the_stream_is_built(
    build: Callable[[DataStream], Any], error: type[Exception], match: str
) -> None:
    refused(build, error, match)


def explained(build: Callable[[DataStream], DataStream]) -> Sequence[str]:
    context = StreamContext()
    return build(context.from_batches(cut(clicks(0, 10), 0), SCHEMA, event_time="t")).explain().splitlines()


def test_explain_says_whether_state_grows_for_ever() -> None:
    lines = explained(lambda s: s.deduplicate("k", order_by="seq", name="d"))
    assert lines[0] == "deduplicate d: first of (k) by t, seq, changelog"
    assert lines[1] == "  | state d:rows: one row per key; GROWS FOR EVER"
    lines = explained(lambda s: s.deduplicate("k", ttl=50, emit="final", name="d"))
    assert lines[1] == "  | state d:seen: one key and its time per key of the last 50 ms of event time"
    assert lines[2] == "  | state d:waiting: every row that the watermark has not passed"
