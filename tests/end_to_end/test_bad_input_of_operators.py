"""What goes wrong inside of a job: bad times, bad keys, drifting columns, functions that raise.

An error names the operator and the place in the input, and leaves the last checkpoint good: once its cause is mended,
the job goes on from there, and what it has published in the end is that of a job to which nothing happened.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datafusion import Expr, col, lit, udf
from datafusion import functions as f

from operators import (
    BadEventTimeError,
    DataStream,
    KeyedBatch,
    KeyedBatchProcess,
    KeyedProcess,
    SchemaError,
    StreamContext,
    UserFunctionError,
    ValueState,
)
from operators.sinks import MemorySink
from operators.testing import StreamHarness
from statebackend import MemoryStateBackend, MemoryStateSpace
from tests.support.streams import Ledger, LedgerSink, as_multiset

SCHEMA = pa.schema([("t", pa.timestamp("ms")), ("k", pa.float64()), ("v", pa.int64())])
BATCHES = 12
BAD_BATCH = 8
"""The batch in which the functions raise; a checkpoint is taken after every second batch before it."""
CLOCK_S = 1_700_000_000.0


def batch(number: int) -> pa.RecordBatch:
    """Five rows, values from 5 * number on; keys that are null, NaN, and zeros of both signs among them."""
    values = np.arange(5) + 5 * number
    keys = [1.0, math.nan, None, -0.0 if number % 2 else 0.0, 2.0]
    return pa.record_batch([pa.array(values * 20, pa.timestamp("ms")), pa.array(keys), pa.array(values)], schema=SCHEMA)


# -- functions that raise


class Trap:
    """Raises on values of the bad batch while it is armed."""

    armed = True

    def check(self, values: pa.Array) -> None:
        if self.armed and any(v is not None and v // 5 == BAD_BATCH for v in values.to_pylist()):
            raise ValueError("trapped")


TRAP = Trap()


def checked(values: pa.Array) -> pa.Array:
    TRAP.check(values)
    return values


CHECKED = udf(checked, [pa.int64()], pa.int64(), "volatile", name="checked")


def good(column: str = "v") -> Expr:
    return CHECKED(col(column)) >= lit(0)


def checked_batch(rows: pa.RecordBatch) -> pa.RecordBatch:
    TRAP.check(rows.column("v"))
    return rows


def checked_row(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield row
    TRAP.check(pa.array([row["v"]]))


async def checked_soon(rows: pa.RecordBatch) -> pa.RecordBatch:
    return checked_batch(rows)


def looked_up(keys: pa.RecordBatch) -> pa.RecordBatch:
    TRAP.check(keys.column("v"))
    return keys.append_column("word", pa.array([str(v) for v in keys.column("v").to_pylist()]))


class CountRows(KeyedProcess):
    """Counts the rows of a key; raises after it has counted and emitted."""

    schema = pa.schema([("k", pa.float64()), ("n", pa.int64())])
    n = ValueState[int](pa.int64())

    def process(self, row: Mapping[str, Any], context: Any) -> Iterator[Mapping[str, Any]]:
        context[self.n].value = (context[self.n].value or 0) + 1
        yield {"k": context.key[0], "n": context[self.n].value}
        TRAP.check(pa.array([row["v"]]))


class OnTimer(CountRows):
    """Emits on timers, a timer per row, which raise."""

    def process(self, row: Mapping[str, Any], context: Any) -> Iterator[Mapping[str, Any]]:
        context.set_timer(int(row["v"]) * 20)
        return iter(())

    def on_timer(self, time_ms: int, context: Any) -> Iterable[Mapping[str, Any]]:
        TRAP.check(pa.array([time_ms // 20]))
        return [{"k": context.key[0], "n": time_ms}]


class CountBatches(KeyedBatchProcess):
    """Counts the rows of every key; raises after it has given its answer."""

    schema = pa.schema([("n", pa.int64())])
    state = pa.schema([("count", pa.int64())])

    def process(self, batch: KeyedBatch) -> None:
        counts = np.asarray(batch.state.column("count").fill_null(0)) + np.bincount(batch.key_index)
        batch.put(pa.record_batch([pa.array(counts)], schema=self.state))
        batch.emit(pa.record_batch([pa.array(counts)], schema=self.schema))
        TRAP.check(batch.events.column("v"))


def other(stream: DataStream) -> DataStream:
    return stream.select(col("t").alias("u"), "k", col("v").alias("w"))


N = f.count(lit(1)).alias("n")
VERBS: dict[str, Callable[[DataStream], DataStream]] = {
    "filter": lambda s: s.filter(good()),
    "select": lambda s: s.select("k", CHECKED(col("v")).alias("c")),
    "with_column": lambda s: s.with_column("c", CHECKED(col("v"))),
    "filter of a changelog": lambda s: s.deduplicate("v").filter(good()),
    "split": lambda s: s.split(good=good())["good"],
    "map_batches": lambda s: s.map_batches(checked_batch),
    "flat_map": lambda s: s.flat_map(checked_row),
    "map_async": lambda s: s.map_async(checked_soon, capacity=2),
    "window, group": lambda s: s.window(CHECKED(col("v")).alias("c"), N, 200),
    "window, aggregate": lambda s: s.window("k", f.sum(CHECKED(col("v"))).alias("c"), 200),
    "cumulate_window": lambda s: s.cumulate_window("k", f.sum(CHECKED(col("v"))).alias("c"), 100, 200),
    "session_window, group": lambda s: s.session_window(CHECKED(col("v")).alias("c"), N, 30),
    "session_window, aggregate": lambda s: s.session_window("k", f.sum(CHECKED(col("v"))).alias("c"), 30),
    "count_window, group": lambda s: s.count_window((CHECKED(col("v")) % lit(3)).alias("c"), N, 4),
    "count_window, aggregate": lambda s: s.count_window("k", f.sum(CHECKED(col("v"))).alias("c"), 4),
    "aggregate": lambda s: s.aggregate((CHECKED(col("v")) % lit(3)).alias("c"), N),
    "process, key": lambda s: s.process((CHECKED(col("v")) % lit(3)).alias("k"), CountBatches()),
    "process, rows": lambda s: s.process("k", CountRows()),
    "process, batches": lambda s: s.process("k", CountBatches()),
    "process, timers": lambda s: s.process("k", OnTimer()),
    "join": lambda s: s.join(other(s).drop("u"), "k", filter=good("w")),
    "interval_join": lambda s: s.interval_join(other(s), "k", "full", before=150, after=150, filter=good("w")),
    "window_join": lambda s: s.window_join(other(s), 200, on="k", how="left", filter=good("w")),
    "lookup_join": lambda s: s.lookup_join(
        looked_up, "v", schema=pa.schema([("v", pa.int64()), ("word", pa.string())]), cache_rows=0
    ),
}


def life(space: MemoryStateSpace, ledger: Ledger, build: Callable[[DataStream], DataStream]) -> Any:
    """One run over all batches, with a checkpoint after every second one."""

    def read(start: int) -> Iterator[pa.RecordBatch]:
        for number in range(start, BATCHES):
            if number % 2 == 0:
                job.checkpoint()
            yield batch(number)

    state = MemoryStateBackend(space)
    context = StreamContext("bad", state=state, checkpoint_interval=None, clock=lambda: CLOCK_S)
    build(context.from_batches(read, SCHEMA, event_time="t", name="rows")).sink(LedgerSink(ledger), name="out")
    job = context.job()
    try:
        return job.run()
    finally:
        state.close()


@pytest.mark.parametrize("verb", VERBS)
def test_a_function_that_raises_is_named_and_once_it_is_mended_nothing_is_lost_or_twice(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, ledger, undisturbed = MemoryStateSpace(), Ledger(), Ledger()
    with pytest.raises(UserFunctionError) as caught:
        life(space, ledger, VERBS[verb])
    message = str(caught.value)
    assert caught.value.operator_id.startswith("rows")
    assert message.startswith(f"{caught.value.operator_id}: the user's function raised ValueError('trapped') at ")
    assert re.search(r"rows, batch \d+ of this run, which ends at batches \d+, rows \d+$|timer of \d+ ms$", message)
    assert caught.value.__cause__ is not None

    monkeypatch.setattr(TRAP, "armed", False)
    result = life(space, ledger, VERBS[verb])
    assert result.restored_from is not None
    life(MemoryStateSpace(), undisturbed, VERBS[verb])
    assert as_multiset(ledger.table()) == as_multiset(undisturbed.table())


SKIPPING: dict[str, Callable[[DataStream], DataStream]] = {
    "map_batches": lambda s: s.map_batches(checked_batch, on_error="skip"),
    "flat_map": lambda s: s.flat_map(checked_row, on_error="skip"),
    "map_async": lambda s: s.map_async(checked_soon, on_error="skip"),
    "process, rows": lambda s: s.process("k", CountRows(), on_error="skip"),
    "process, batches": lambda s: s.process("k", CountBatches(), on_error="skip"),
}


@pytest.mark.parametrize("verb", SKIPPING)
def test_rows_on_which_a_function_raises_are_set_aside_and_leave_no_trace(verb: str) -> None:
    """Neither in the state nor in the output, though the function had changed the one and begun the other."""

    def both(stream: DataStream) -> Mapping[str, DataStream]:
        result = SKIPPING[verb](stream)
        return {"out": result, "failed": result.failed_rows()}

    with StreamHarness(both, SCHEMA, event_time="t") as harness:
        for number in (BAD_BATCH - 1, BAD_BATCH, BAD_BATCH + 1):
            harness.push(batch(number))
        harness.finish()
        assert harness.output_table("failed")["v"].to_pylist() == batch(BAD_BATCH).column("v").to_pylist()
        out = harness.output_table("out")
        if "process" in verb:
            # Two batches were counted: each of the five keys once, then twice.
            assert sorted(out["n"].to_pylist()) == [1] * 5 + [2] * 5
        else:
            assert Counter(v // 5 for v in out["v"].to_pylist()) == {BAD_BATCH - 1: 5, BAD_BATCH + 1: 5}


# -- keys


@pytest.mark.parametrize(
    "build",
    [
        lambda s: s.window("k", N, 10_000).select("k", "n"),
        lambda s: s.session_window("k", N, 10_000).select("k", "n"),
        lambda s: s.count_window("k", N, 1_000),
        lambda s: s.aggregate("k", N, emit="final"),
        lambda s: s.deduplicate("k", emit="final").select("k", lit(BATCHES).alias("n")),
        lambda s: s.top_n(1, "k", col("v").sort(), emit="final").select("k", lit(BATCHES).alias("n")),
    ],
    ids=["window", "session_window", "count_window", "aggregate", "deduplicate", "top_n"],
)
def test_null_is_a_group_nan_is_one_and_both_zeros_are(build: Any) -> None:
    ledger = Ledger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRAP, "armed", False)
        life(MemoryStateSpace(), ledger, build)
    found = {repr(row["k"]).replace("-0.0", "0.0"): row["n"] for row in ledger.table().to_pylist()}
    assert found == dict.fromkeys(("1.0", "nan", "None", "0.0", "2.0"), BATCHES)
    assert ledger.table().num_rows == 5


def test_null_keys_match_nothing_in_joins_but_nan_and_both_zeros_do() -> None:
    ledger = Ledger()
    life(MemoryStateSpace(), ledger, lambda s: s.interval_join(other(s), "k", before=0, after=0))
    found = Counter(repr(key).replace("-0.0", "0.0") for key in ledger.table()["k"].to_pylist())
    assert found == dict.fromkeys(("1.0", "nan", "0.0", "2.0"), BATCHES)


# -- columns


@pytest.mark.parametrize(
    ("drifted", "found"),
    [
        (lambda b: b.set_column(2, "v", b.column("v").cast(pa.string())), "v: string"),
        (lambda b: b.select(["t", "k"]), "k: double$"),
        (lambda b: b.append_column("more", b.column("v")), "more: int64"),
    ],
    ids=["another type", "a column less", "a column more"],
)
def test_a_batch_of_other_columns_is_named_with_both_schemas(drifted: Any, found: str) -> None:
    context = StreamContext()
    batches = [batch(0), drifted(batch(1))]
    context.from_batches(lambda start: iter(batches[start:]), SCHEMA, event_time="t", name="rows").sink(MemorySink())
    with pytest.raises(SchemaError) as caught:
        context.run()
    assert "batch 1" in str(caught.value)
    assert "expected" in str(caught.value)
    assert "v: int64" in str(caught.value)
    assert re.search(found, str(caught.value), re.MULTILINE)


# -- times


def at(*times: int | None) -> pa.RecordBatch:
    return pa.record_batch(
        [pa.array(times, pa.timestamp("ms")), pa.nulls(len(times), pa.float64()), pa.array(range(len(times)))],
        schema=SCHEMA,
    )


DAY_MS = 86_400_000
FAR_MS = int(CLOCK_S * 1000) + 2 * DAY_MS


@pytest.mark.parametrize(("time", "why"), [(None, "is null"), (FAR_MS, "ahead of the clock"), (-(1 << 62), "long ago")])
def test_a_bad_time_is_an_error_or_set_aside_and_never_moves_event_time(time: int | None, why: str) -> None:
    def run(on_bad: str) -> tuple[pa.Table, pa.Table | None]:
        context = StreamContext(clock=lambda: CLOCK_S)
        rows, bad = MemorySink(), MemorySink()
        stream = context.from_batches(
            [at(10, time, 20), at(15, 30)], event_time="t", max_disorder=5, on_bad_event_time=on_bad, name="rows"
        )
        stream.window([], N, 10).sink(rows)
        if on_bad == "divert":
            stream.bad_rows().sink(bad)
        context.run()
        return rows.table(), bad.table() if on_bad == "divert" else None

    with pytest.raises(BadEventTimeError, match=f"rows: column 't' {'.*' if time else ''}{why}.*row 1 of the batch"):
        run("error")
    dropped, _ = run("drop")
    diverted, aside = run("divert")
    assert dropped["n"].to_pylist() == diverted["n"].to_pylist() == [2, 1, 1]
    assert aside is not None
    assert aside["v"].to_pylist() == [1]


def test_late_rows_are_found_at_every_operator_that_has_them() -> None:
    rows = [at(1_000), at(2_000), at(10)]
    verbs: list[Callable[[DataStream], DataStream]] = [
        lambda s: s.window("k", N, 100),
        lambda s: s.cumulate_window("k", N, 50, 100),
        lambda s: s.session_window("k", N, 100),
        lambda s: s.deduplicate("v", ttl=100, emit="upserts"),
        lambda s: s.top_n(1, "k", "v", window=100),
        lambda s: s.aggregate("v", N, ttl=100),
    ]
    for build in verbs:
        with StreamHarness(lambda s, build=build: build(s).late_rows(), SCHEMA, event_time="t") as harness:
            for one in rows:
                harness.push(one)
            harness.finish()
            assert harness.output_table()["t"].cast(pa.int64()).to_pylist() == [10]


def test_a_session_that_never_ends_is_one_row_of_state() -> None:
    with StreamHarness(lambda s: s.session_window("k", N, 100, name="s"), SCHEMA, event_time="t") as harness:
        for number in range(200):
            harness.push(at(number * 50))
            assert harness.state("s:sessions").num_rows == 1
        assert harness.output() == []
        assert harness.state("s:timers").num_rows < 10
        harness.finish()
        assert [row["n"] for row in harness.output()] == [200]
