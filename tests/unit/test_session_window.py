"""Sessions equal those of a plain loop over sorted rows, whatever the batches, barriers and crashes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, functions, lit

from operators import SchemaError, StreamContext
from operators.sinks import MemorySink
from operators.stateful import session_window as module
from tests.support.restarts import survive
from tests.support.streams import cut, events, milliseconds_of


def three() -> list[Any]:
    return [
        functions.count(lit(1)).alias("n"),
        functions.sum(col("v")).alias("total"),
        functions.max(col("s")).alias("last"),
    ]


def sessions(table: pa.Table, gap: int, keys: Sequence[str]) -> list[tuple[Any, ...]]:
    """By a loop: (start ms, end ms, *keys, n, total, last)."""
    groups: dict[tuple[Any, ...], list[tuple[int, Any, Any]]] = defaultdict(list)
    times = milliseconds_of(table["t"])
    for time, row in zip(times, table.to_pylist(), strict=True):
        groups[tuple(row[k] for k in keys)].append((time, row["v"], row["s"]))
    found = []
    for key, rows in groups.items():
        rows.sort(key=lambda r: r[0])
        start = 0
        for i in range(1, len(rows) + 1):
            if i == len(rows) or rows[i][0] - rows[i - 1][0] > gap:
                part = rows[start:i]
                values = [v for _, v, _ in part if v is not None]
                total = sum(values) if values else None
                found.append((part[0][0], part[-1][0] + gap, *key, len(part), total, max(s for *_, s in part)))
                start = i
    return sorted(found, key=repr)


def shown(table: pa.Table) -> list[tuple[Any, ...]]:
    """The rows of an output in the same form."""
    starts, ends = milliseconds_of(table["window_start_time"]), milliseconds_of(table["window_end_time"])
    rest = table.drop_columns(["window_start_time", "window_end_time"]).to_pylist()
    return sorted(((s, e, *r.values()) for s, e, r in zip(starts, ends, rest, strict=True)), key=repr)


@pytest.fixture(params=[1 << 17, 100], ids=["large passes", "small passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PASS_ROWS", request.param)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("keys", [["k"], ["k", "j"], []], ids=repr)
@pytest.mark.parametrize("gap", [60, 400, 3000])
def test_sessions_equal_those_of_a_loop_with_and_without_crashes(keys: list[str], gap: int) -> None:
    table = events(gap, 1500, disorder_ms=500)
    batches = cut(table, gap)

    def pipeline(inputs: Any) -> Any:
        return {"out": inputs["in"].session_window(keys, three(), gap, name="s")}

    expected = sessions(table, gap, keys)
    assert shown(survive(pipeline, {"in": batches}, crashes=0, max_disorder=500)["out"]) == expected
    assert shown(survive(pipeline, {"in": batches}, seed=gap, max_disorder=500)["out"]) == expected


@pytest.mark.parametrize("seed", range(4))
def test_sessions_survive_crashes_in_files_of_the_store(seed: int, tmp_path: Path) -> None:
    table = events(seed, 1200, disorder_ms=800)
    batches = cut(table, seed, 25)

    def pipeline(inputs: Any) -> Any:
        stream = inputs["in"].with_column("x", col("v"))
        return {"out": stream.session_window([col("k"), (col("j") + lit(1)).alias("j")], three(), 300, name="s")}

    found = survive(pipeline, {"in": batches}, seed=seed, directory=tmp_path, max_disorder=800)["out"]
    renamed = table.set_column(
        table.schema.get_field_index("j"), "j", pa.array([j + 1 for j in table["j"].to_pylist()])
    )
    assert shown(found) == sessions(renamed, 300, ["k", "j"])


@pytest.mark.parametrize(
    "kind",
    [pa.timestamp("s"), pa.timestamp("ms", "UTC"), pa.timestamp("us", "Asia/Tokyo"), pa.timestamp("ns")],
    ids=str,
)
def test_every_unit_and_zone_of_event_time_gives_the_same_sessions(kind: pa.DataType) -> None:
    table = events(7, 400, kind=kind, step_ms=1000)
    found = survive(
        lambda inputs: {"out": inputs["in"].session_window("k", three(), 4000)}, {"in": cut(table, 8)}, crashes=1
    )["out"]
    assert shown(found) == sessions(table, 4000, ["k"])
    assert found.schema.field(0).type == pa.timestamp("ms" if kind.unit == "s" else kind.unit, kind.tz)


def run(times: Sequence[int], gap: int = 10, keys: Sequence[Any] | None = None, **read: Any) -> tuple[Any, Any]:
    """Sessions (start, end, n) and late values of rows that come one by one."""
    columns = {"t": pa.array(times).cast(pa.timestamp("ms")), "v": list(range(len(times)))}
    table = pa.table({**columns, "k": pa.array(keys if keys is not None else ["a"] * len(times))})
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(table.to_batches(max_chunksize=1), table.schema, event_time="t", **read)
    found, late = MemorySink(), MemorySink()
    windows = stream.session_window("k", functions.count(lit(1)).alias("n"), gap)
    windows.sink(found)
    windows.late_rows().sink(late)
    context.run()
    table = found.table()
    bounds = (milliseconds_of(table[c]) for c in ("window_start_time", "window_end_time"))
    return list(zip(*bounds, table["n"].to_pylist(), strict=True)), late.table()["v"].to_pylist()


def test_rows_exactly_a_gap_apart_are_one_session_and_one_more_is_two() -> None:
    assert run([0, 10, 20])[0] == [(0, 30, 3)]
    assert run([0, 10, 21])[0] == [(0, 20, 2), (21, 31, 1)]


def test_a_session_is_open_until_the_watermark_exceeds_its_end() -> None:
    assert run([0, 10, 0])[0] == [(0, 20, 3)], "a row at the watermark is in time and belongs to the session"


def test_a_late_row_that_joins_two_open_sessions_makes_one_of_them() -> None:
    assert run([0, 18, 9], max_disorder=15)[0] == [(0, 28, 3)]


def test_a_row_is_late_when_its_session_would_be_closed_and_not_when_it_joins_an_open_one() -> None:
    # At 100 the session of 0 is closed. 85 is older than the gap, alone it would be late; it extends that of 92.
    found, late = run([0, 100, 92, 85, 40], max_disorder=0)
    assert late == [4]
    assert found == [(0, 10, 1), (85, 110, 3)]


def test_a_late_row_may_be_saved_by_other_rows_of_its_own_batch() -> None:
    times = pa.array([0, 100]).cast(pa.timestamp("ms")), pa.array([75, 84, 93]).cast(pa.timestamp("ms"))
    batches = [pa.record_batch({"t": t, "v": list(range(len(t)))}) for t in times]
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(batches, batches[0].schema, event_time="t")
    found, late = MemorySink(), MemorySink()
    windows = stream.session_window([], functions.count(lit(1)).alias("n"), 10)
    windows.sink(found)
    windows.late_rows().sink(late)
    context.run()
    assert found.table()["n"].to_pylist() == [1, 4]
    assert late.table().num_rows == 0


def test_sessions_of_odd_keys_are_kept_apart() -> None:
    keys = [float("nan"), 0.0, None, -0.0, float("nan"), None]
    found, _ = run([0, 1, 2, 3, 4, 5], keys=keys)
    assert sorted(found) == [(0, 14, 2), (1, 13, 2), (2, 15, 2)]


def test_the_state_of_closed_sessions_is_dropped(tmp_path: Path) -> None:
    from statebackend import StateStore, StoreSettings

    rng = random.Random(0)
    times = [i * 7 for i in range(4000)]
    table = pa.table({"t": pa.array(times).cast(pa.timestamp("ms")), "k": [rng.randrange(40) for _ in times]})
    store = StateStore.open(str(tmp_path), StoreSettings(l0_files_max=2, gc_interval_s=None))
    context = StreamContext(state=store, checkpoint_interval=0.01)
    stream = context.from_batches(table.to_batches(max_chunksize=50), table.schema, event_time="t")
    stream.session_window("k", functions.count(lit(1)).alias("n"), 20, name="s").sink(MemorySink())
    context.run()
    for name in ("s:sessions", "s:timers"):
        assert sum(b.num_rows for b in store._tables[name].scan()) == 0
    store.close()


def test_running_an_ended_job_again_emits_nothing_again() -> None:
    from statebackend import MemoryStateBackend, MemoryStateSpace

    space, sinks = MemoryStateSpace(), [MemorySink(), MemorySink()]
    table = events(3, 200)
    for sink in sinks:
        state = MemoryStateBackend(space)
        context = StreamContext(state=state, checkpoint_interval=None)
        stream = context.from_batches(cut(table, 3), table.schema, event_time="t")
        stream.session_window("k", three(), 500).sink(sink)
        context.run()
        state.close()
    assert sinks[0].table().num_rows > 0
    assert sinks[1].batches == []


def test_wrong_sessions_are_refused_when_the_stream_is_built() -> None:
    table = events(1, 10)
    stream = StreamContext().from_batches(cut(table, 1), table.schema, event_time="t")
    with pytest.raises(ValueError, match="gap"):
        stream.session_window("k", three(), 0)
    with pytest.raises(SchemaError, match=r"session_window.*nope|nope.*available"):
        stream.session_window("nope", three(), 10)
    with pytest.raises(SchemaError, match="no event time"):
        stream.drop("t").session_window("k", three(), 10)
    with pytest.raises(SchemaError, match="counted twice"):
        stream.window("k", three(), 10, allowed_lateness=5).session_window("k", three(), 10)


def test_explain_tells_the_gap_and_the_state() -> None:
    table = events(1, 10)
    stream = StreamContext().from_batches(cut(table, 1), table.schema, event_time="t")
    text = stream.session_window("k", three(), 10, name="visits").explain()
    assert "session visits: k, n, total, last with a gap of 10 ms" in text
    assert "| state visits:sessions: one row per open session" in text
