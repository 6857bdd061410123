"""Every row with the version of a table that was valid at its event time."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators import DataStream, SchemaError, StreamContext
from operators.sinks import MemorySink
from operators.stateful import asof_join
from statebackend import MemoryStateBackend, MemoryStateSpace
from tests.support.restarts import survive
from tests.support.streams import as_multiset
from tests.unit.test_joins import at, batches, in_order, query, run, sides


def asof_sql(how: str, tolerance_ms: int | None = None) -> str:
    """Of versions of one key and time the last one counts: they are numbered by w."""
    near = "" if tolerance_ms is None else f"AND u >= t - INTERVAL {tolerance_ms} MILLISECOND"
    return f"""
        SELECT l.k, l.j, t, v, r.u, r.w FROM left_rows l {how.upper()} JOIN LATERAL (
            SELECT u, w FROM right_rows r WHERE l.k = r.k AND l.j = r.j AND u <= t {near}
            ORDER BY u DESC, w DESC LIMIT 1
        ) r ON true"""


@pytest.mark.parametrize("how", ["inner", "left"])
@pytest.mark.parametrize("tolerance", [None, 0, 700])
def test_every_row_gets_the_newest_version_at_or_before_its_time(how: str, tolerance: int | None) -> None:
    tables = sides(3, 200, 200)
    found = run(tables, lambda s: s["left"].asof_join(s["right"], ["k", "j"], how, tolerance=tolerance))
    expected = query(tables, asof_sql(how, tolerance))
    assert expected.num_rows > 10
    assert as_multiset(in_order(found, how)) == as_multiset(expected.cast(in_order(found, how).schema))
    known = [row for row in found.to_pylist() if None not in (row["k"], row["j"])]
    assert [row["t"] for row in known] == sorted(row["t"] for row in known)


@pytest.mark.parametrize("how", ["inner", "left"])
@pytest.mark.parametrize("seed", range(4))
def test_an_asof_join_that_dies_again_and_again_publishes_the_same_rows(
    how: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asof_join, "_PRUNE_ROWS_MIN", 10)
    tolerance = random.Random(seed).choice([None, 900])
    tables = sides(seed * 10, 150, 150)
    inputs = {
        name: [b.rename_columns(["t" if c in "tu" else c for c in b.schema.names]) for b in found]
        for name, found in batches(tables, seed).items()
    }

    def build(s: Mapping[str, DataStream]) -> dict[str, DataStream]:
        versions = s["right"].with_column_renamed("t", "u")
        return {"rows": s["left"].asof_join(versions, ["k", "j"], how, tolerance=tolerance)}

    directory = tmp_path if seed % 2 else None
    found = in_order(survive(build, inputs, seed=seed, max_disorder=300, directory=directory)["rows"], how)
    assert as_multiset(found) == as_multiset(query(tables, asof_sql(how, tolerance)).cast(found.schema))


def versions_left(tables: Mapping[str, pa.Table], **options: Any) -> int:
    """How many versions are stored after all rows."""
    backend = MemoryStateBackend(MemoryStateSpace())
    context = StreamContext(state=backend, checkpoint_interval=None)
    streams = {
        name: context.from_batches(table.to_batches(max_chunksize=5), table.schema, event_time=time, name=name)
        for (name, table), time in zip(tables.items(), "tu", strict=True)
    }
    streams["left"].asof_join(streams["right"], "k", name="x", **options).sink(MemorySink())
    context.run()
    (table,) = [t for name, t in backend._tables.items() if name == "x:right"]
    count = sum(batch.num_rows for batch in table.scan())
    backend.close()
    return count


def test_versions_that_no_row_can_ask_for_any_more_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asof_join, "_PRUNE_ROWS_MIN", 10)
    count = 500
    times, keys = range(count), [i % 3 for i in range(count)]
    tables = {
        "left": at(times, k=keys, v=list(times)),
        "right": at(times, k=keys, w=list(times)).rename_columns(["u", "k", "w"]),
    }
    assert 3 <= versions_left(tables) < 30
    assert versions_left(tables, tolerance=10) == 0


def test_versions_do_not_pile_up_in_a_job_that_is_restarted_again_and_again() -> None:
    count = 300
    versions = at(range(count), k=[i % 3 for i in range(count)], w=list(range(count)))
    right = versions.rename_columns(["u", "k", "w"]).to_batches(max_chunksize=10)
    left = at(range(count), k=[1] * count, v=list(range(count))).to_batches(max_chunksize=10)
    space = MemoryStateSpace()

    def stored_after(until: int) -> int:
        """Versions that are stored when a run stops at this batch."""

        def reader(batches: list[pa.RecordBatch]) -> Any:
            def read_from(start: int) -> Any:
                for number, batch in enumerate(batches[start:], start):
                    if number >= until:
                        job.stop()
                    yield batch

            return read_from

        backend = MemoryStateBackend(space)
        context = StreamContext(state=backend, checkpoint_interval=None)
        one = context.from_batches(reader(left), left[0].schema, event_time="t", name="left")
        other = context.from_batches(reader(right), right[0].schema, event_time="u", name="right")
        one.asof_join(other, "k", name="x").sink(MemorySink(), name="out")
        job = context.job()
        job.run()
        stored = sum(batch.num_rows for batch in backend._tables["x:right"].scan())
        backend.close()
        return stored

    assert max(stored_after(until) for until in range(1, 29)) < 60


def test_a_version_behind_the_watermark_counts_for_rows_that_are_still_to_come_out() -> None:
    tables = {
        "left": at([0, 5000, 6000], k=[1, 1, 1], v=[1, 2, 3]),
        "right": at([0, 5500, 3000, 7000], k=[2, 2, 1, 2], w=[1, 2, 3, 4]).rename_columns(["u", "k", "w"]),
    }
    context = StreamContext(checkpoint_interval=None)
    streams = [
        context.from_batches(table.to_batches(max_chunksize=1), table.schema, event_time=time, name=name)
        for (name, table), time in zip(tables.items(), "tu", strict=True)
    ]
    joined = streams[0].asof_join(streams[1], "k", "left")
    sinks = [MemorySink(), MemorySink()]
    joined.sink(sinks[0])
    joined.late_rows_of("left").sink(sinks[1])
    context.run()
    assert sinks[0].table().select(["v", "w"]).to_pylist()[::2] == [{"v": 1, "w": None}, {"v": 3, "w": 3}]
    assert not sinks[1].batches


def test_what_is_no_asof_join_is_refused() -> None:
    tables = sides(1)
    context = StreamContext()
    left, right = (
        context.from_batches(table.to_batches(), table.schema, event_time=time, name=name)
        for (name, table), time in zip(tables.items(), "tu", strict=True)
    )
    with pytest.raises(ValueError, match="there are inner, left"):
        left.asof_join(right, ["k", "j"], "full")
    with pytest.raises(SchemaError, match="needs a key"):
        left.asof_join(right)
    with pytest.raises(SchemaError, match="no event time"):
        left.asof_join(right.select("k", "w"), "k")
    with pytest.raises(ValueError, match="must not be negative"):
        left.asof_join(right, ["k", "j"], tolerance=-1)
    with pytest.raises(ValueError, match="'right'; this join has late_left"):
        left.asof_join(right, ["k", "j"]).late_rows_of("right")
