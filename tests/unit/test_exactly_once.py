"""The conformance kit: it finds what it is to find, and every source and sink of the package passes it."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import StreamContext
from operators.sinks import (
    ArrowSink,
    CallbackSink,
    CsvSink,
    ImmediateCallbackSink,
    JsonSink,
    MemorySink,
    ParquetSink,
    Prepared,
    SinkContext,
)
from operators.sources import (
    ArrowSource,
    CsvSource,
    Follow,
    IterableSource,
    JsonSource,
    MultiSource,
    ParquetSource,
    Source,
    SourceBatch,
)
from operators.testing import ExactlyOnceError, SourceContractError, check_exactly_once, check_source, ends_after
from tests.support.streams import Ledger, LedgerSink

SCHEMA = pa.schema([("id", pa.int64()), ("t", pa.timestamp("ms")), ("word", pa.string())])


def rows(start: int, count: int) -> pa.RecordBatch:
    ids = range(start, start + count)
    words = [[None, "a", "", "long " * 5][i % 4] for i in ids]
    return pa.record_batch([pa.array(ids), pa.array([i * 100 for i in ids], pa.timestamp("ms")), words], schema=SCHEMA)


BATCHES = [rows(10 * n, 10) for n in range(4)]


@pytest.fixture
def memory() -> Iterator[Callable[[Path], str]]:
    """URLs in memory, by trial; what lies on disk is synced all the time."""
    root = f"/{uuid.uuid4().hex}"
    yield lambda place: f"memory:/{root}/{place.name}/out"
    fs = fsspec.filesystem("memory")
    if fs.exists(root):
        fs.rm(root, recursive=True)


# --- every sink --------------------------------------------------------------------------------------------------

SINK_STEPS = ("stage", "staged", "committed", "publish")
"""Those at which a sink acts."""

SINKS = {
    "parquet": lambda out: ParquetSink(out, ["word"], roll_rows=1),
    "parquet, on disk": lambda out: ParquetSink(out, roll_rows=1),
    "csv": lambda out: CsvSink(out, roll_rows=1),
    "json": lambda out: JsonSink(out, roll_rows=1, compression="gzip"),
    "arrow": lambda out: ArrowSink(out, ["word"], roll_rows=1),
    "arrow stream": lambda out: ArrowSink(out, roll_rows=1, stream=True),
    "several rolls in one": lambda out: ParquetSink(out, roll_rows=25),
}


@pytest.mark.parametrize("kind", SINKS)
def test_every_file_sink_is_exactly_once(kind: str, memory: Callable[[Path], str]) -> None:
    def pipeline(context: StreamContext, place: Path) -> None:
        out = place / "out" if kind == "parquet, on disk" else memory(place)
        context.from_batches(BATCHES, name="in").sink(SINKS[kind](out), name="out")

    every = kind == "parquet"
    report = check_exactly_once(pipeline, times_per_step=1, steps=None if every else SINK_STEPS)
    assert report.rows == {"out": 40}
    assert report.missed == []
    if not every:
        return
    assert {"poll", "barrier", "stage", "staged", "committed", "publish", "published"} <= {s for s, _ in report.killed}
    assert "killed at: poll" in str(report)


def test_it_is_exactly_once_with_windows_over_a_real_store(memory: Callable[[Path], str]) -> None:
    def pipeline(context: StreamContext, place: Path) -> None:
        stream = context.from_batches(BATCHES, name="in", event_time="t")
        counts = stream.window("word", f.count(lit(1)).alias("n"), 1_000)
        counts.write_parquet(memory(place) + "/counts", name="counts", roll_rows=1)
        stream.filter(col("word") == lit("a")).write_csv(memory(place) + "/a", name="a", roll_rows=1)

    report = check_exactly_once(
        pipeline,
        times_per_step=1,
        steps=("poll", "handed_over", "committed", "publish"),
        state=lambda place: f"{memory(place)}/state",
        checkpoint_every=3,
    )
    assert report.rows == {"a": 10, "counts": 16}


def test_a_callback_whose_callee_drops_names_it_has_seen_is_exactly_once() -> None:
    seen: dict[tuple[str, int, int], pa.RecordBatch] = {}

    def pipeline(context: StreamContext, place: Path) -> None:
        def call(batch: pa.RecordBatch, checkpoint_id: int, sequence: int) -> None:
            seen[place.name, checkpoint_id, sequence] = batch

        context.from_batches(BATCHES, name="in").sink(CallbackSink(call), name="out")

    def read(place: Path) -> pa.Table:
        return pa.Table.from_batches([b for (name, *_), b in seen.items() if name == place.name], SCHEMA)

    assert check_exactly_once(pipeline, read, times_per_step=1).rows == {"out": 40}


# --- every source ------------------------------------------------------------------------------------------------


def parquet(root: Path) -> None:
    for number, batch in enumerate(BATCHES):
        pq.write_table(pa.Table.from_batches([batch]), root / f"{number}.parquet", row_group_size=5)


def csv(root: Path) -> None:
    pacsv.write_csv(pa.Table.from_batches(BATCHES), root / "a.csv")


def json_lines(root: Path) -> None:
    rows = pa.Table.from_batches(BATCHES).select(["id", "word"]).to_pylist()
    with gzip.open(root / "a.json.gz", "wt") as out:
        out.writelines(f"{json.dumps(row)}\n" for row in rows)


def arrow(root: Path) -> None:
    for suffix, new in (("arrow", pa.ipc.new_file), ("arrows", pa.ipc.new_stream)):
        with new(root / f"a.{suffix}", SCHEMA) as writer:
            for batch in BATCHES:
                writer.write_batch(batch)


def nothing(root: Path) -> None:
    pass


SOURCES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Source], int]] = {
    "parquet": (parquet, lambda root: ParquetSource(root, batch_rows=5), 40),
    "csv": (csv, lambda root: CsvSource(root, block_bytes=300), 40),
    "json": (json_lines, lambda root: JsonSource(root, block_bytes=300), 40),
    "arrow": (arrow, lambda root: ArrowSource(root, batch_rows=20), 80),
    "batches": (nothing, lambda _: IterableSource(BATCHES), 40),
    "splits": (parquet, lambda root: MultiSource({n: ParquetSource(root, batch_rows=5) for n in "ab"}), 80),
    **{
        f"a directory that is followed by {order}": (
            parquet,
            lambda root, o=order: ends_after(
                ParquetSource(root, batch_rows=5, follow=Follow(order=o, poll_seconds=0.001)), 40
            ),
            40,
        )
        for order in ("name", "time")
    },
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_is_exactly_once(kind: str, tmp_path: Path) -> None:
    write, make, count = SOURCES[kind]
    write(tmp_path)
    assert check_source(lambda: make(tmp_path), places=4) == count
    ledgers: dict[str, Ledger] = {}

    def pipeline(context: StreamContext, place: Path) -> None:
        source = context.from_source(make(tmp_path), name="in", max_rows_per_second=1e6)
        source.sink(LedgerSink(ledgers.setdefault(place.name, Ledger())), name="out")

    def read(place: Path) -> pa.Table:
        pieces = ledgers[place.name].pieces
        return ledgers[place.name].table() if pieces else SCHEMA.empty_table()

    steps = ("poll", "barrier", "committed")  # those at which a source is asked, and its position taken
    assert check_exactly_once(pipeline, read, times_per_step=1, steps=steps).rows == {"out": count}


class Shifting(IterableSource):
    """Breaks a rule of the protocol."""

    def __init__(self, rule: str) -> None:
        super().__init__(BATCHES)
        self.rule = rule

    def open(self, position: Any) -> None:
        super().open(None if self.rule == "begins anew" else position and {**position, "rows": len(position["rows"])})

    def poll(self) -> SourceBatch | None:
        item = super().poll()
        if item is None:
            return None
        rows = item.position["rows"]
        kept = {"holds a set": {1}, "begins anew": rows, "is not what msgpack carries": {1: rows}}[self.rule]
        return SourceBatch(item.batch, {**item.position, "rows": kept})


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("holds a set", "a position holds a set"),
        ("is not what msgpack carries", "a position has the key 1"),
        ("begins anew", "expected 30 rows, found 40"),
    ],
)
def test_a_source_that_breaks_a_rule_is_found_out(rule: str, found: str) -> None:
    with pytest.raises(SourceContractError, match=found):
        check_source(lambda: Shifting(rule))


# --- what it finds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "immediate callback"])
def test_a_sink_that_is_at_least_once_is_found_out(kind: str) -> None:
    places: dict[str, Any] = {}

    def pipeline(context: StreamContext, place: Path) -> None:
        sink = places.setdefault(place.name, MemorySink())
        batches: Any = ImmediateCallbackSink(sink.write) if kind != "memory" else sink
        context.from_batches(BATCHES, SCHEMA, name="in").sink(batches, name="out")
        sink.open(SinkContext("out", SCHEMA, None, "", ""), ())  # type: ignore[arg-type]

    with pytest.raises(ExactlyOnceError, match=r"killed at .*[1-9]0 rows too many.*published 2 times instead of 1"):
        check_exactly_once(pipeline, lambda place: places[place.name].table(), times_per_step=2)


class Careless(LedgerSink):
    """Breaks one rule of the protocol."""

    def __init__(self, ledger: Ledger, rule: str) -> None:
        super().__init__(ledger)
        self.rule = rule

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        super().open(context, [] if self.rule == "forgets to publish what was committed" else committables)

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:
        prepared = super().prepare(checkpoint_id, final=final)
        if self.rule == "publishes before the commit":
            self.publish(prepared.committables)
        return prepared

    def publish(self, committables: Sequence[Any]) -> None:
        if self.rule == "publishes under a new name each time":
            committables = [{**c, "name": f"{c['name']}-{self.ledger.publications}"} for c in committables]
        super().publish(committables)


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("forgets to publish what was committed", "missing"),
        ("publishes before the commit", "too many"),
        ("publishes under a new name each time", "too many"),
    ],
)
def test_a_sink_that_breaks_a_rule_is_found_out(rule: str, found: str) -> None:
    ledgers: dict[str, Ledger] = {}

    def pipeline(context: StreamContext, place: Path) -> None:
        sink = Careless(ledgers.setdefault(place.name, Ledger()), rule)
        context.from_batches(BATCHES, name="in").sink(sink, name="out")

    def read(place: Path) -> pa.Table:
        ledger = ledgers[place.name]
        return ledger.table() if ledger.pieces else SCHEMA.empty_table()

    with pytest.raises(ExactlyOnceError, match=rf"[1-9]\d* (rows )?{found}"):
        check_exactly_once(pipeline, read)


def test_a_pipeline_that_publishes_nothing_proves_nothing() -> None:
    with pytest.raises(ValueError, match="published nothing"):
        check_exactly_once(lambda context, place: context.from_batches([], SCHEMA).write_parquet(place / "out"))


def test_a_sink_that_cannot_tell_what_it_published_needs_a_reader() -> None:
    with pytest.raises(TypeError, match="pass read="):
        check_exactly_once(lambda context, _: context.from_batches(BATCHES).sink(MemorySink()))
