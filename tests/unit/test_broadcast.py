"""Rows joined with the configuration that holds when they come."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import SchemaError, StreamContext
from operators.testing import StreamHarness
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut, events

ROWS = pa.schema([("t", pa.timestamp("ms")), ("k", pa.string()), ("v", pa.int64())])
RULES = pa.schema([("t", pa.timestamp("ms")), ("k", pa.string()), ("limit", pa.int64())])


def harness(how: str = "left", **options: Any) -> StreamHarness:
    def build(rows: Any, rules: Any) -> Any:
        return rows.join_broadcast(rules.drop("t"), "k", how, name="b")

    return StreamHarness(build, {"rows": ROWS, "rules": RULES}, event_time="t", **options)


def row(time: int, k: Any, v: int = 0) -> list[dict[str, Any]]:
    return [{"t": time, "k": k, "v": v}]


def rule(k: Any, limit: int) -> list[dict[str, Any]]:
    return [{"t": 0, "k": k, "limit": limit}]


def test_a_row_gets_the_configuration_that_holds_when_it_comes() -> None:
    with harness() as h:
        h.push(row(0, "a"), "rows")
        h.push(rule("a", 1), "rules")
        h.push(row(1, "a"), "rows")
        h.checkpoint()
        h.push(rule("a", 2), "rules")
        h.push(row(2, "a"), "rows")
        h.push(row(3, "b"), "rows")
        h.kill()
        assert [r["limit"] for r in h.output()] == [None, 1, 2, None]
        assert h.state("b").to_pylist() == [{"k": "a", "limit": 2}]


def test_rows_without_configuration_can_be_left_out_and_null_matches_nothing() -> None:
    with harness("inner") as h:
        h.push([*rule("a", 1), *rule(None, 9)], "rules")
        h.push([*row(0, "a"), *row(0, "b"), *row(0, None)], "rows")
        assert [(r["k"], r["limit"]) for r in h.output()] == [("a", 1)]


def test_the_configuration_never_holds_event_time_back() -> None:
    def build(rows: Any, rules: Any) -> Any:
        return rows.join_broadcast(rules.drop("t"), "k").window([], f.count(lit(1)).alias("n"), 10)

    with StreamHarness(build, {"rows": ROWS, "rules": RULES}, event_time="t") as h:
        h.push([*row(0, "a"), *row(11, "a")], "rows")
        assert [r["n"] for r in h.output()] == [1]


def test_a_changelog_is_a_configuration_too_and_deletions_count() -> None:
    def build(rows: Any, rules: Any) -> Any:
        newest = rules.deduplicate("k", keep="last", emit="changelog", name="newest").drop("t")
        return rows.join_broadcast(newest.filter(col("limit") > lit(0)), "k", name="b")

    with StreamHarness(build, {"rows": ROWS, "rules": RULES}, event_time="t") as h:
        for limit in (5, 7, -1):
            h.push(rule("a", limit), "rules")
            h.push(row(0, "a"), "rows")
        assert [r["limit"] for r in h.output()] == [5, 7, None]


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_changes_nothing(seed: int) -> None:
    rules = pa.table({"k": ["a", "b", None, "a", "b", "a"] * 5, "limit": list(range(30))})
    inputs = {"rows": cut(events(seed, 600), seed), "rules": rules.to_batches(max_chunksize=1)}

    def pipeline(streams: Any) -> Any:
        return {"out": streams["rows"].join_broadcast(streams["rules"], "k", name="b")}

    undisturbed = survive(pipeline, inputs, crashes=0, event_time=None)["out"]
    assert len(set(undisturbed["limit"].to_pylist())) > 5
    found = survive(pipeline, inputs, seed=seed, crashes=4, event_time=None)["out"]
    assert as_multiset(found) == as_multiset(undisturbed)


def test_wrong_configurations_are_refused() -> None:
    context = StreamContext()
    rows = context.from_batches(ROWS.empty_table(), name="rows")
    rules = context.from_batches(RULES.empty_table(), name="rules")
    with pytest.raises(SchemaError, match=r"both sides have columns \['t'\]"):
        rows.join_broadcast(rules, "k")
    with pytest.raises(SchemaError, match="no column 'nope'"):
        rows.join_broadcast(rules, "nope")
    with pytest.raises(SchemaError, match="'v' is int64 here and string"):
        rows.join_broadcast(rules.select(col("k").alias("v"), "limit"), "v")
    with pytest.raises(ValueError, match="left out"):
        rows.join_broadcast(rules.drop("t"), "k", "full")
    with pytest.raises(ValueError, match="at least one key"):
        rows.join_broadcast(rules.drop("t"), [])
