"""The user's face and one run of a job: verbs, ids, checkpoints, recovery, failures, signals."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import DataFrame, Expr, col, functions, lit

from operators import (
    BadEventTimeError,
    DataStream,
    Job,
    JobMismatchError,
    JobOutcome,
    JobProgress,
    SchemaError,
    StreamContext,
    Upgrade,
    UserFunctionError,
)
from operators.sinks import MemorySink
from statebackend import (
    Checkpoint,
    FencedError,
    JobState,
    MemoryStateBackend,
    MemoryStateSpace,
    StorageUnavailableError,
    StoreSettings,
    open_backend,
    open_checkpoint,
)
from statebackend.inspect import read_store
from tests.support.streams import Ledger, LedgerSink, as_multiset, cut, events, one_shot

LENGTH, SLIDE = 1000, 400
SELECT = "count(1) AS n, sum(v) AS total, avg(x) AS mean"


class CrashError(Exception):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t.name for t in threading.enumerate() if t not in before and not t.daemon]
    assert not left, f"threads left behind: {left}"


def pipeline(context: StreamContext, batches: Any, schema: pa.Schema, ledger: Ledger, **options: Any) -> DataStream:
    stream = context.from_batches(batches, schema, event_time="t", max_disorder=300, **options)
    aggregates = [
        functions.count(lit(1)).alias("n"),
        functions.sum(col("v")).alias("total"),
        functions.avg(col("x")).alias("mean"),
    ]
    windows = stream.filter(col("j") > lit(0)).window(["k"], aggregates, LENGTH, SLIDE, name="w")
    windows.sink(LedgerSink(ledger), name="out")
    return windows


def expected_rows(table: pa.Table) -> Any:
    return as_multiset(one_shot(table.filter(pc.greater(table["j"], 0)), LENGTH, SLIDE, keys=["k"], select=SELECT))


# -- verbs


def run_verbs(table: pa.Table, build: Callable[[DataStream], DataStream]) -> pa.Table:
    context = StreamContext(checkpoint_interval=None)
    sink = MemorySink()
    stream = build(context.from_batches(cut(table, 1), table.schema, event_time="t"))
    stream.sink(sink)
    context.run()
    assert sink.table().schema.names == stream.schema.names
    assert sink.table().schema.types == stream.schema.types
    return sink.table()


VERBS: dict[str, tuple[Callable[[DataStream], DataStream], str]] = {
    "filter": (lambda s: s.filter(col("v") > lit(0), col("j") == lit(1)), "SELECT * FROM rows WHERE v > 0 AND j = 1"),
    "filter by text": (lambda s: s.filter("v > 0 OR k = 'a'"), "SELECT * FROM rows WHERE v > 0 OR k = 'a'"),
    "select": (lambda s: s.select("s", col("v") + lit(1), col("x").alias("y")), "SELECT s, v + 1, x AS y FROM rows"),
    "with_column": (lambda s: s.with_column("w", col("v") * lit(2)), "SELECT *, v * 2 AS w FROM rows"),
    "replace a column": (
        lambda s: s.with_column("v", col("v") * lit(2)),
        "SELECT t, k, j, v * 2 AS v, x, s FROM rows",
    ),
    "with_columns": (
        lambda s: s.with_columns((col("v") + lit(1)).alias("a"), b=functions.upper(col("s"))),
        "SELECT *, v + 1 AS a, upper(s) AS b FROM rows",
    ),
    "rename": (lambda s: s.with_column_renamed("v", "V"), 'SELECT t, k, j, v AS "V", x, s FROM rows'),
    "drop": (lambda s: s.drop("v", "x"), "SELECT t, k, j, s FROM rows"),
    "drop_columns": (lambda s: s.drop_columns(["v", "x"]), "SELECT t, k, j, s FROM rows"),
    "cast": (lambda s: s.cast({"j": pa.int64()}), "SELECT t, k, cast(j AS bigint) AS j, v, x, s FROM rows"),
    "chain": (
        lambda s: (
            s.filter(col("v") > lit(0))
            .with_column("V", col("v") + lit(1))
            .drop("x")
            .filter(col('"V"') > lit(100))
            .select("V", "k")
        ),
        'SELECT v + 1 AS "V", k FROM rows WHERE v > 99 AND v > 0',
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_does_what_datafusion_does_over_all_rows(verb: str) -> None:
    from datafusion import SessionContext

    table = events(2, 700)
    build, query = VERBS[verb]
    session = SessionContext()
    session.register_record_batches("rows", [table.to_batches()])
    expected = session.sql(query).to_arrow_table()
    found = run_verbs(table, build)
    assert found.num_columns == expected.num_columns
    assert [as_multiset(found.rename_columns(expected.schema.names))] == [as_multiset(expected)]


def test_a_chain_of_verbs_is_planned_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[int] = []
    execution_plan = DataFrame.execution_plan

    def counting(frame: DataFrame) -> Any:
        plans.append(1)
        return execution_plan(frame)

    table = events(2, 3000)
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(cut(table, 1, 10), table.schema)
    stream.filter(col("v") > lit(0)).with_column("w", col("v") + lit(1)).filter(col("w") > lit(7)).sink(MemorySink())
    monkeypatch.setattr(DataFrame, "execution_plan", counting)
    result = context.run()
    assert len(plans) == 1
    assert [i for i in result.operators if ":" in i] == ["batches:filter+with_columns+filter"]


def test_picking_and_renaming_columns_copies_nothing() -> None:
    table = events(2, 50)
    batch = table.to_batches()[0]
    context = StreamContext(checkpoint_interval=None)
    sink = MemorySink()
    stream = context.from_batches([batch])
    picked = stream.select("v", "k", "x").drop("k").with_column_renamed("v", "value")
    picked.select(col("x"), col("value").alias("y")).sink(sink)
    context.run()
    (found,) = sink.batches
    assert found.schema.names == ["x", "y"]
    assert [b.address for b in found["y"].buffers() if b] == [b.address for b in batch["v"].buffers() if b]


def test_a_stream_feeds_several_consumers_and_is_computed_once() -> None:
    table = events(4, 500)
    context = StreamContext(checkpoint_interval=None)
    shared = context.from_batches(cut(table, 3), table.schema, event_time="t").filter(col("v") > lit(0))
    sinks = [MemorySink(), MemorySink(), MemorySink()]
    shared.sink(sinks[0], name="all")
    shared.select("v").sink(sinks[1], name="some")
    shared.window(["k"], [functions.count(lit(1)).alias("n")], 500).sink(sinks[2], name="windows")
    result = context.run()
    kept = table.filter(pc.greater(table["v"], 0))
    assert result.operators["batches:filter"].rows_in == table.num_rows
    assert as_multiset(sinks[0].table()) == as_multiset(kept)
    assert as_multiset(sinks[1].table()) == as_multiset(kept.select(["v"]))
    expected = one_shot(kept, 500, 500, keys=["k"], select="count(1) AS n")
    assert as_multiset(sinks[2].table()) == as_multiset(expected)


def test_several_sources_run_in_one_job() -> None:
    tables = {"one": events(4, 300), "two": events(5, 900)}
    context = StreamContext(checkpoint_interval=0.01)
    sinks = {name: MemorySink() for name in tables}
    for name, table in tables.items():
        stream = context.from_batches(cut(table, 3), table.schema, event_time="t", name=name)
        stream.window(["k"], [functions.count(lit(1)).alias("n")], 500).sink(sinks[name])
    result = context.run()
    assert result.rows_read == 1200
    for name, table in tables.items():
        expected = one_shot(table, 500, 500, keys=["k"], select="count(1) AS n")
        assert as_multiset(sinks[name].table()) == as_multiset(expected)


def test_a_wrong_column_or_type_is_an_error_when_the_stream_is_built() -> None:
    table = events(1, 5)
    stream = StreamContext().from_batches(cut(table, 1), table.schema, event_time="t")
    for build in (
        lambda: stream.filter(col("nope") > lit(1)),
        lambda: stream.select("nope"),
        lambda: stream.select(col("nope")),
        lambda: stream.with_column("a", col("nope")),
        lambda: stream.drop("nope"),
        lambda: stream.with_column_renamed("nope", "a"),
        lambda: stream.cast({"nope": pa.int64()}),
        lambda: stream.write_parquet("out", partition_by=["nope"]),
    ):
        with pytest.raises(SchemaError, match=r"(?s)nope.*available columns: t, k, j, v, x, s"):
            build()
    with pytest.raises(SchemaError, match=r"filter.*non-boolean"):
        stream.filter(col("v") + lit(1))
    with pytest.raises(SchemaError, match="upper"):
        stream.select(functions.upper(col("t")))
    with pytest.raises(SchemaError, match="twice"):
        stream.select("v", col("x").alias("v"))


def test_what_would_be_wrong_batch_by_batch_is_refused() -> None:
    table = events(1, 5)
    stream = StreamContext().from_batches(cut(table, 1), table.schema)
    with pytest.raises(SchemaError, match="all rows at once"):
        stream.with_column("r", functions.row_number())
    with pytest.raises(SchemaError, match="with_columns"):
        stream.with_column("r", functions.sum(col("v")))
    with pytest.raises(SchemaError, match=r"now\(\) would be evaluated once"):
        stream.with_column("r", functions.now())
    stream.with_column("r", lit("now()"))


# -- ids


def test_inserting_a_stateless_step_changes_no_operator_id() -> None:
    def ids(*, extra: bool) -> list[str]:
        table = events(1, 100)
        context = StreamContext(checkpoint_interval=None)
        stream = context.from_batches(cut(table, 1), table.schema, event_time="t")
        if extra:
            stream = stream.filter(col("v") > lit(0)).with_column("z", lit(1))
        stream.window(["k"], [functions.count(lit(1)).alias("n")], 500).sink(MemorySink())
        return [i for i in context.run().operators if ":" not in i]

    assert ids(extra=False) == ids(extra=True) == ["batches", "batches.window-k-500", "batches.window-k-500.memory"]


def test_two_operators_of_one_id_are_refused_until_one_is_named() -> None:
    table = events(1, 5)
    context = StreamContext()
    stream = context.from_batches(cut(table, 1), table.schema, event_time="t")
    count = [functions.count(lit(1)).alias("n")]
    stream.window(["k"], count, 500)
    with pytest.raises(ValueError, match=r"batches\.window-k-500.*name="):
        stream.window(["k"], count, 500)
    stream.window(["k"], count, 500, name="other")
    with pytest.raises(ValueError, match="another name="):
        stream.window(["k"], count, 500, name="other")
    with pytest.raises(ValueError, match="letters"):
        stream.sink(MemorySink(), name="a/b")


def test_explain_shows_the_operators_and_the_columns() -> None:
    table = events(1, 5)
    context = StreamContext()
    stream = context.from_batches(cut(table, 1), table.schema, event_time="t", name="flights")
    text = stream.filter(col("v") > lit(0)).window(["k"], [functions.count(lit(1)).alias("n")], 500).explain()
    assert text.splitlines()[0].startswith("window flights.window-k-500: k, n over 500 ms")
    assert "  filter(v > Int64(0))" in text
    assert "    source flights" in text
    assert "window_start_time: timestamp[ms, tz=UTC]" in text


def test_explain_of_a_context_shows_every_sink_and_describes_an_operator_once() -> None:
    table = events(1, 5)
    context = StreamContext()
    stream = context.from_batches(cut(table, 1), table.schema, event_time="t", name="in")
    counts = stream.window(["k"], [functions.count(lit(1)).alias("n")], 500, allowed_lateness=20, name="counts")
    counts.sink(MemorySink(), name="all")
    counts.late_rows().sink(MemorySink(), name="late")
    assert context.explain().splitlines() == [
        "sink all (at least once)",
        "  window counts: k, n over 500 ms, updated by rows up to 20 ms late",
        "    | state counts: one row per group and pane of the last 520 ms of event time",
        "    source in",
        "sink late (at least once)",
        "  late rows of window counts: k, n over 500 ms, updated by rows up to 20 ms late (as above)",
    ]
    assert repr(counts).startswith("DataStream\nwindow counts")


def test_explain_says_of_every_operator_whether_its_state_can_grow_for_ever() -> None:
    table = events(1, 5)
    stream = StreamContext().from_batches(cut(table, 1), table.schema, event_time="t")
    total, values = functions.sum(col("v")).alias("n"), functions.array_agg(col("v")).alias("all")
    other = stream.select(col("k"), col("v").alias("w"))
    grows = {
        stream.session_window("k", total, 10): False,
        stream.session_window("k", values, 10, name="values"): True,
        stream.aggregate([], total): False,
        stream.aggregate([], values, name="all"): True,
        stream.aggregate("k", total): True,
        stream.aggregate("k", total, ttl=10, name="ttl"): False,
        stream.aggregate("k", values, ttl=10, name="values-ttl"): True,
        stream.join_broadcast(other, "k"): True,
        stream.window("k", values, 10): False,
    }
    for built, endless in grows.items():
        assert ("GROWS FOR EVER" in built.explain()) is endless, built


def test_a_context_without_a_sink_has_nothing_to_run() -> None:
    context = StreamContext()
    context.from_batches([pa.record_batch({"a": [1]})])
    with pytest.raises(ValueError, match="no stream ends in a sink"):
        context.job()


# -- recovery


STEPS = ["barrier", "drained", "prepared", "handed_over", "committed", "published"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("nth", [1, 3])
def test_a_crash_at_any_step_of_a_checkpoint_changes_no_output(step: str, nth: int) -> None:
    table = events(nth, 1500, disorder_ms=300)
    batches = cut(table, 9)
    space, ledger = MemoryStateSpace(), Ledger()
    seen = []

    def crash(name: str) -> None:
        seen.append(name)
        if name == step and seen.count(step) == nth:
            raise CrashError(step)

    for hook in (crash, None):
        context = StreamContext(state=MemoryStateBackend(space), checkpoint_interval=0.002, hook=hook)
        pipeline(context, lambda: iter(batches), table.schema, ledger)
        if hook is None:
            result = context.run()
            assert result.outcome is JobOutcome.FINISHED
            if nth > 1:
                assert result.restored_from is not None
                assert result.rows_read < table.num_rows
        else:
            with pytest.raises(CrashError):
                context.run()
        context._state.close()  # type: ignore[union-attr]
    assert as_multiset(ledger.table()) == expected_rows(table)


def test_a_trigger_cuts_checkpoints_at_exact_places_of_the_input() -> None:
    table = events(3, 1000)
    batches = [batch for batch in cut(table, 4) if batch.num_rows]
    steps: list[str] = []
    asked = 0

    def every_third_batch() -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    def hook(step: str) -> None:
        if step == "barrier":
            steps.append(f"{step} {asked}")

    context = StreamContext(checkpoint_interval=None, checkpoint_trigger=every_third_batch, hook=hook)
    pipeline(context, lambda: iter(batches), table.schema, Ledger())
    result = context.run()
    assert asked == len(batches) + 1  # also after the round that found the end
    assert steps[: asked // 3] == [f"barrier {n}" for n in range(3, asked + 1, 3)]
    assert len(result.checkpoints) == len(steps)


@pytest.mark.parametrize("state", ["memory", "lsm"])
@pytest.mark.parametrize("seed", range(5))
def test_a_source_that_dies_at_random_places_changes_no_output(seed: int, state: str, tmp_path: Path) -> None:
    rng = random.Random(seed)
    table = events(seed, 2000, disorder_ms=300)
    batches = cut(table, seed)
    space, ledger = MemoryStateSpace(), Ledger()
    deaths = [*sorted(rng.sample(range(len(batches)), 3)), len(batches)]
    restored = []
    for death in deaths:

        def read(start: int, death: int = death) -> Iterator[pa.RecordBatch]:
            for number in range(start, len(batches)):
                if number == death:
                    raise CrashError(str(death))
                time.sleep(0.001)
                yield batches[number]

        backend = MemoryStateBackend(space) if state == "memory" else open_backend(tmp_path / "state")
        context = StreamContext(state=backend, checkpoint_interval=0.004)
        pipeline(context, read, table.schema, ledger)
        if death < len(batches):
            with pytest.raises(CrashError):
                context.run()
            restored.append(backend.restored)
        else:
            result = context.run()
            assert result.restored_from is not None
            assert result.rows_read < table.num_rows
        backend.close()
    assert any(restored)
    assert as_multiset(ledger.table()) == expected_rows(table)


def test_the_settings_of_a_job_are_those_of_its_store(tmp_path: Path) -> None:
    settings = StoreSettings(retained_checkpoints=2)
    context = StreamContext(state=tmp_path / "state", settings=settings, checkpoint_trigger=lambda: True)
    context.from_batches([events(seed, 3) for seed in range(5)]).sink(MemorySink())
    context.run()
    assert len(read_store(str(tmp_path / "state")).latest.retained) == 2
    for state in (None, MemoryStateBackend()):
        with pytest.raises(ValueError, match="settings are of the store that is opened at state=URL"):
            StreamContext(state=state, settings=settings)


def test_a_stopped_job_goes_on_where_it_stopped() -> None:
    table = events(6, 1500, disorder_ms=300)
    batches = cut(table, 6)
    space, ledger = MemoryStateSpace(), Ledger()
    runs = 0
    while True:
        runs += 1
        backend = MemoryStateBackend(space)
        context = StreamContext(state=backend, checkpoint_interval=None)
        jobs: list[Job] = []

        def read(start: int, jobs: list[Job] = jobs) -> Iterator[pa.RecordBatch]:
            for number in range(start, len(batches)):
                if number == start + 7:
                    jobs[0].stop()
                yield batches[number]

        pipeline(context, read, table.schema, ledger)
        jobs.append(context.job())
        result = jobs[0].run()
        backend.close()
        if result.outcome is JobOutcome.FINISHED:
            break
        assert len(result.checkpoints) in (1, 2)
    assert runs > 3
    assert as_multiset(ledger.table()) == expected_rows(table)


def test_a_finished_job_that_is_run_again_does_nothing() -> None:
    table = events(6, 500, disorder_ms=300)
    batches = cut(table, 6)
    space, ledger = MemoryStateSpace(), Ledger()
    results = []
    publications = []
    for _ in range(3):
        backend = MemoryStateBackend(space)
        context = StreamContext(state=backend)
        pipeline(context, lambda: iter(batches), table.schema, ledger)
        results.append(context.run())
        publications.append(ledger.publications)
        backend.close()
        assert space.checkpoint is not None
        assert not space.checkpoint.job.committables
    assert [r.rows_read for r in results] == [500, 0, 0]
    assert results[2].operators["w"].rows_out == 0
    assert publications[0] == publications[1] == publications[2]
    assert as_multiset(ledger.table()) == expected_rows(table)


def test_the_live_panes_and_the_watermark_are_those_of_the_checkpoint() -> None:
    table = pa.table({"t": pa.array([0, 100, 5000, 50]).cast(pa.timestamp("ms")), "k": ["a", "b", "c", "late"]})
    batches = table.to_batches(max_chunksize=1)
    space = MemoryStateSpace()
    late, sink = MemorySink(), MemorySink()

    def run(count: int) -> None:
        backend = MemoryStateBackend(space)
        context = StreamContext(state=backend, checkpoint_interval=None)

        def read(start: int) -> Iterator[pa.RecordBatch]:
            for number in range(start, count):
                if number == count - 1 and count < len(batches):
                    job.stop()
                yield batches[number]

        stream = context.from_batches(read, table.schema, event_time="t")
        windows = stream.window(["k"], [functions.count(lit(1)).alias("n")], 1000)
        windows.sink(sink)
        windows.late_rows().sink(late)
        job = context.job()
        job.run()
        backend.close()

    run(2)
    assert sink.batches == []
    run(3)
    assert sorted(sink.table()["k"].to_pylist()) == ["a", "b"]
    run(4)
    assert late.table()["k"].to_pylist() == ["late"]
    assert sorted(sink.table()["k"].to_pylist()) == ["a", "b", "c"]


def test_the_state_of_another_job_is_refused_with_a_readable_difference() -> None:
    table = events(6, 100)
    space = MemoryStateSpace()

    def run(name: str, length: int, window: str = "w", **options: Any) -> None:
        backend = MemoryStateBackend(space)
        context = StreamContext(name, state=backend, **options)
        stream = context.from_batches(cut(table, 6), table.schema, event_time="t")
        stream.window(["k"], [functions.count(lit(1)).alias("n")], length, name=window).sink(MemorySink(), name="out")
        try:
            context.run()
        finally:
            backend.close()

    run("flights", 1000)
    with pytest.raises(JobMismatchError, match=r"(?s)job 'flights'.*this is job 'trains'.*name: 'flights' -> 'trains'"):
        run("trains", 1000)
    with pytest.raises(JobMismatchError, match=r"(?s)~ w.*length_ms: 1000 -> 2000"):
        run("flights", 2000)
    with pytest.raises(JobMismatchError, match=r"(?s)\+ renamed \(window\).*- w \(window\).*rename=\{'w': 'renamed'\}"):
        run("flights", 1000, window="renamed")
    run("flights", 1000, window="renamed", upgrade=Upgrade(rename={"w": "renamed"}))


def test_an_aggregate_over_another_column_is_another_job_and_another_filter_needs_consent() -> None:
    table = events(6, 100)
    space = MemoryStateSpace()

    def run(aggregate: Expr, predicate: Expr, **options: Any) -> None:
        backend = MemoryStateBackend(space)
        context = StreamContext("job", state=backend, **options)
        stream = context.from_batches(cut(table, 6), table.schema, event_time="t").filter(predicate)
        stream.window(["k"], [aggregate.alias("x")], 1000, name="w").sink(MemorySink(), name="out")
        try:
            context.run()
        finally:
            backend.close()

    numbers = [f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
    value = col(numbers[0])
    run(functions.sum(value), value > lit(0))
    with pytest.raises(JobMismatchError, match=r"aggregates\[0\]: .*sum.* -> .*sum"):
        run(functions.sum(value + lit(1)), value > lit(0))
    with pytest.raises(JobMismatchError, match=r"(?s)input\[1\]: 'filter.*change=\['w'\]"):
        run(functions.sum(value), value > lit(1))
    run(functions.sum(value), value > lit(1), upgrade=Upgrade(change=["w"]))


# -- checkpoints


class FlakyBackend(MemoryStateBackend):
    """Fails the checkpoints whose number is listed (from 1), with an error of choice."""

    def __init__(self, space: MemoryStateSpace, failing: Mapping[int, Exception]) -> None:
        super().__init__(space)
        self.failing = failing
        self.calls = 0

    def checkpoint(self, job: JobState, prepare: Sequence[Callable[[], None]] = ()) -> Future[Checkpoint]:
        self.calls += 1
        if self.calls in self.failing:
            failed: Future[Checkpoint] = Future()
            failed.set_exception(self.failing[self.calls])
            return failed
        return super().checkpoint(job, prepare)


def slow(batches: Sequence[pa.RecordBatch]) -> Callable[[int], Iterator[pa.RecordBatch]]:
    def read(start: int) -> Iterator[pa.RecordBatch]:
        for batch in batches[start:]:
            time.sleep(0.002)
            yield batch

    return read


def test_a_failed_checkpoint_comes_again_with_the_next_one() -> None:
    table = events(6, 1500, disorder_ms=300)
    ledger = Ledger()
    error = StorageUnavailableError("the disk is away")
    backend = FlakyBackend(MemoryStateSpace(), {2: error, 3: error, 5: OSError("no")})
    context = StreamContext(state=backend, checkpoint_interval=0.005)
    pipeline(context, slow(cut(table, 6, 20)), table.schema, ledger)
    result = context.run()
    backend.close()
    assert result.failed_checkpoints == 3
    assert as_multiset(ledger.table()) == expected_rows(table)


def test_too_many_failures_in_a_row_end_the_job() -> None:
    table = events(6, 1500)
    backend = FlakyBackend(
        MemoryStateSpace(), dict.fromkeys(range(3, 100), StorageUnavailableError("the disk is away"))
    )
    context = StreamContext(state=backend, checkpoint_interval=0.004, tolerable_checkpoint_failures=2)
    pipeline(context, slow(cut(table, 6, 20)), table.schema, Ledger())
    with pytest.raises(StorageUnavailableError, match="the disk is away"):
        context.run()
    assert backend.calls == 5
    backend.close()


def test_a_last_checkpoint_that_fails_for_a_while_is_tried_again() -> None:
    table = events(6, 300, disorder_ms=300)
    ledger = Ledger()
    backend = FlakyBackend(MemoryStateSpace(), {1: StorageUnavailableError("busy"), 2: StorageUnavailableError("busy")})
    context = StreamContext(state=backend, checkpoint_interval=None)
    pipeline(context, cut(table, 6), table.schema, ledger)
    assert context.run().failed_checkpoints == 2
    backend.close()
    assert as_multiset(ledger.table()) == expected_rows(table)


def test_a_fenced_job_stops_at_once_and_publishes_nothing_more() -> None:
    table = events(6, 1500, disorder_ms=300)
    batches = cut(table, 6, 20)
    space, ledger = MemoryStateSpace(), Ledger()
    backend = MemoryStateBackend(space)
    context = StreamContext(state=backend, checkpoint_interval=0.004)
    successor = []

    def read(start: int) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(batches[start:]):
            time.sleep(0.002)
            if number == len(batches) // 2:
                successor.append((MemoryStateBackend(space), set(ledger.pieces)))
            yield batch

    pipeline(context, read, table.schema, ledger)
    with pytest.raises(FencedError):
        context.run()
    backend.close()
    taken_over, before = successor[0]
    assert taken_over.restored is not None
    committed = {c["name"] for c in taken_over.restored.job.committables.get("out", ())}
    assert set(ledger.pieces) <= before | committed
    context = StreamContext(state=taken_over)
    pipeline(context, lambda: iter(batches), table.schema, ledger)
    context.run()
    taken_over.close()
    assert as_multiset(ledger.table()) == expected_rows(table)


def test_a_checkpoint_on_demand_is_taken_between_two_batches() -> None:
    table = events(6, 600, disorder_ms=300)
    batches = cut(table, 6)
    futures = []

    def read(start: int) -> Iterator[pa.RecordBatch]:
        for number in range(start, len(batches)):
            if number == 4:
                futures.append(job.checkpoint())
            if number == 8:
                taken.append(futures[0].result(timeout=10))
            yield batches[number]

    taken: list[Checkpoint] = []
    context = StreamContext(checkpoint_interval=None)
    pipeline(context, read, table.schema, Ledger())
    job = context.job()
    before = job.checkpoint()
    result = job.run()
    assert before.result().checkpoint_id < taken[0].checkpoint_id
    assert taken[0].job.plan["w"]["length_ms"] == LENGTH
    assert len(result.checkpoints) >= 2
    with pytest.raises(RuntimeError, match="has ended"):
        job.checkpoint().result()


def test_a_job_runs_once() -> None:
    table = events(6, 10)
    context = StreamContext()
    pipeline(context, cut(table, 6), table.schema, Ledger())
    job = context.job()
    job.run()
    with pytest.raises(RuntimeError, match="started before"):
        job.run()


def test_an_error_closes_everything_and_fails_open_requests() -> None:
    table = events(6, 100)
    sink = LedgerSink(Ledger())

    def read(start: int) -> Iterator[pa.RecordBatch]:
        yield table.to_batches()[0]
        requests.append(job.checkpoint())
        raise CrashError

    requests: list[Future[Checkpoint]] = []
    context = StreamContext(checkpoint_interval=None)
    context.from_batches(read, table.schema, event_time="t").sink(sink)
    job = context.job()
    with pytest.raises(CrashError):
        job.run()
    assert sink.closed >= 1
    with pytest.raises(RuntimeError, match="ended before the checkpoint"):
        requests[0].result(timeout=1)


def test_progress_and_result_tell_what_happened() -> None:
    table = events(6, 1000, disorder_ms=300)
    seen: list[JobProgress] = []
    context = StreamContext(checkpoint_interval=0.01)
    pipeline(context, slow(cut(table, 6)), table.schema, Ledger())
    begin = time.monotonic()
    result = context.run(seen.append)
    assert 1 <= len(seen) <= (time.monotonic() - begin) / 0.1 + 2
    assert seen[-1].rows_read == 1000
    assert seen[-1].watermarks["w"] == (1 << 63) - 1
    assert result.operators["batches:filter"].rows_out == result.operators["w"].rows_in < 1000
    assert result.operators["out"].rows_in == result.operators["w"].rows_out
    ids = [c.checkpoint_id for c in result.checkpoints]
    assert ids == sorted(set(ids))
    assert all(c.sync_ms >= 0 and c.duration_ms >= 0 for c in result.checkpoints)
    assert result.late_rows == 0


# -- bad event times


def dirty() -> pa.Table:
    far = int((time.time() + 10 * 86_400) * 1000)
    return pa.table({"t": pa.array([0, 10, None, far, 30]).cast(pa.timestamp("ms")), "v": [0, 1, 2, 3, 4]})


def test_a_bad_event_time_is_an_error_that_names_source_position_and_row() -> None:
    context = StreamContext(checkpoint_interval=None)
    context.from_batches(dirty().to_batches(max_chunksize=2), event_time="t", name="gate").sink(MemorySink())
    with pytest.raises(BadEventTimeError, match=r"gate: column 't' is null.*row 0 of .* ends at batches 2, rows 4"):
        context.run()
    table = dirty().slice(3)
    context = StreamContext(checkpoint_interval=None)
    context.from_batches(table.to_batches(), table.schema, event_time="t").sink(MemorySink())
    with pytest.raises(BadEventTimeError, match="more than 86400000 ms ahead of the clock"):
        context.run()


@pytest.mark.parametrize("policy", ["drop", "divert"])
def test_bad_event_times_can_be_left_out_or_looked_at(policy: str) -> None:
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(
        dirty().to_batches(max_chunksize=2), event_time="t", on_bad_event_time=policy, name="gate"
    )
    good, bad = MemorySink(), MemorySink()
    stream.window([], [functions.count(lit(1)).alias("n")], 1000).sink(good)
    if policy == "divert":
        stream.bad_rows().sink(bad)
    else:
        with pytest.raises(ValueError, match="divert"):
            stream.bad_rows()
    result = context.run()
    assert good.table()["n"].to_pylist() == [3]
    assert result.operators["gate"].side_rows == 2
    if policy == "divert":
        assert bad.table()["v"].to_pylist() == [2, 3]


def test_a_missing_or_wrong_event_time_column_is_refused_when_the_source_is_read() -> None:
    table = events(1, 5)
    with pytest.raises(SchemaError, match=r"'when'.*available: t, k, j, v, x, s"):
        StreamContext().from_batches(cut(table, 1), table.schema, event_time="when")
    with pytest.raises(SchemaError, match=r"'v'.*expected a timestamp or a date, found int64"):
        StreamContext().from_batches(cut(table, 1), table.schema, event_time="v")
    with pytest.raises(ValueError, match="ignore"):
        StreamContext().from_batches(cut(table, 1), table.schema, event_time="t", on_bad_event_time="ignore")


def test_an_empty_input_gives_an_empty_output() -> None:
    table = events(1, 5).slice(0, 0)
    context = StreamContext()
    ledger = Ledger()
    pipeline(context, [], table.schema, ledger)
    result = context.run()
    assert result.outcome is JobOutcome.FINISHED
    assert ledger.pieces == {}


# -- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["waiting source", "sink"])
def test_the_first_signal_stops_gracefully_and_the_job_goes_on_later(number: signal.Signals, where: str) -> None:
    table = events(6, 1200, disorder_ms=300)
    batches = cut(table, 6)
    space, ledger = MemoryStateSpace(), Ledger()
    sent = []
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def send() -> None:
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), number)

    def read(start: int) -> Iterator[pa.RecordBatch]:
        for at in range(start, len(batches)):
            if at == len(batches) // 2 and where == "waiting source" and not sent:
                send()
                time.sleep(30)
            yield batches[at]

    class Signalling(LedgerSink):
        def write(self, batch: pa.RecordBatch) -> None:
            super().write(batch)
            if where == "sink":
                send()

    outcomes = []
    for _ in range(2):
        backend = MemoryStateBackend(space)
        context = StreamContext(state=backend, checkpoint_interval=None)
        windows = pipeline(context, read, table.schema, ledger)
        windows.sink(Signalling(Ledger()), name="signal")
        begin = time.monotonic()
        outcomes.append(context.run().outcome)
        assert time.monotonic() - begin < 10
        backend.close()
    assert outcomes == [JobOutcome.STOPPED, JobOutcome.FINISHED]
    assert as_multiset(ledger.table()) == expected_rows(table)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_job_that_is_stopped_keeps_its_last_checkpoint_as_a_savepoint(tmp_path: Path) -> None:
    table = events(6, 300)
    state = tmp_path / "state"

    def read(start: int) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(cut(table, 6)[start:]):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    context = StreamContext(state=state, checkpoint_interval=None, stop_with_savepoint="evening")
    pipeline(context, read, table.schema, Ledger())
    result = context.run()
    assert (result.outcome, result.savepoint) == (JobOutcome.STOPPED, "evening")
    with open_checkpoint(state, savepoint="evening") as kept:
        assert kept.checkpoint.checkpoint_id == result.checkpoints[-1].checkpoint_id
    again = StreamContext(state=state, checkpoint_interval=None, stop_with_savepoint="evening")
    pipeline(again, read, table.schema, Ledger())
    with pytest.raises(ValueError, match="there is a savepoint 'evening' already"):
        again.run()
    last = StreamContext(state=state, checkpoint_interval=None)
    pipeline(last, lambda: iter(cut(table, 6)), table.schema, Ledger())
    job = last.job()
    job.stop(savepoint="night")
    assert job.run().savepoint == "night"
    memory = StreamContext(stop_with_savepoint="never")
    pipeline(memory, read, table.schema, Ledger())
    with pytest.raises(ValueError, match="only a job whose state has a URL"):
        memory.job()


def test_the_second_signal_aborts_without_a_checkpoint() -> None:
    table = events(6, 300)
    space = MemoryStateSpace()
    backend = MemoryStateBackend(space)
    context = StreamContext(state=backend, checkpoint_interval=None)

    class Signalling(LedgerSink):
        def write(self, batch: pa.RecordBatch) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)

    context.from_batches(cut(table, 6), table.schema).sink(Signalling(Ledger()))
    with pytest.raises(KeyboardInterrupt):
        context.run()
    backend.close()
    assert space.checkpoint is None


def test_a_keyboard_interrupt_that_datafusion_wrapped_is_one_again() -> None:
    from datafusion import udf

    def interrupted(values: pa.Array) -> pa.Array:
        if len(values) > 3:
            raise KeyboardInterrupt
        return values

    function = udf(interrupted, [pa.int64()], pa.int64(), "immutable", "interrupted")
    table = events(6, 300)
    context = StreamContext(checkpoint_interval=None, handle_signals=False)
    context.from_batches(cut(table, 6), table.schema).with_column("w", function(col("v"))).sink(MemorySink())
    with pytest.raises(KeyboardInterrupt):
        context.run()


def test_an_error_of_a_sink_names_it() -> None:
    class Broken(MemorySink):
        def write(self, batch: pa.RecordBatch) -> None:
            raise RuntimeError("no paper")

    table = events(6, 30)
    context = StreamContext(checkpoint_interval=None)
    context.from_batches(cut(table, 6), table.schema, name="gate").sink(Broken(), name="printer")
    with pytest.raises(UserFunctionError, match=r"printer.*no paper.*gate, batch 1"):
        context.run()
