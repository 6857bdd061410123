"""Changelogs go through stateless verbs as changelogs, reach sinks with their column ``op``, and become final rows."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from datafusion import col, lit
from datafusion import functions as f
from rich.console import Console

from operators import DataStream, SchemaError, StreamContext
from operators.changelog import Op, changes, in_pieces, settle
from statebackend import open_backend
from tests.support.changelogs import replayed, rows_of
from tests.support.restarts import random_fate, run_through
from tests.support.streams import as_multiset, cut, events

DISORDER_MS = 300


def latest(stream: DataStream) -> DataStream:
    """A changelog by (k, s) of (t, k, j, v, x, s)."""
    return stream.deduplicate(["k", "s"], keep="last", order_by=["v", "x"], name="latest")


def final_rows(table: pa.Table) -> list[dict[str, Any]]:
    return rows_of(run_through(lambda s: latest(s).final_rows(), cut(table, 1), disorder_ms=DISORDER_MS))


# -- the rules themselves


def test_a_changelog_leads_row_by_row_from_what_was_to_what_is() -> None:
    before = pa.record_batch({"k": [1, 2, 3, 4, None], "v": [1.0, float("nan"), 3.0, 4.0, None]})
    after = pa.record_batch({"k": [1, 2, 3, 4, 5], "v": [1.5, float("nan"), None, None, 5.0]})
    had, has = np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 1, 0, 1], bool)
    found = changes(before, had, after, has)
    assert list(zip(*(c.to_pylist() for c in found.columns), strict=True)) == [
        ("update-before", 1, 1.0),
        ("update-after", 1, 1.5),
        ("update-before", 3, 3.0),
        ("update-after", 3, None),
        ("delete", 4, 4.0),
        ("insert", 5, 5.0),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_rows_are_kept_what_is_left_is_a_changelog_of_the_kept_rows(seed: int) -> None:
    rng = random.Random(seed)
    valid: dict[int, int] = {}
    rows: list[tuple[str, int, int]] = []
    for _ in range(200):
        key, value = rng.randrange(6), rng.randrange(10)
        if key not in valid:
            rows.append((Op.INSERT, key, value))
            valid[key] = value
        elif rng.random() < 0.3:
            rows.append((Op.DELETE, key, valid.pop(key)))
        elif valid[key] != value:
            rows += [(Op.UPDATE_BEFORE, key, valid[key]), (Op.UPDATE_AFTER, key, value)]
            valid[key] = value
    batch = pa.record_batch([list(c) for c in zip(*rows, strict=True)], names=["op", "k", "v"])
    keep = np.asarray(batch["v"]) % 3 != seed % 3
    found = replayed(pa.Table.from_batches([settle(batch, keep)]), ["k"])
    assert found == {(k,): {"k": k, "v": v} for k, v in valid.items() if v % 3 != seed % 3}


def test_pieces_of_a_changelog_keep_both_rows_of_an_update_together() -> None:
    rows = 200_001
    ops = np.array(["insert", *["update-before", "update-after"] * (rows // 2)])
    batch = pa.record_batch({"op": pa.array(ops), "v": np.arange(rows)})
    pieces = list(in_pieces(batch))
    assert pa.Table.from_batches(pieces).equals(pa.Table.from_batches([batch]))
    assert len(pieces) == 4
    assert all(piece["op"][-1].as_py() != "update-before" for piece in pieces)


# -- through stateless verbs

VERBS: dict[str, tuple[Callable[[DataStream], DataStream], Callable[[dict[str, Any]], Any]]] = {
    "filter": (lambda s: s.filter(col("v") > lit(0)), lambda r: r if (r["v"] or 0) > 0 else None),
    "filter by text": (
        lambda s: s.filter("v > 0", "j = 1"),
        lambda r: r if (r["v"] or 0) > 0 and r["j"] == 1 else None,
    ),
    "filter by key": (lambda s: s.filter(col("s") < lit("s3")), lambda r: r if r["s"] < "s3" else None),
    "project": (
        lambda s: s.select("op", "s", "k", (col("v") + lit(1)).alias("w")).filter(col("w") > lit(9)),
        lambda r: {"s": r["s"], "k": r["k"], "w": r["v"] + 1} if (r["v"] or 0) > 8 else None,
    ),
    "chain": (
        lambda s: s.with_column("y", col("v") * lit(2)).drop("x", "t", "j").filter("y > 0").filter("y < 1000"),
        lambda r: {"k": r["k"], "v": r["v"], "s": r["s"], "y": r["v"] * 2} if 0 < (r["v"] or 0) * 2 < 1000 else None,
    ),
    "split": (
        lambda s: s.split(name="parts", high=col("v") > lit(500), low=col("v") > lit(0))["low"],
        lambda r: r if 0 < (r["v"] or 0) <= 500 else None,
    ),
    "rest": (
        lambda s: s.split(name="parts", high=col("v") > lit(500))["rest"],
        lambda r: r if r["v"] is None or r["v"] <= 500 else None,
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_over_a_changelog_gives_the_changelog_of_its_result(verb: str) -> None:
    table = events(3, 700, disorder_ms=DISORDER_MS)
    build, alone = VERBS[verb]
    found = run_through(lambda s: build(latest(s)), cut(table, 1), disorder_ms=DISORDER_MS)
    expected = [row for row in map(alone, final_rows(table)) if row is not None]
    valid = replayed(found, ["k", "s"])
    assert sorted(map(repr, valid.values())) == sorted(map(repr, expected))
    assert "delete" in found["op"].to_pylist() or verb == "filter by key"


def test_a_renamed_key_is_still_the_key() -> None:
    table = events(3, 300)
    build = lambda s: latest(s).with_column_renamed("k", "K")  # noqa: E731
    stream = build(StreamContext().from_batches(cut(table, 1), table.schema, event_time="t"))
    assert stream.updates.key == ("K", "s")
    found = run_through(lambda s: build(s).final_rows(), cut(table, 1))
    assert sorted(map(repr, found["K"].to_pylist())) == sorted(
        repr(r["k"]) for r in rows_of(run_through(lambda s: latest(s).final_rows(), cut(table, 1)))
    )


def test_a_filter_of_a_changelog_changes_no_operator_id() -> None:
    table = events(3, 20)
    stream = latest(StreamContext().from_batches(cut(table, 1), table.schema, event_time="t"))
    lines = stream.filter(col("v") > lit(0)).drop("x").filter("v > 1").final_rows().explain().splitlines()
    assert lines[0] == "final_rows latest.final_rows: by (k, s)"
    assert [line.strip() for line in lines[2:5]] == ["filter(v > 1)", "drop(x)", "filter(v > Int64(0))"]


# -- the valid rows


@pytest.mark.parametrize("kind", ["changelog", "upserts"])
def test_final_rows_are_those_that_are_valid_at_the_end(kind: str, tmp_path: Path) -> None:
    table = events(4, 500, disorder_ms=DISORDER_MS)
    batches = cut(table, 2, 30)

    def build(stream: DataStream) -> DataStream:
        kept = stream.deduplicate(["k", "s"], keep="last", order_by=["v", "x"], emit=kind, name="latest")
        return (kept.filter(col("v") > lit(0)) if kind == "changelog" else kept).final_rows(name="final")

    found = run_through(build, batches, disorder_ms=DISORDER_MS)
    wanted = [r for r in final_rows(table) if kind == "upserts" or (r["v"] or 0) > 0]
    assert sorted(map(repr, rows_of(found))) == sorted(map(repr, wanted))
    crashes, checkpoints = random_fate(5, len(batches))
    again = run_through(
        build,
        batches,
        disorder_ms=DISORDER_MS,
        crashes=crashes,
        checkpoints=checkpoints,
        open_state=lambda: open_backend(str(tmp_path / "state")),
    )
    assert as_multiset(again) == as_multiset(found)


@pytest.mark.parametrize("kind", ["changelog", "upserts"])
def test_updates_come_at_most_once_per_key_and_interval(kind: str) -> None:
    times = [0, 100, 200, 1100, 1200, 3000, 3100]
    names = ["a", "a", "b", "a", "a", "b", "a"]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": names, "v": list(range(7))})
    found = run_through(
        lambda s: s.deduplicate("k", keep="last", emit=kind).updates_every(1000),
        table.to_batches(max_chunksize=1),
    )
    if kind == "upserts":
        # A row at 1100 lets event time enter the next interval, and so is told of with the one before.
        assert sorted(found["v"].to_pylist()) == [0, 2, 3, 4, 5, 6]
    else:
        ends = [(r["k"], r["v"]) for r in found.to_pylist() if r["op"] in ("insert", "update-after")]
        assert sorted(ends) == [("a", 0), ("a", 3), ("a", 4), ("a", 6), ("b", 2), ("b", 5)]
        assert {k: r["v"] for (k,), r in replayed(found, ["k"]).items()} == {"a": 6, "b": 5}


@pytest.mark.parametrize("crash", range(0, 20, 3))
def test_a_crash_changes_no_updates_of_an_interval(crash: int) -> None:
    table = events(6, 400, disorder_ms=DISORDER_MS)
    batches = cut(table, 6, 20)
    build = lambda s: latest(s).filter(col("v") > lit(0)).updates_every(1500, name="every")  # noqa: E731
    whole = run_through(build, batches, disorder_ms=DISORDER_MS)
    found = run_through(build, batches, disorder_ms=DISORDER_MS, crashes=[crash], checkpoints={crash - 1, crash - 2})
    assert as_multiset(found) == as_multiset(whole)
    replayed(whole, ["k", "s"])


# -- sinks


def test_sinks_show_what_each_row_of_a_changelog_does(tmp_path: Path) -> None:
    table = pa.table({"t": pa.array([0, 1, 2]).cast(pa.timestamp("ms")), "k": ["a", "a", "b"], "v": [1, 2, 3]})
    screen = Console(file=io.StringIO(), width=200)
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(table.to_batches(max_chunksize=1), table.schema, event_time="t")
    changed = stream.deduplicate("k", keep="last", name="latest")
    changed.print(console=screen).write_parquet(tmp_path / "log")
    changed.final_rows().write_parquet(tmp_path / "final")
    context.run()
    assert isinstance(screen.file, io.StringIO)
    assert "update-before" in screen.file.getvalue()
    log = pads.dataset(tmp_path / "log").to_table()
    assert sorted(zip(log["op"].to_pylist(), log["v"].to_pylist(), strict=True)) == [
        ("insert", 1), ("insert", 3), ("update-after", 2), ("update-before", 1),
    ]  # fmt: skip
    final = pads.dataset(tmp_path / "final").to_table()
    assert final.schema.names == ["t", "k", "v"]
    assert sorted(final["v"].to_pylist()) == [2, 3]


# -- refusals


def upserts(stream: DataStream) -> DataStream:
    return stream.aggregate(["k", "j"], f.count(lit(1)).alias("n"), emit="upserts", name="u")


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda s: latest(s).drop("op"), "whose columns op tell"),
        (lambda s: latest(s).select("op", "k"), "whose columns s tell"),
        (lambda s: latest(s).with_column("k", f.upper(col("k"))), "whose columns k tell"),
        (lambda s: latest(s).with_column_renamed("op", "what"), "whose columns op tell"),
        (lambda s: latest(s).assign_event_time("t"), "counted twice"),
        (lambda s: latest(s).with_processing_time(), "counted twice"),
        (lambda s: latest(s).filter(col("v")), "non-boolean"),
        (lambda s: latest(s).join_broadcast(s.select("k", col("v").alias("w")), on="k"), "counted twice"),
        (lambda s: upserts(s).join_broadcast(s.select("k", col("v").alias("w")), on="k", how="inner"), "for ever"),
        (lambda s: latest(s).union(latest(s)), "two operators|counted twice"),
        (lambda s: upserts(s).filter(col("n") > lit(1)), r"seem to be valid for ever.*final_rows\(\)"),
        (lambda s: upserts(s).split(a=col("n") > lit(1)), "seem to be valid for ever"),
        (lambda s: upserts(s).drop("k"), "whose columns k tell"),
    ],
)
def test_a_verb_that_would_lose_what_is_replaced_is_refused(build: Any, match: str) -> None:
    table = events(1, 10)
    stream = StreamContext().from_batches(cut(table, 1), table.schema, event_time="t")
    with pytest.raises((SchemaError, ValueError), match=match):
        build(stream)


def test_upserts_may_be_filtered_by_their_key() -> None:
    table = events(1, 200)
    found = run_through(lambda s: upserts(s).filter(col("j") == lit(1)).final_rows(), cut(table, 1))
    assert set(found["j"].to_pylist()) == {1}
