"""A checkpoint leaves as plain files, and rows of files and queries become state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import col
from datafusion import functions as f

from statebackend import (
    Aggregation,
    FencedError,
    JobState,
    StateStore,
    StoreSettings,
    TableKind,
    TableSpec,
    open_state,
)
from statebackend.cli import main

USERS = TableSpec(
    name="join:users",
    schema=pa.schema([("id", pa.int64()), ("name", pa.string()), ("at", pa.timestamp("us", "UTC"))]),
    key=("id",),
    kind=TableKind.UPSERT,
)
GROUPS = Aggregation.compile(
    pa.schema([("k", pa.string()), ("v", pa.int64())]),
    [col("k")],
    [f.avg(col("v")).alias("mean"), f.approx_distinct(col("v")).alias("distinct")],
)
TOTALS = TableSpec(
    name="totals", schema=GROUPS.merger.state_schema, key=("k",), kind=TableKind.AGGREGATE,
    aggregation=GROUPS.declaration,
)  # fmt: skip
JOB = JobState(sources={"s": {"row": 7}}, watermarks={"s": 5}, plan={"join": {"operator": "join"}, "digest": b"\x01"})
NO_MERGES = StoreSettings(compaction="none", retained_checkpoints=3)


def users(*rows: tuple[Any, ...]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), USERS.schema, strict=True)],
                           schema=USERS.schema)  # fmt: skip


def fill(state: Path) -> None:
    with StateStore.open(state, NO_MERGES) as store:
        store.table(USERS).write(users((1, "Ada", 0), (2, "Grace", 10)))
        totals = store.table(TOTALS)
        for _ in range(2):
            for states in GROUPS.partial([pa.record_batch({"k": ["a", "a", None], "v": [1, 2, 9]})]):
                totals.write(states)
            store.checkpoint(JOB).result()
        store.table(USERS).write(users((2, "Hopper", 20)))
        store.checkpoint(JOB).result()


def rows(state: Path, query: str) -> list[dict[str, Any]]:
    with open_state(state) as catalog:
        return catalog.sql(query).to_pylist()


def test_an_export_is_opened_with_nothing_of_this_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "state")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "state"), str(out)]) == 0
    assert "tables/join%3Ausers.parquet: 2 rows" in capsys.readouterr().out
    told = json.loads((out / "manifest.json").read_text())
    assert told["checkpoint_id"] == 3
    assert told["job"] == {
        "sources": {"s": {"row": 7}}, "watermarks": {"s": 5}, "plan": {"join": {"operator": "join"}, "digest": "01"},
    }  # fmt: skip
    by_name = {table["name"]: table for table in told["tables"]}
    assert by_name["join:users"]["key"] == ["id"]
    assert by_name["totals"]["values"] == "finalised"
    assert by_name["totals"]["results"] == {"mean": "avg(int64)", "distinct": "approx_distinct(int64)"}
    assert {t["name"]: t["rows"] for t in told["tables"]} == {"join:users": 2, "totals": 2}
    file = out / by_name["totals"]["file"]
    answer = duckdb.sql(f"SELECT k, mean, \"distinct\" FROM '{file}' ORDER BY k NULLS LAST").fetchall()
    assert answer == [("a", 1.5, 2), (None, 9.0, 1)]
    assert pq.read_table(out / by_name["join:users"]["file"]).column("name").to_pylist() == ["Ada", "Hopper"]


def test_an_older_checkpoint_and_one_table_as_arrow_file(tmp_path: Path) -> None:
    fill(tmp_path / "state")
    out = str(tmp_path / "out")
    only = ["--table", "join:users", "--format", "arrow", "--checkpoint", "2"]
    assert main(["export", str(tmp_path / "state"), out, *only]) == 0
    assert [p.name for p in (tmp_path / "out" / "tables").iterdir()] == ["join%3Ausers.arrow"]
    table = pa.ipc.open_file(str(tmp_path / "out" / "tables" / "join%3Ausers.arrow")).read_all()
    assert table.column("name").to_pylist() == ["Ada", "Grace"]


def test_an_export_is_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "state")
    (tmp_path / "taken").mkdir()
    for arguments in ([str(tmp_path / "taken")], [str(tmp_path / "new"), "--table", "nix"]):
        assert main(["export", str(tmp_path / "state"), *arguments]) == 2
    said = capsys.readouterr().err
    assert "exists; an export makes a directory of its own" in said
    assert "no table 'nix'; there are ['join:users', 'totals']" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state", "taken"]


def test_partial_states_go_out_and_come_back(tmp_path: Path) -> None:
    fill(tmp_path / "state")
    assert main(["export", str(tmp_path / "state"), str(tmp_path / "out"), "--raw"]) == 0
    raw = str(tmp_path / "out" / "tables" / "totals.parquet")
    before = rows(tmp_path / "state", "SELECT * FROM state.totals ORDER BY k")
    assert main(["import", str(tmp_path / "state"), "totals", raw, "--replace"]) == 0
    assert rows(tmp_path / "state", "SELECT * FROM state.totals ORDER BY k") == before
    finalised = str(tmp_path / "final")
    assert main(["export", str(tmp_path / "state"), finalised, "--table", "totals"]) == 0
    assert main(["import", str(tmp_path / "state"), "totals", f"{finalised}/tables/totals.parquet"]) == 1


def test_whole_states_go_out_and_come_back_and_results_are_no_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(TOTALS, name="whole", kind=TableKind.UPSERT)
    with StateStore.open(tmp_path / "state", NO_MERGES) as store:
        for states in GROUPS.partial([pa.record_batch({"k": ["a", "a", None], "v": [1, 2, 9]})]):
            store.table(whole).write(states)
        store.checkpoint(JOB).result()
    before = rows(tmp_path / "state", "SELECT * FROM state.whole ORDER BY k")
    for flags, code in (([], 1), (["--raw"], 0)):
        out = tmp_path / f"out{code}"
        assert main(["export", str(tmp_path / "state"), str(out), *flags]) == 0
        assert main(["import", str(tmp_path / "state"), "whole", str(out / "tables" / "whole.parquet")]) == code
    assert "a table of states takes states, as export --raw writes them" in capsys.readouterr().err
    assert rows(tmp_path / "state", "SELECT * FROM state.whole ORDER BY k") == before


def test_an_import_is_one_checkpoint_that_keeps_the_positions_and_fences_the_owner(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "new.csv").write_text("name,id,at\nLovelace,1,2020-01-01 00:00:00\nTuring,3,2021-01-01 00:00:00\n")
    with StateStore.open(tmp_path, NO_MERGES) as job:
        assert main(["import", str(tmp_path), "join:users", str(tmp_path / "new.csv"), "--at-checkpoint", "3"]) == 0
        with pytest.raises(FencedError):
            job.checkpoint(JOB).result()
    assert rows(tmp_path, 'SELECT id, name FROM state."join:users" ORDER BY id') == [
        {"id": 1, "name": "Lovelace"}, {"id": 2, "name": "Hopper"}, {"id": 3, "name": "Turing"},
    ]  # fmt: skip
    with open_state(tmp_path) as catalog:
        assert catalog.checkpoint.checkpoint_id == 4
        assert catalog.checkpoint.job == JOB
        assert len(catalog.manifest.retained) == 4, "nothing leaves retention for an import"
        assert catalog.manifest.timeline == 1
    assert main(["import", str(tmp_path), "join:users", str(tmp_path / "new.csv"), "--at-checkpoint", "3"]) == 1


def test_a_query_over_the_state_itself_repairs_it(tmp_path: Path) -> None:
    fill(tmp_path)
    query = """SELECT id, upper(name) AS name, at FROM state."join:users" WHERE id = 2"""
    assert main(["import", str(tmp_path), "join:users", query]) == 0
    assert [r["name"] for r in rows(tmp_path, 'SELECT * FROM state."join:users" ORDER BY id')] == ["Ada", "HOPPER"]
    assert main(["import", str(tmp_path), "join:users", query, "--replace"]) == 0
    assert [r["name"] for r in rows(tmp_path, 'SELECT * FROM state."join:users"')] == ["HOPPER"]


def test_a_store_begins_with_a_query_over_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item": [1, 1, 2], "price": [1.5, 2.5, 4.0]}), tmp_path / "sales.parquet")
    query = "SELECT item, sum(price) AS total FROM sales GROUP BY item"
    files = ["--with", f"sales={tmp_path / 'sales.parquet'}"]
    state = str(tmp_path / "state")
    assert main(["import", state, "totals", query, *files]) == 1, "no store, and nothing declares the table"
    assert main(["import", state, "totals", query, *files, "--key", "item"]) == 0
    assert rows(tmp_path / "state", "SELECT * FROM state.totals ORDER BY item") == [
        {"item": 1, "total": 4.0}, {"item": 2, "total": 4.0},
    ]  # fmt: skip
    assert main(["verify", state]) == 0


REFUSED = {
    "other columns": (["SELECT 1 AS id"], 1, "has the columns ['id', 'name', 'at'], the rows have ['id']"),
    "a type that cannot be cast": (["SELECT true AS id, 'y' AS name, 1.5 AS at"], 1, "column 'at'"),
    "no query": (["SELECT nix FROM nowhere"], 2, "nowhere"),
    "no file": (["nothing.csv"], 2, "nothing.csv: no such file"),
    "no format": (["."], 2, ""),
    "another key": (["SELECT 1 AS id, 'x' AS name, now() AS at", "--key", "name"], 1, "upsert with the key ['id']"),
    "a new table without a key": (["SELECT 1 AS id"], 1, "A new one needs at least a key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_do_not_fit_are_refused_and_the_owner_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, code, reason = REFUSED[case]
    fill(tmp_path)
    table = "other" if "new table" in case else "join:users"
    with StateStore.open(tmp_path, NO_MERGES) as job:
        assert main(["import", str(tmp_path), table, *arguments]) == code
        assert reason in capsys.readouterr().err
        job.checkpoint(JOB).result()


def test_a_row_that_does_not_fit_leaves_the_state_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    query = "SELECT * FROM (VALUES ('7', 'x', now()), ('seven', 'y', now())) AS t (id, name, at)"
    assert main(["import", str(tmp_path), "join:users", query]) == 1
    assert "column 'id': Failed to parse string: 'seven'" in capsys.readouterr().err
    assert [r["id"] for r in rows(tmp_path, 'SELECT id FROM state."join:users" ORDER BY id')] == [1, 2]
