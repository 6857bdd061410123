"""Several splits of one source: a watermark each, idle ones, alignment, and positions that restore the order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pytest
from datafusion import functions, lit

from operators import SchemaError, StreamContext
from operators.sinks import MemorySink
from operators.sources import IDLE, IterableSource, MultiSource, SourceBatch
from operators.watermark import EventTimeSpec, SplitWatermarks
from statebackend import MemoryStateBackend, MemoryStateSpace
from tests.support.restarts import CrashError
from tests.support.streams import Ledger, LedgerSink, as_multiset, cut, events, one_shot

SCHEMA = pa.schema([("t", pa.timestamp("ms"))])


def at(*times: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array(times).cast(pa.timestamp("ms"))], schema=SCHEMA)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def follow(clock: Clock, **settings: Any) -> SplitWatermarks:
    return SplitWatermarks(EventTimeSpec(column="t", future_limit_ms=None, **settings), SCHEMA, clock)


BOTH = frozenset(["a", "b"])


def advance(time: SplitWatermarks, split: str, *times: int, active: frozenset[str] = BOTH) -> int | None:
    reached = time.observe(split, at(*times))
    assert not hasattr(reached, "bad")
    time.advance(split, reached, active)  # type: ignore[arg-type]
    return time.watermark


def test_event_time_is_that_of_the_split_furthest_behind() -> None:
    time = follow(Clock(), max_disorder_ms=1)
    assert advance(time, "a", 100) is None
    assert advance(time, "b", 10) == 9
    assert advance(time, "b", 300) == 99
    assert advance(time, "a", 50) == 99
    assert dict(time.splits) == {"a": 99, "b": 299}


def test_a_split_that_has_ended_is_not_waited_for() -> None:
    time = follow(Clock())
    advance(time, "a", 100)
    advance(time, "b", 10)
    assert advance(time, "a", 200, active=frozenset("a")) == 200


def test_an_idle_split_is_not_waited_for_until_it_brings_rows_again() -> None:
    clock = Clock()
    time = follow(clock, idle_timeout_ms=500)
    advance(time, "a", 100)
    clock.now += 0.4
    assert advance(time, "a", 200) is None, "b never had rows, but is not idle yet"
    clock.now += 0.2
    assert time.settle(BOTH)
    assert time.watermark == 200
    advance(time, "b", 150)
    assert advance(time, "a", 900) == 200, "b is awake, at 150; event time never moves back"
    assert advance(time, "b", 300) == 300


def test_a_fast_split_is_held_back() -> None:
    time = follow(Clock(), max_drift_ms=100)
    advance(time, "a", 100)
    assert time.ahead(BOTH) == {"a"}, "nobody knows how far behind b is"
    advance(time, "b", 10)
    assert time.ahead(BOTH) == frozenset()
    advance(time, "a", 200)
    assert time.ahead(BOTH) == {"a"}
    advance(time, "b", 150)
    assert time.ahead(BOTH) == frozenset()


@pytest.mark.parametrize("settings", [{"idle_timeout_ms": 0}, {"max_drift_ms": -1}])
def test_limits_are_positive(settings: Mapping[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        EventTimeSpec(column="t", **settings)


def test_rows_of_a_split_far_behind_are_not_late() -> None:
    tables = {"old": events(1, 500), "new": events(2, 800)}
    shift = pa.scalar(10**7, pa.int64())
    moved = pa.compute.add(tables["new"]["t"].cast(pa.int64()), shift).cast(tables["new"].schema.field("t").type)
    tables["new"] = tables["new"].set_column(0, "t", moved)
    for limit in (None, 5000):
        source = MultiSource({n: IterableSource(cut(t, 1), t.schema) for n, t in tables.items()})
        context = StreamContext(checkpoint_interval=None)
        stream = context.from_source(source, event_time="t", max_drift=limit)
        windows = stream.window("k", functions.count(lit(1)).alias("n"), 1000)
        found, late = MemorySink(), MemorySink()
        windows.sink(found)
        windows.late_rows().sink(late)
        context.run()
        both = pa.concat_tables(tables.values())
        assert late.table().num_rows == 0
        expected = one_shot(both, 1000, 1000, keys=["k"], select="count(1) AS n")
        assert as_multiset(found.table()) == as_multiset(expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_restored_job_reads_the_splits_in_the_same_order(seed: int) -> None:
    tables = {str(i): events(seed + i, 300 + 200 * i, disorder_ms=100) for i in range(3)}
    parts = {name: cut(table, seed) for name, table in tables.items()}

    def run(space: MemoryStateSpace, rng: random.Random, crashes: int) -> pa.Table:
        ledger, left, jobs = Ledger(), [crashes], []

        def reader(batches: list[pa.RecordBatch]) -> Any:
            def read(start: int) -> Iterator[pa.RecordBatch]:
                for batch in batches[start:]:
                    if rng.random() < 0.3:
                        jobs[-1].checkpoint()
                    if left[0] and rng.random() < 0.1:
                        left[0] -= 1
                        raise CrashError
                    yield batch

            return read

        while True:
            state = MemoryStateBackend(space)
            context = StreamContext(state=state, checkpoint_interval=None)
            source = MultiSource({n: IterableSource(reader(p), p[0].schema) for n, p in parts.items()})
            stream = context.from_source(source, event_time="t", max_disorder=100, max_drift=2000)
            stream.sink(LedgerSink(ledger))
            jobs.append(context.job())
            try:
                jobs[-1].run()
            except CrashError:
                continue
            finally:
                state.close()
            return ledger.table()

    undisturbed = run(MemoryStateSpace(), random.Random(0), 0)
    again = run(MemoryStateSpace(), random.Random(seed), 3)
    assert again.to_pylist() == undisturbed.to_pylist()


class Sparse:
    """A live source: batches, with times at which there is nothing."""

    def __init__(self, items: list[Any], clock: Clock) -> None:
        self.items, self.clock = items, clock
        self.schema, self.total_rows = SCHEMA, None

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "sparse"}

    def open(self, position: Any) -> None:
        self.at = position or 0

    def poll(self) -> Any:
        if self.at == len(self.items):
            return None
        item = self.items[self.at]
        self.at += 1
        self.clock.now += 0.1
        return IDLE if item is None else SourceBatch(item, self.at)

    def close(self) -> None:
        pass


def test_a_source_that_falls_silent_is_not_waited_for_after_its_timeout() -> None:
    clock, seen = Clock(), []
    silent = [at(0), *[None] * 30, at(90_000)]
    busy = [at(i * 1000) for i in range(40)]
    context = StreamContext(checkpoint_interval=None, clock=clock)
    first = context.from_source(Sparse(silent, clock), event_time="t", idle_timeout=1000, name="silent")
    second = context.from_source(Sparse(busy, clock), event_time="t", name="busy")

    class Recorder(MemorySink):
        def write(self, batch: pa.RecordBatch) -> None:
            seen.append(len(seen))
            super().write(batch)

    sink = Recorder()
    merged = first.union(second)
    merged.window([], functions.count(lit(1)).alias("n"), 1000).sink(sink)
    context.run()
    assert sum(sink.table()["n"].to_pylist()) == 42
    assert len(seen) > 20, "windows were closed while the first source was silent"


@pytest.mark.parametrize(("idle_timeout", "told"), [(None, True), (5000, False)])
def test_a_split_that_never_brings_rows_is_told_of(
    idle_timeout: int | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    splits = {"busy": Sparse([at(i) for i in range(400)], clock), "silent": Sparse([None] * 400, clock)}
    context = StreamContext(checkpoint_interval=None, clock=clock)
    context.from_source(MultiSource(splits), event_time="t", idle_timeout=idle_timeout, name="s").sink(MemorySink())
    context.run()
    warnings = [r.getMessage() for r in caplog.records if "event time waits" in r.getMessage()]
    assert len(warnings) == told
    assert not told or "s: event time waits for 1 of 2 splits, which have brought no rows yet (silent" in warnings[0]


def test_splits_have_one_schema_and_there_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MultiSource({})
    other = pa.record_batch({"x": [1]})
    with pytest.raises(SchemaError, match="split 'b'"):
        MultiSource({"a": IterableSource([at(1)]), "b": IterableSource([other])})
