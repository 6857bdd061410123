"""What if the program were another one? A running job is branched, and the branch goes on with changed code.

The original is a shop that counts what is sold per hour. While it runs, its state after three batches is branched, and
a program that leaves small sales out (and knows the largest) replays the batches since then. Outputs and states are
compared with SQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import StreamContext, Upgrade
from statebackend import clone, open_state
from statebackend.cli import main

START = datetime(2024, 1, 1, tzinfo=UTC)
BATCHES = [
    pa.record_batch(
        {
            "at": pa.array([START + timedelta(minutes=20 * n + i) for i in range(4)], pa.timestamp("ms", "UTC")),
            "shop": ["north", "south", "north", None],
            "paid": [n, 10 * n, 1, 5],
        }
    )
    for n in range(8)
]
TOTAL = f.sum(col("paid")).alias("total")
LARGEST = f.max(col("paid")).alias("largest")


def run(state: Path, out: Path, *, what_if: bool = False, before: Any = None) -> None:
    """The program of the original, or the other one; ``before`` is called with the number of each batch."""

    def batches() -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(BATCHES):
            if before is not None:
                before(number)
            yield batch

    upgrade = Upgrade(change=["hourly", "out"]) if what_if else None
    context = StreamContext(
        "shop", state=state, checkpoint_interval=None, checkpoint_trigger=lambda: True, upgrade=upgrade
    )
    sales = context.from_batches(batches, BATCHES[0].schema, event_time="at", name="sales")
    if what_if:
        sales = sales.filter(col("paid") > lit(4))
    aggregates = [TOTAL, LARGEST] if what_if else [TOTAL]
    sales.window(["shop"], aggregates, timedelta(hours=1), name="hourly").write_parquet(out, name="out")
    context.run()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original ran to its end, and from the middle of it the other program."""
    place = tmp_path_factory.mktemp("shop")

    def before(number: int) -> None:
        if number == 6:
            clone(place / "state", place / "branch", checkpoint_id=3)
            run(place / "branch", place / "out-branch", what_if=True)

    run(place / "alone", place / "out-alone")
    run(place / "state", place / "out", before=before)
    return place


def output(place: Path) -> list[tuple[Any, ...]]:
    columns = "hour(window_start_time) AS hour, shop, total"
    return duckdb.sql(f"SELECT {columns} FROM '{place}/*.parquet' ORDER BY ALL").fetchall()


def test_the_original_is_not_disturbed(shop: Path) -> None:
    assert output(shop / "out") == output(shop / "out-alone")


def test_the_branch_goes_on_from_its_checkpoint_with_the_other_program(shop: Path) -> None:
    branch = f"SELECT shop, total, largest FROM '{shop}/out-branch/*.parquet'"
    first = duckdb.sql(f"{branch} WHERE hour(window_start_time) = 0 ORDER BY shop").fetchall()
    assert first == [("north", 6, None), ("south", 30, None), (None, 15, None)], "what was before the branch stays"
    second = duckdb.sql(f"{branch} WHERE hour(window_start_time) = 1 ORDER BY shop").fetchall()
    assert second == [("north", 5, 5), ("south", 120, 50), (None, 15, 5)], "sales below five are left out"


def test_outputs_are_compared_by_a_join(shop: Path) -> None:
    changed = duckdb.sql(
        f"""SELECT hour(window_start_time) AS hour, shop, a.total AS was, b.total AS would_be
        FROM '{shop}/out/*.parquet' a FULL JOIN '{shop}/out-branch/*.parquet' b USING (window_start_time, shop)
        WHERE a.total IS DISTINCT FROM b.total AND shop IS NOT NULL ORDER BY ALL"""
    ).fetchall()
    assert changed == [(1, "north", 15, 5), (2, "north", 15, 13)]


def test_states_are_compared_by_their_difference_and_by_joins(shop: Path) -> None:
    """At the same place of the input: after the seventh batch."""
    with open_state(shop / "state", 7) as catalog:
        catalog.attach("what_if", shop / "branch", 8)  # one more: the upgrade was a checkpoint of its own
        assert catalog.checkpoint.job.sources == {"sales": {"batches": 7, "rows": 28}}
        diff = "SELECT shop, old_total, new_total, old_largest, new_largest, op FROM state_diff('hourly', 7, 'what_if')"
        assert sorted(catalog.sql(diff).to_pylist(), key=str) == [
            {"shop": "north", "old_total": 7, "new_total": 6, "old_largest": None, "new_largest": 6, "op": "update"},
            {"shop": "south", "old_total": 60, "new_total": 60, "old_largest": None, "new_largest": 60, "op": "update"},
            {"shop": None, "old_total": 5, "new_total": 5, "old_largest": None, "new_largest": 5, "op": "update"},
        ]
        join = "SELECT a.shop, a.total - b.total AS less FROM state.hourly a JOIN what_if.hourly b USING (shop)"
        assert catalog.sql(f"{join} WHERE a.total > b.total").to_pylist() == [{"shop": "north", "less": 1}]
        assert catalog.sql("SELECT count(*) AS n FROM state_at('hourly', 'what_if')").to_pylist() == [{"n": 3}]


def test_a_branch_that_has_changed_nothing_is_not_read(shop: Path, tmp_path: Path) -> None:
    clone(shop / "state", tmp_path / "same", checkpoint_id=7)
    with open_state(shop / "state", 7) as catalog:
        catalog.attach("same", tmp_path / "same")
        assert catalog.sql("SELECT * FROM state_diff('hourly', 7, 'same')").to_pylist() == []
        files = len(catalog.manifest.tables["hourly"].files)
        assert catalog.reads.requests == files, "their indexes, no block"


def test_from_the_shell(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = "SELECT op, count(*) AS n FROM state_diff('hourly', 7, 'what_if') GROUP BY op"
    attach = ["--checkpoint", "7", "--attach", f"what_if@8={shop / 'branch'}", "--format", "csv"]
    assert main(["sql", str(shop / "state"), query, *attach]) == 0
    assert capsys.readouterr().out == "op,n\nupdate,3\n"
    assert main(["sql", str(shop / "state"), query, "--attach", "nonsense"]) == 2
    assert "expected NAME=URL" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is a schema 'state' already"), open_state(shop / "state") as catalog:
        catalog.attach("state", shop / "branch")
