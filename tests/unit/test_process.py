"""Functions with keyed state and timers: both forms, exact recovery of state and timers, ttl, errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import col

from operators import (
    KeyedBatch,
    KeyedBatchProcess,
    KeyedProcess,
    ListState,
    MapState,
    ProcessContext,
    SchemaError,
    StreamContext,
    UserFunctionError,
    ValueState,
)
from operators.sinks import MemorySink
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut, events, milliseconds_of

TABLE = events(12, 900, disorder_ms=300)
BATCHES = cut(TABLE, 12, 30)
GAP = 200


class Journal(KeyedProcess):
    """Uses every kind of state: a count, the last few values, a count per value of another column, and a timer.

    Emits a summary when a key has been silent for a while, and forgets it then.
    """

    schema = pa.schema(
        [("k", pa.string()), ("n", pa.int64()), ("recent", pa.list_(pa.int64())), ("kinds", pa.string())]
    )
    count = ValueState[int](pa.int64())
    alarm = ValueState[int](pa.int64())
    recent = ListState[int](pa.int64())
    kinds = MapState[int, int](pa.int32(), pa.int64())

    def process(self, row: Mapping[str, Any], context: ProcessContext) -> Iterable[Mapping[str, Any]]:
        context[self.count].value = (context[self.count].value or 0) + 1
        context[self.recent].append(row["v"])
        if len(context[self.recent]) > 3:
            context[self.recent].pop(0)
        kinds = context[self.kinds]
        kinds[row["j"]] = kinds.get(row["j"], 0) + 1
        alarm = context[self.alarm]
        time = row["at"] + GAP
        if alarm.value is None or time > alarm.value:
            if alarm.value is not None:
                context.delete_timer(alarm.value)
            alarm.value = time
            context.set_timer(time)
        return []

    def on_timer(self, time_ms: int, context: ProcessContext) -> Iterator[Mapping[str, Any]]:
        assert time_ms == context[self.alarm].value
        kinds = ",".join(f"{k}:{n}" for k, n in sorted(context[self.kinds].items()))
        yield {
            "k": context.key[0],
            "n": context[self.count].value,
            "recent": list(context[self.recent]),
            "kinds": kinds,
        }
        context[self.count].value = context[self.alarm].value = None
        context[self.recent].clear()
        context[self.kinds].clear()


def with_times(table: pa.Table) -> pa.Table:
    return table.append_column("at", pa.array(milliseconds_of(table["t"]), pa.int64()))


def journals(table: pa.Table, batches: list[pa.RecordBatch], disorder: int) -> list[Any]:
    """The same by a loop that follows the watermark itself."""
    state: dict[Any, dict[str, Any]] = {}
    found, watermark, latest = [], None, None

    def fire(upto: float) -> None:
        due = sorted((s["alarm"], str(k), k) for k, s in state.items() if s["alarm"] < upto)
        for _, _, key in due:
            s = state.pop(key)
            kinds = ",".join(f"{k}:{n}" for k, n in sorted(s["kinds"].items()))
            found.append((key, s["n"], tuple(s["recent"]), kinds))

    for batch in batches:
        if not batch.num_rows:
            continue
        for row in batch.to_pylist():
            s = state.setdefault(row["k"], {"n": 0, "recent": [], "kinds": defaultdict(int), "alarm": -(10**18)})
            s["n"] += 1
            s["recent"] = [*s["recent"], row["v"]][-3:]
            s["kinds"][row["j"]] += 1
            s["alarm"] = max(s["alarm"], row["at"] + GAP)
        # A timer that was set in the past fires right after its batch.
        if watermark is not None:
            fire(watermark)
        latest = (
            max(t for t in batch["at"].to_pylist() if t is not None)
            if latest is None
            else max(latest, *batch["at"].to_pylist())
        )
        watermark = latest - disorder
        fire(watermark)
    fire(float("inf"))
    return sorted(found, key=repr)


def shown(table: pa.Table) -> list[Any]:
    return sorted(((r["k"], r["n"], tuple(r["recent"]), r["kinds"]) for r in table.to_pylist()), key=repr)


@pytest.mark.parametrize("seed", range(4))
def test_state_and_timers_of_the_row_form_recover_exactly(seed: int, tmp_path: Path) -> None:
    table = with_times(events(seed, 700, disorder_ms=300))
    batches = cut(table, seed, 30)

    def pipeline(inputs: Any) -> Any:
        return {"out": inputs["in"].process("k", Journal(), name="p")}

    expected = journals(table, batches, 300)
    assert len(expected) > 8
    assert shown(survive(pipeline, {"in": batches}, crashes=0, max_disorder=300)["out"]) == expected
    directory = tmp_path if seed % 2 else None
    found = survive(pipeline, {"in": batches}, seed=seed, crashes=4, directory=directory, max_disorder=300)["out"]
    assert shown(found) == expected


class Sums(KeyedBatchProcess):
    """Running sums per key, emitted for each event; a timer per second of event time tells the sum then."""

    schema = pa.schema([("k", pa.string()), ("total", pa.int64()), ("at", pa.int64())])
    state = pa.schema([pa.field("total", pa.int64(), nullable=False), ("rows", pa.int64())])

    def process(self, batch: KeyedBatch) -> None:
        values = batch.events["v"].fill_null(0).to_numpy(zero_copy_only=False)
        before = batch.state["total"].fill_null(0).to_numpy(zero_copy_only=False)
        rows = batch.state["rows"].fill_null(0).to_numpy(zero_copy_only=False)
        total = before + np.bincount(batch.key_index, values, len(before)).astype(np.int64)
        count = rows + np.bincount(batch.key_index, minlength=len(before))
        batch.put(pa.record_batch([pa.array(total), pa.array(count)], schema=self.state))
        seconds = (batch.events["at"].to_numpy() // 1000 + 1) * 1000
        batch.set_timers(seconds, batch.key_index)

    def on_timers(self, batch: KeyedBatch) -> None:
        assert batch.events.num_rows == 0
        batch.emit(pa.record_batch([batch.keys["k"], batch.state["total"], pa.array(batch.times)], schema=self.schema))
        batch.clear((batch.state["rows"].fill_null(0).to_numpy(zero_copy_only=False) > 40) & batch.known)


@pytest.mark.parametrize("crashes", [0, 4])
def test_state_and_timers_of_the_batch_form_recover_exactly(crashes: int, tmp_path: Path) -> None:
    table = with_times(TABLE)
    batches = cut(table, 12, 30)

    def pipeline(inputs: Any) -> Any:
        return {"out": inputs["in"].process("k", Sums(), name="p")}

    directory = tmp_path if crashes else None
    found = survive(pipeline, {"in": batches}, seed=1, crashes=crashes, directory=directory, max_disorder=300)["out"]
    # By a loop.
    state: dict[Any, list[int]] = {}
    timers: dict[tuple[int, Any], None] = {}
    expected, latest = [], None

    def fire(upto: float) -> None:
        for time, key in sorted(timers, key=lambda t: (t[0], repr(t[1]))):
            if time < upto:
                del timers[time, key]
                total, rows = state.get(key, [None, 0])  # type: ignore[list-item]
                expected.append((key, total, time))
                if rows > 40:
                    state.pop(key)

    for batch in batches:
        if batch.num_rows:
            for row in batch.to_pylist():
                s = state.setdefault(row["k"], [0, 0])
                s[0] += row["v"] or 0
                s[1] += 1
                timers[(row["at"] // 1000 + 1) * 1000, row["k"]] = None
            if latest is not None:
                fire(latest - 300)
            latest = max(batch["at"].to_pylist()) if latest is None else max(latest, *batch["at"].to_pylist())
            fire(latest - 300)
    fire(float("inf"))
    assert sorted(as_multiset(found).items(), key=repr) == sorted(
        ((e, expected.count(e)) for e in set(expected)), key=repr
    )


class Counter(KeyedProcess):
    schema = pa.schema([("k", pa.string()), ("n", pa.int64())])
    count = ValueState[int](pa.int64())

    def process(self, row: Mapping[str, Any], context: ProcessContext) -> Iterator[Mapping[str, Any]]:
        count = context[self.count]
        count.value = (count.value or 0) + 1
        if row.get("v") == 13:
            raise ValueError("thirteen")
        yield {"k": context.key[0], "n": count.value}


class WronglyTyped(Counter):
    schema = pa.schema([("k", pa.int64()), ("n", pa.int64())])


def run(times: list[int], function: Any, values: list[int] | None = None, key: Any = None, **options: Any) -> Any:
    columns = {"t": pa.array(times).cast(pa.timestamp("ms")), "k": pa.array(key or ["a"] * len(times))}
    table = pa.table({**columns, "v": values or [0] * len(times), "at": times})
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(table.to_batches(max_chunksize=1), table.schema, event_time="t")
    found, failed = MemorySink(), MemorySink()
    result = stream.process("k", function, name="p", **options)
    result.sink(found)
    if options.get("on_error") == "skip":
        result.failed_rows().sink(failed)
    context.run()
    return found.table(), failed


def test_state_is_forgotten_when_event_time_has_passed_the_last_row_of_a_key_by_the_ttl() -> None:
    found, _ = run([0, 50, 100, 201, 301, 403], Counter(), ttl=100)
    # 201 itself moves event time past 100 + 100 only after it was processed, 301 + 100 < 403 likewise.
    assert found["n"].to_pylist() == [1, 2, 3, 4, 5, 6]
    found, _ = run([0, 300, 300, 900, 900], Counter(), key=["a", "b", "a", "b", "a"], ttl=100)
    assert list(zip(found["k"].to_pylist(), found["n"].to_pylist(), strict=True)) == [
        ("a", 1), ("b", 1), ("a", 1), ("b", 2), ("a", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("crashes", [0, 4])
def test_a_ttl_survives_crashes_and_covers_lists_and_maps(crashes: int) -> None:
    class Seen(KeyedProcess):
        schema = pa.schema([("k", pa.string()), ("sizes", pa.string())])
        values = ListState[int](pa.int64())
        kinds = MapState[int, int](pa.int32(), pa.int64())

        def process(self, row: Mapping[str, Any], context: ProcessContext) -> Iterator[Mapping[str, Any]]:
            context[self.values].append(row["v"] or 0)
            context[self.kinds][row["j"]] = len(context[self.values])
            yield {"k": context.key[0], "sizes": f"{len(context[self.values])} {len(context[self.kinds])}"}

    def pipeline(inputs: Any) -> Any:
        return {"out": inputs["in"].process("k", Seen(), ttl=150, name="p")}

    found = survive(pipeline, {"in": BATCHES}, seed=2, crashes=crashes, max_disorder=300)["out"]
    assert as_multiset(found) == as_multiset(survive(pipeline, {"in": BATCHES}, crashes=0, max_disorder=300)["out"])
    assert found["sizes"].to_pylist().count("1 1") > 6, "no key was forgotten"


def test_a_function_that_raises_names_the_row_and_the_checkpoint_before_stays() -> None:
    with pytest.raises(UserFunctionError, match="thirteen") as caught:
        run([0, 1, 2], Counter(), [1, 13, 2])
    assert "row 0 of batches, batch 2" in str(caught.value)


def test_a_row_that_is_skipped_leaves_no_trace_in_the_state() -> None:
    found, failed = run([0, 1, 2, 3], Counter(), [1, 13, 2, 13], on_error="skip")
    assert found["n"].to_pylist() == [1, 2]
    assert failed.table()["v"].to_pylist() == [13, 13]


def test_a_batch_that_is_skipped_leaves_no_trace_either() -> None:
    class Fragile(Sums):
        def process(self, batch: KeyedBatch) -> None:
            super().process(batch)
            if pc.any(pc.equal(batch.events["v"], 13)).as_py():
                raise ValueError("thirteen")

    found, failed = run([0, 1500, 2500, 9000], Fragile(), [1, 13, 2, 4], on_error="skip")
    assert failed.table()["v"].to_pylist() == [13]
    assert found["total"].to_pylist() == [1, 7, 7]


class Chain(KeyedProcess):
    """A timer that sets the next one, and one that takes another back."""

    schema = pa.schema([("time", pa.int64())])

    def process(self, row: Mapping[str, Any], context: ProcessContext) -> None:
        context.set_timer(row["at"] + 10)
        context.set_timer(row["at"] + 55)
        context.set_timer(row["at"] + 10)

    def on_timer(self, time_ms: int, context: ProcessContext) -> Iterator[Mapping[str, Any]]:
        yield {"time": time_ms}
        if time_ms % 10 == 0:
            context.set_timer(time_ms + 10)
        if time_ms == 40:
            context.delete_timer(55)


def test_timers_fire_in_order_once_and_may_set_and_delete_others() -> None:
    found, _ = run([0, 51], Chain())
    # At the end of the input what is pending fires once: the timers of 0 that go on (60), those of 51 (61, 106).
    assert found["time"].to_pylist() == [10, 20, 30, 40, 50, 60, 61, 106]


def test_a_timer_in_the_past_fires_after_its_batch() -> None:
    class Past(KeyedProcess):
        schema = pa.schema([("time", pa.int64())])

        def process(self, row: Mapping[str, Any], context: ProcessContext) -> None:
            context.set_timer(row["at"] - 1000)

        def on_timer(self, time_ms: int, context: ProcessContext) -> Iterator[Mapping[str, Any]]:
            yield {"time": time_ms}

    found, _ = run([0, 5000, 5001], Past())
    assert found["time"].to_pylist() == [-1000, 4000, 4001]


def test_timers_of_processing_time_follow_the_clock() -> None:
    now = [100.0]

    class Timeout(KeyedProcess):
        schema = pa.schema([("k", pa.string()), ("time", pa.int64())])

        def process(self, row: Mapping[str, Any], context: ProcessContext) -> None:
            context.set_processing_timer(int(now[0] * 1000) + 500)

        def on_processing_timer(self, time_ms: int, context: ProcessContext) -> Iterator[Mapping[str, Any]]:
            yield {"k": context.key[0], "time": time_ms}

    def batches() -> Iterator[pa.RecordBatch]:
        for key, step in (("a", 0.0), ("b", 0.3), ("c", 0.3), ("d", 1.0)):
            now[0] += step
            yield pa.record_batch({"k": [key]})

    context = StreamContext(checkpoint_interval=None, clock=lambda: now[0])
    sink = MemorySink()
    context.from_batches(batches, pa.schema([("k", pa.string())])).process("k", Timeout()).sink(sink)
    context.run()
    assert list(zip(*sink.table().to_pydict().values(), strict=True)) == [
        ("a", 100_500), ("b", 100_800), ("c", 101_100)
    ]  # fmt: skip


@pytest.mark.parametrize("stops", [0, 3])
def test_timers_of_processing_time_of_the_batch_form_follow_the_clock(stops: int, tmp_path: Path) -> None:
    now = [100.0]

    class Timeouts(KeyedBatchProcess):
        """Of each row two timers; the later one is taken back by the next row of the key."""

        schema = pa.schema([("k", pa.string()), ("rows", pa.int64()), ("time", pa.int64())])
        state = pa.schema([("rows", pa.int64()), ("last", pa.int64())])

        def process(self, batch: KeyedBatch) -> None:
            at = batch.events["at"].to_numpy()  # one row of each key in a batch, in the order of keys
            order = np.argsort(batch.key_index)
            rows = batch.state["rows"].fill_null(0).to_numpy(zero_copy_only=False) + 1
            last = batch.state["last"].fill_null(0).to_numpy(zero_copy_only=False)
            batch.delete_processing_timers(last + 900)
            batch.set_processing_timers(at[order] + 900)
            batch.set_processing_timers(at[order] + 100)
            batch.put(pa.record_batch([pa.array(rows), pa.array(at[order])], schema=self.state))

        def on_processing_timers(self, batch: KeyedBatch) -> None:
            assert batch.events.num_rows == 0
            columns = [batch.keys["k"], batch.state["rows"], pa.array(batch.times)]
            batch.emit(pa.record_batch(columns, schema=self.schema))

    steps = [100_000, 100_500, 101_000, 103_000]  # timers fire after the batch whose time has passed them
    batches = [
        pa.record_batch({"k": ["a", "b"][: 2 - number % 2], "at": [at] * (2 - number % 2)})
        for number, at in enumerate(steps)
    ]

    def pipeline(inputs: Any) -> Any:
        def tick(batch: pa.RecordBatch) -> pa.RecordBatch:
            now[0] = batch["at"][0].as_py() / 1000
            return batch

        stream = inputs["in"].map_batches(tick, batches[0].schema)
        return {"out": stream.process("k", Timeouts(), name="p")}

    found = survive(
        pipeline, {"in": batches}, crashes=0, stops=stops, incident_chance=0.6,
        directory=tmp_path, event_time=None, clock=lambda: now[0],
    )["out"]  # fmt: skip
    assert sorted(zip(*found.to_pydict().values(), strict=True)) == [
        ("a", 2, 100_100), ("a", 3, 100_600), ("a", 4, 101_100),
        ("b", 1, 100_100), ("b", 2, 101_100), ("b", 2, 101_900),
    ]  # fmt: skip


def test_a_batch_function_takes_timers_back_and_the_last_word_counts() -> None:
    class Words(KeyedBatchProcess):
        schema = pa.schema([("time", pa.int64())])
        state = pa.schema([("rows", pa.int64())])

        def process(self, batch: KeyedBatch) -> None:
            batch.set_timers(np.array([1000, 2000, 3000]), np.zeros(3, dtype=np.int64))
            batch.delete_timers(np.array([2000]))
            batch.delete_timers(np.array([3000]))
            batch.set_timers(np.array([3000]))

        def on_timers(self, batch: KeyedBatch) -> None:
            batch.emit(pa.record_batch([pa.array(batch.times)], schema=self.schema))

    found, _ = run([0], Words())
    assert found["time"].to_pylist() == [1000, 3000]


def test_wrong_uses_are_refused_when_the_stream_is_built() -> None:
    stream = StreamContext().from_batches(TABLE, event_time="t")
    with pytest.raises(TypeError, match="KeyedProcess"):
        stream.process("k", lambda row: row)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one column"):
        stream.process([], Counter())
    with pytest.raises(SchemaError, match="no event time"):
        stream.drop("t").process("k", Counter(), ttl=10)
    with pytest.raises(ValueError, match="ttl"):
        stream.process("k", Counter(), ttl=0)
    with pytest.raises(SchemaError, match="columns of the key and of the state"):
        stream.with_column("total", col("v")).process("total", Sums())
    with pytest.raises(SchemaError, match="do not fit"):
        run([0], WronglyTyped())
    text = stream.process("k", Journal(), name="j").explain()
    assert "process j: Journal by k" in text
    assert "| state j:list.recent: one row per element per key; GROWS FOR EVER" in text
