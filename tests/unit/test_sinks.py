"""Sinks: every row once, whatever crashes; nothing visible that is not committed."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import errno
import io
import itertools
import json
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from operators import StreamContext
from operators.errors import OutputVanishedError, SchemaError, SinkOccupiedError, UserFunctionError
from operators.sinks import (
    CallbackSink,
    Guarantee,
    ImmediateCallbackSink,
    MemorySink,
    ParquetSink,
    Prepared,
    PrintSink,
    Sink,
    SinkContext,
    published_rolls,
)
from operators.sinks.files import LocalOutputFiles, OutputFiles, output_files
from statebackend import FencedError, JobState, MemoryStateBackend, MemoryStateSpace, open_backend

SCHEMA = pa.schema([("id", pa.int64()), ("origin", pa.string()), ("delay", pa.float64())])
ORIGINS = ["EWR", "JFK", "LGA", None]


def rows(start: int, count: int) -> pa.RecordBatch:
    ids = range(start, start + count)
    columns = [list(ids), [ORIGINS[i % 4] for i in ids], [i / 4 for i in ids]]
    return pa.RecordBatch.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


OPENED: list[Any] = []
"""Backends of jobs that crashed are closed at the end of the test; closing commits nothing."""


@pytest.fixture(autouse=True)
def close_backends() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Job:
    """One opening of a job with one source of numbers and one sink; checkpoints as a coordinator does."""

    def __init__(self, state: MemoryStateSpace | str, sink: Sink, operator_id: str = "out", schema: pa.Schema = SCHEMA):
        self.backend: Any = MemoryStateBackend(state) if isinstance(state, MemoryStateSpace) else open_backend(state)
        OPENED.append(self.backend)
        restored = self.backend.restored
        self.sink = sink
        self.operator_id = operator_id
        self.position = restored.job.sources["in"] if restored else 0
        self.checkpoint_id = restored.checkpoint_id if restored else 0
        committables = list(restored.job.committables.get(operator_id, ())) if restored else []
        store_id = str(self.backend.store_id)
        sink.open(SinkContext(operator_id, schema, self.backend, store_id, uuid.uuid4().hex), committables)

    def write(self, count: int, size: int = 10) -> None:
        for start in range(self.position, self.position + count, size):
            self.sink.write(rows(start, min(size, self.position + count - start)))
        self.position += count

    def prepare(self, *, final: bool = False) -> Prepared:
        self.checkpoint_id += 1
        prepared = self.sink.prepare(self.checkpoint_id, final=final)
        assert msgpack.unpackb(msgpack.packb(list(prepared.committables))) == list(prepared.committables)
        return prepared

    def commit(self, prepared: Prepared) -> None:
        state = JobState(sources={"in": self.position}, committables={self.operator_id: list(prepared.committables)})
        self.backend.checkpoint(state, [prepared.stage] if prepared.stage else []).result(30)

    def checkpoint(self, *, final: bool = False) -> None:
        prepared = self.prepare(final=final)
        self.commit(prepared)
        self.sink.publish(prepared.committables)

    def close(self) -> None:
        self.sink.close()
        self.backend.close()


def visible(path: str | Path) -> list[str]:
    """Files that a reader meets who passes over names that begin with _ or a dot."""
    fs, root = fsspec.core.url_to_fs(str(path))
    names = [os.path.relpath(p, root) for p in fs.find(root)] if fs.exists(root) else []
    return sorted(n for n in names if not any(part.startswith(("_", ".")) for part in n.split("/")))


def ids_in(path: str | Path, names: Sequence[str] | None = None) -> list[int]:
    fs, root = fsspec.core.url_to_fs(str(path))
    found: list[int] = []
    for name in visible(path) if names is None else names:
        with fs.open(f"{root}/{name}", "rb") as f:
            found += pq.read_table(f, columns=["id"]).column("id").to_pylist()
    return sorted(found)


def staged(path: str | Path) -> list[str]:
    fs, root = fsspec.core.url_to_fs(str(path))
    return sorted(fs.find(f"{root}/_staging")) if fs.exists(f"{root}/_staging") else []


def logged(path: str | Path) -> list[str]:
    return sorted(f.name for roll in published_rolls(path) for f in roll.files)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- Parquet: rolling --------------------------------------------------------------------------------------------


def test_rows_wait_until_there_are_enough_of_them(out: Path) -> None:
    job = Job(MemoryStateSpace(), ParquetSink(out, roll_rows=100, clock=Clock()))
    job.write(60)
    job.checkpoint()
    assert visible(out) == []
    job.write(60)
    job.checkpoint()
    assert ids_in(out) == list(range(120))
    job.write(5)
    job.checkpoint(final=True)
    assert ids_in(out) == list(range(125))
    job.checkpoint(final=True)
    assert len(visible(out)) == 2
    assert staged(out) == []
    job.close()


def test_rows_wait_no_longer_than_they_may(out: Path) -> None:
    clock = Clock()
    job = Job(MemoryStateSpace(), ParquetSink(out, roll_seconds=60.0, clock=clock))
    clock.now = 1000.0
    job.write(10)
    clock.now = 1059.9
    job.checkpoint()
    assert visible(out) == []
    clock.now = 1060.0
    job.checkpoint()
    assert ids_in(out) == list(range(10))
    job.close()


def test_nothing_is_visible_before_the_checkpoint_is_committed(out: Path) -> None:
    job = Job(MemoryStateSpace(), ParquetSink(out, roll_rows=1))
    job.write(40)
    assert visible(out) == []
    prepared = job.prepare()
    assert staged(out) == []
    assert prepared.stage is not None
    prepared.stage()
    assert staged(out)
    assert visible(out) == []
    job.commit(prepared)
    assert visible(out) == []
    job.sink.publish(prepared.committables)
    assert ids_in(out) == list(range(40))
    job.close()


def test_rows_that_wait_survive_a_crash_in_the_state(out: Path) -> None:
    space = MemoryStateSpace()
    first = Job(space, ParquetSink(out))
    for _ in range(3):
        first.write(30, size=7)
        first.checkpoint()
    first.write(50)  # lost with the process, written again by the source
    second = Job(space, ParquetSink(out))
    assert second.position == 90
    second.write(20)
    second.checkpoint(final=True)
    assert ids_in(out) == list(range(110))
    second.close()


def test_rows_survive_a_crash_in_the_real_store_too(out: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "state")
    for step in range(4):
        job = Job(url, ParquetSink(out, ["origin"], roll_rows=45))
        assert job.position == 60 * step
        for _ in range(3):
            job.write(20)
            job.checkpoint()
        job.write(7)
        job.backend.close()
    job = Job(url, ParquetSink(out, ["origin"], roll_rows=45))
    job.checkpoint(final=True)
    assert ids_in(out) == list(range(240))
    assert logged(out) == visible(out)
    job.close()


def test_a_failed_checkpoint_leaves_its_rows_to_the_next(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(MemoryStateSpace(), ParquetSink(out, ["origin"], roll_rows=1))
    job.write(10)
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        prepared = job.prepare()
        with pytest.raises(OSError, match="No space left"):
            job.commit(prepared)
        job.write(10)
        with pytest.raises(OSError, match="No space left"):
            job.commit(job.prepare())
    assert visible(out) == []
    job.write(10)
    prepared = job.prepare()
    assert [c["rows"] for c in prepared.committables] == [10, 10, 10]
    job.commit(prepared)
    job.sink.publish(prepared.committables)
    assert ids_in(out) == list(range(30))
    assert job.prepare().committables == []
    job.close()


def test_a_committable_is_named_until_it_is_known_to_be_published(out: Path) -> None:
    job = Job(MemoryStateSpace(), ParquetSink(out, roll_rows=1))
    job.write(10)
    first = job.prepare()
    job.commit(first)
    job.write(10)
    second = job.prepare()
    assert [c["rows"] for c in second.committables] == [10, 10]
    job.sink.publish(first.committables)
    job.commit(second)
    third = job.prepare()
    assert [c["rows"] for c in third.committables] == [10]
    assert third.stage is None
    job.sink.publish(second.committables)
    assert ids_in(out) == list(range(20))
    job.close()


def test_preparing_takes_less_than_a_millisecond(out: Path) -> None:
    job = Job(MemoryStateSpace(), ParquetSink(out, ["origin"], roll_rows=400_000))
    batch = rows(0, 64_000)
    took = []
    for _ in range(21):
        for _ in range(3):
            job.sink.write(batch)
        started = time.perf_counter()
        prepared = job.sink.prepare(1, final=False)
        took.append(time.perf_counter() - started)
        if prepared.stage:
            job.sink.publish([])
    assert sorted(took)[len(took) // 2] < 0.001
    job.close()


# --- Parquet: partitions -----------------------------------------------------------------------------------------


def test_partitions_are_hive_directories_without_their_columns(out: Path) -> None:
    job = Job(MemoryStateSpace(), ParquetSink(out, ["origin"]))
    job.write(100, size=9)
    job.checkpoint(final=True)
    assert sorted({n.split("/")[0] for n in visible(out)}) == [
        "origin=EWR",
        "origin=JFK",
        "origin=LGA",
        "origin=__HIVE_DEFAULT_PARTITION__",
    ]
    assert pq.read_schema(out / visible(out)[0]).names == ["id", "delay"]
    assert pq.read_table(out / visible(out)[0]).column("id").to_pylist() == list(range(0, 100, 4))
    table = ds.dataset(
        out, partitioning=ds.partitioning(pa.schema([("origin", pa.string())]), flavor="hive")
    ).to_table()
    assert table.select(SCHEMA.names).sort_by("id").to_pylist() == rows(0, 100).to_pylist()
    job.close()


def test_partition_values_of_every_type_come_back(out: Path) -> None:
    texts = ["a/b", "x=y", "50%", "..", "two words", "ü", "a:b", "", None]
    n = len(texts)
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("text", pa.string()),
            ("day", pa.date32()),
            ("flag", pa.bool_()),
            ("number", pa.int16()),
            ("price", pa.decimal128(9, 2)),
            ("word", pa.dictionary(pa.int32(), pa.string())),
        ]
    )
    columns = [
        list(range(n)),
        texts,
        [None if i == 4 else dt.date(2013, 1, 1 + i % 2) for i in range(n)],
        [i % 2 == 0 for i in range(n)],
        [-i for i in range(n)],
        [decimal.Decimal(i) / 4 for i in range(n)],
        texts,
    ]
    batch = pa.RecordBatch.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
    )
    by = ["text", "day", "flag", "number", "price", "word"]
    job = Job(MemoryStateSpace(), ParquetSink(out, by), schema=schema)
    job.sink.write(batch)
    job.sink.write(batch.slice(3))
    job.checkpoint(final=True)
    # Arrow reads no decimals nor dictionaries from directory names.
    read_as = pa.schema([pa.field(c, pa.string()) if c in ("word", "price") else schema.field(c) for c in by])
    read = ds.dataset(out, partitioning=ds.partitioning(read_as, flavor="hive")).to_table()
    expected = [{**row, "price": str(row["price"])} for row in batch.to_pylist() + batch.slice(3).to_pylist()]
    key = repr
    assert sorted(read.select(schema.names).to_pylist(), key=key) == sorted(expected, key=key)
    job.close()


def test_columns_that_cannot_partition_are_refused(out: Path) -> None:
    for by, reason in [(["nothing"], "nothing"), (["delay"], "double"), ([*SCHEMA.names[:2], "delay"], "delay")]:
        with pytest.raises(SchemaError, match=reason):
            Job(MemoryStateSpace(), ParquetSink(out, by))
    whole = pa.schema([("a", pa.int64()), ("b", pa.string())])
    with pytest.raises(SchemaError, match="no column is left"):
        Job(MemoryStateSpace(), ParquetSink(out, ["a", "b"]), schema=whole)
    with pytest.raises(TypeError, match="origin"):
        ParquetSink(out, "origin")
    with pytest.raises(SchemaError, match="Parquet cannot hold"):
        Job(MemoryStateSpace(), ParquetSink(out), schema=pa.schema([("i", pa.month_day_nano_interval())]))


@pytest.mark.parametrize("options", [{"roll_rows": 0}, {"roll_seconds": -1}, {"compression": "zip"}, {"existing": "x"}])
def test_wrong_settings_are_refused(out: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ParquetSink(out, **options)


@pytest.mark.parametrize("make", [ParquetSink, lambda _: MemorySink(), lambda _: CallbackSink(print)])
def test_a_batch_with_other_columns_is_refused(out: Path, make: Callable[[Path], Sink]) -> None:
    job = Job(MemoryStateSpace(), make(out))
    with pytest.raises(SchemaError, match=r"(?s)out: .*id: string.*id: int64"):
        job.sink.write(pa.RecordBatch.from_pydict({"id": ["x"], "origin": ["EWR"], "delay": [0.5]}))
    job.close()


def test_a_column_named_like_the_tables_own_is_kept(out: Path) -> None:
    schema = pa.schema([("ordinal", pa.string()), ("id", pa.int64())])
    space = MemoryStateSpace()
    first = Job(space, ParquetSink(out), schema=schema)
    first.sink.write(pa.RecordBatch.from_pydict({"ordinal": ["x"], "id": [7]}, schema=schema))
    first.checkpoint()
    second = Job(space, ParquetSink(out), schema=schema)
    second.checkpoint(final=True)
    assert pq.read_table(out / visible(out)[0]).to_pylist() == [{"ordinal": "x", "id": 7}]
    second.close()


# --- Parquet: whose directory ------------------------------------------------------------------------------------


def test_a_directory_with_the_output_of_another_store_is_refused_unless_asked(out: Path) -> None:
    first = Job(MemoryStateSpace(), ParquetSink(out))
    first.write(10)
    first.checkpoint(final=True)
    with pytest.raises(SinkOccupiedError, match=f"{out}.*{first.backend.store_id}.*append"):
        Job(MemoryStateSpace(), ParquetSink(out))
    second = Job(MemoryStateSpace(), ParquetSink(out, existing="append"))
    second.write(10)
    second.checkpoint(final=True)
    assert ids_in(out) == sorted([*range(10), *range(10)])
    assert len({r.store_id for r in published_rolls(out)}) == 2


def test_a_directory_with_foreign_files_is_refused_unless_asked(out: Path) -> None:
    out.mkdir()
    (out / "mine.parquet").touch()
    with pytest.raises(SinkOccupiedError, match=r"mine\.parquet"):
        Job(MemoryStateSpace(), ParquetSink(out))
    Job(MemoryStateSpace(), ParquetSink(out, existing="append")).close()


def test_a_store_that_published_nothing_does_not_occupy_a_directory(out: Path) -> None:
    Job(MemoryStateSpace(), ParquetSink(out)).close()
    Job(MemoryStateSpace(), ParquetSink(out)).close()


def test_only_own_orphans_are_deleted(out: Path) -> None:
    space, other = MemoryStateSpace(), MemoryStateSpace()
    for where, operator in ((space, "out"), (other, "out"), (space, "out2")):
        job = Job(where, ParquetSink(out), operator)
        job.write(10)
        stage = job.prepare(final=True).stage
        assert stage is not None
        stage()
    assert len(staged(out)) == 6
    Job(space, ParquetSink(out)).close()
    assert [p.split("/_staging/")[1].split("/")[:2] for p in staged(out)[::2]] == sorted(
        [[str(other.store_id), "out"], [str(space.store_id), "out2"]]
    )


# --- Parquet: two writers ----------------------------------------------------------------------------------------


def test_a_fenced_job_publishes_nothing_and_its_successor_everything(out: Path) -> None:
    space = MemoryStateSpace()
    stale = Job(space, ParquetSink(out, roll_rows=1))
    stale.write(10)
    stale.checkpoint()
    stale.write(10)
    prepared = stale.prepare()
    successor = Job(space, ParquetSink(out, roll_rows=1))
    with pytest.raises(FencedError):
        stale.commit(prepared)
    assert ids_in(out) == list(range(10))
    successor.write(20)
    successor.checkpoint(final=True)
    assert ids_in(out) == list(range(30))
    successor.close()


def test_a_stalled_job_and_its_successor_may_publish_the_same_roll(out: Path) -> None:
    space = MemoryStateSpace()
    stalled = Job(space, ParquetSink(out, ["origin"], roll_rows=1))
    stalled.write(40)
    prepared = stalled.prepare()
    stalled.commit(prepared)
    threads = [threading.Thread(target=stalled.sink.publish, args=[prepared.committables]) for _ in range(4)]
    for t in threads:
        t.start()
    successor = Job(space, ParquetSink(out, ["origin"], roll_rows=1))
    for t in threads:
        t.join()
    stalled.sink.publish(prepared.committables)
    assert ids_in(out) == list(range(40))
    assert staged(out) == []
    successor.close()


@pytest.mark.parametrize("what", ["a staged file", "the staged index", "the whole roll"])
def test_committed_output_that_vanished_is_an_error_that_names_it(out: Path, what: str) -> None:
    space = MemoryStateSpace()
    job = Job(space, ParquetSink(out, ["origin"], roll_rows=1))
    job.write(40)
    prepared = job.prepare()
    job.commit(prepared)
    roll = prepared.committables[0]["roll"]
    for path in staged(out):
        if what == "the whole roll" or path.endswith("2.parquet" if what == "a staged file" else "index.json"):
            Path(path).unlink()
    with pytest.raises(OutputVanishedError, match=f"vanished.*{roll}"):
        Job(space, ParquetSink(out, ["origin"], roll_rows=1))


# --- Parquet: a crash at every step ------------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies here."""


class Faults:
    """Counts the calls that change the filesystem and crashes at one of them, before or after it."""

    def __init__(self, at: int, moment: str, *, survived: bool = False) -> None:
        self.calls = 0
        self.at = at
        self.moment = moment
        self.survived = survived
        self.crashed = False

    def error(self) -> BaseException:
        return OSError(errno.EIO, f"call {self.calls} failed") if self.survived else Crash(self.calls)

    def call(self, act: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        self.calls += 1
        # A dead process does nothing any more.
        due = self.calls == self.at or (self.crashed and not self.survived)
        self.crashed |= due
        if due and self.moment == "torn" and torn is not None and self.calls == self.at:
            torn()
        if due and not (self.moment == "after" and self.calls == self.at):
            raise self.error()
        result = act()
        if due:
            raise self.error()
        return result


class FaultyFiles:
    """An `OutputFiles` with faults; a torn write leaves half of the bytes."""

    def __init__(self, files: OutputFiles, faults: Faults) -> None:
        self._files = files
        self._faults = faults

    def write(self, name: str, content: Callable[[BinaryIO], None]) -> None:
        def half() -> None:
            buffer = io.BytesIO()
            content(buffer)
            data = buffer.getvalue()
            self._files.write(name, lambda f: f.write(data[: len(data) // 2]) and None)

        self._faults.call(lambda: self._files.write(name, content), half)

    def replace(self, name: str, data: bytes) -> None:
        self._faults.call(lambda: self._files.replace(name, data), lambda: self._torn_replace(name, data))

    def _torn_replace(self, name: str, data: bytes) -> None:
        if not isinstance(self._files, LocalOutputFiles):  # replacing is atomic on the local one
            self._files.replace(name, data[: len(data) // 2])

    def move(self, source: str, target: str) -> None:
        self._faults.call(lambda: self._files.move(source, target))

    def remove_tree(self, directory: str) -> None:
        self._faults.call(lambda: self._files.remove_tree(directory))

    def sync(self, directories: Any) -> None:
        self._faults.call(lambda: self._files.sync(directories))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def make_sink(path: str, faults: Faults | None) -> ParquetSink:
    sink = ParquetSink(path, ["origin"], roll_rows=30, clock=Clock())
    if faults is not None:
        sink._files = FaultyFiles(sink._files, faults)  # type: ignore[assignment]
    return sink


def run_until_done(space: MemoryStateSpace, sink: ParquetSink, total: int = 100) -> None:
    """Checkpoints of 20 rows; every second one rolls, the last is final."""
    job = Job(space, sink)
    while job.position < total:
        job.write(20)
        job.checkpoint(final=job.position == total)
    job.checkpoint(final=True)
    job.close()


def check_visible(space: MemoryStateSpace, path: str) -> None:
    """What a reader sees at this moment: whole files, committed rows, each once."""
    seen = ids_in(path)
    committed = space.checkpoint.job.sources["in"] if space.checkpoint else 0
    assert len(set(seen)) == len(seen)
    assert all(i < committed for i in seen)
    assert set(ids_in(path, logged(path))) <= set(seen)


def crash_story(path: str, crashes: Sequence[Faults]) -> bool:
    """Run with these crashes one after the other, then to the end; whether all of them happened."""
    space = MemoryStateSpace()
    for faults in crashes:
        try:
            run_until_done(space, make_sink(path, faults))
        except Crash:
            check_visible(space, path)
    run_until_done(space, make_sink(path, None))
    assert ids_in(path) == list(range(100))
    assert logged(path) == visible(path)
    assert staged(path) == []
    return all(f.crashed for f in crashes)


@pytest.fixture(params=["local", "memory"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """A maker of fresh output directories; a crash of the process needs no sync, so none costs time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    number = itertools.count()
    prefix = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path)
    yield lambda: f"{prefix}/{next(number)}"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("moment", ["before", "after", "torn"])
def test_every_row_is_published_once_after_a_crash_at_any_filesystem_call(
    place: Callable[[], str], moment: str
) -> None:
    steps = 0
    while crash_story(place(), [Faults(steps + 1, moment)]):
        steps += 1
    assert steps >= 30


@pytest.mark.parametrize("moment", ["before", "after", "torn"])
def test_a_job_that_survives_a_failed_filesystem_call_goes_on(place: Callable[[], str], moment: str) -> None:
    for step in itertools.count(1):
        path = place()
        faults = Faults(step, moment, survived=True)
        sink = make_sink(path, None)
        job = Job(MemoryStateSpace(), sink)
        sink._rolls._files = FaultyFiles(sink._rolls._files, faults)  # type: ignore[assignment]
        for last in (False, False, False, True, True):
            job.write(20)
            with contextlib.suppress(OSError):
                job.checkpoint(final=last)
        job.checkpoint(final=True)
        assert ids_in(path) == list(range(100))
        assert logged(path) == visible(path)
        assert staged(path) == []
        job.close()
        if not faults.crashed:
            break
    assert step > 20


def test_every_row_is_published_once_after_crashes_in_the_recovery_too(place: Callable[[], str]) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(60):
        moments = [rng.choice(["before", "after", "torn"]) for _ in range(4)]
        crash_story(place(), [Faults(rng.randint(1, 25), m) for m in moments])


def test_every_row_is_published_once_after_a_crash_at_any_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = {name: getattr(os, name) for name in ("replace", "mkdir", "unlink", "rmdir")}
    originals["fsync"] = lambda _: None  # only the crash counts here, not the time
    faults = Faults(0, "before")

    def patched(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: faults.call(lambda: originals[name](*args, **kwargs))

    for name in originals:
        monkeypatch.setattr(os, name, patched(name))
    for moment in ("before", "after"):
        for step in itertools.count(1):
            space, path = MemoryStateSpace(), str(tmp_path / f"{moment}{step}")
            faults = Faults(step, moment)
            try:
                run_until_done(space, make_sink(path, None), 60)
                break
            except Crash:
                faults = Faults(0, "before")
                check_visible(space, path)
            run_until_done(space, make_sink(path, None), 60)
            assert ids_in(path) == list(range(60))
            assert logged(path) == visible(path)
            assert staged(path) == []
        assert step > 60


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name what is synced")
def test_everything_is_synced_before_it_counts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After staging and after publishing, a loss of power forgets no file and no name."""
    unsynced: set[Path] = set()
    synced: set[Path] = set()
    real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir")}

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.add(path)
        unsynced.discard(path)
        if not path.is_dir():
            unsynced.add(path.parent)  # its name is not yet

    def replace(source: Any, target: Any) -> None:
        real["replace"](source, target)
        synced.add(Path(target))
        unsynced.add(Path(target).parent)

    def mkdir(path: Any, *args: Any) -> None:
        real["mkdir"](path, *args)
        unsynced.add(Path(path).parent)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "mkdir", mkdir)
    job = Job(MemoryStateSpace(), ParquetSink(out, ["origin"], roll_rows=1))
    job.write(40)
    prepared = job.prepare()
    job.commit(prepared)
    assert len(staged(out)) == 5
    assert {Path(p) for p in staged(out)} <= synced
    assert unsynced == set()
    job.sink.publish(prepared.committables)
    assert {out / name for name in visible(out)} <= synced
    assert unsynced == set()
    job.close()


def test_a_torn_or_newer_log_entry_is_no_silent_success(out: Path) -> None:
    space = MemoryStateSpace()
    job = Job(space, ParquetSink(out, roll_rows=1))
    job.write(10)
    job.checkpoint()
    (entry,) = (p for p in (out / "_committed").rglob("*.json") if p.name != "_claim.json")
    data = json.loads(entry.read_bytes())
    assert data["rows"] == 10
    entry.write_text(json.dumps({**data, "version": 99}))
    with pytest.raises(Exception, match="version 99"):
        published_rolls(out)
    entry.write_bytes(entry.read_bytes()[:20])
    assert published_rolls(out) == []
    with pytest.raises(OutputVanishedError):  # the checkpoint that published it still names it
        Job(space, ParquetSink(out, roll_rows=1))


def test_replacing_a_local_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = output_files(tmp_path)
    files.replace("a/b.json", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    with pytest.raises(OSError, match="no"):
        files.replace("a/b.json", b"new")
    assert files.read("a/b.json") == b"old"
    assert files.names("a") == ["b.json"]
    assert files.read("nothing") is None
    assert files.names("nothing") == []


# --- callback ----------------------------------------------------------------------------------------------------


def test_a_slow_callback_holds_back_the_sources() -> None:
    batch = rows(0, 1000)
    sink = CallbackSink(lambda *_: None, memory_bytes=3 * batch.nbytes)
    held: list[int] = []

    def look(step: str) -> None:
        if step == "poll":
            held.append(sink._kept.bytes)

    context = StreamContext(checkpoint_interval=None, hook=look)
    context.from_batches([batch] * 60).sink(sink, name="out")
    result = context.run()
    assert 3 * batch.nbytes <= max(held) <= 8 * batch.nbytes
    assert len(result.checkpoints) >= 10
    with pytest.raises(ValueError, match="memory_bytes"):
        CallbackSink(print, memory_bytes=0)


class Calls:
    """A callee that notes what it got and may fail once."""

    def __init__(self) -> None:
        self.got: list[tuple[int, int, list[int]]] = []
        self.fail_at: int | None = None

    def __call__(self, batch: pa.RecordBatch, checkpoint_id: int, sequence: int) -> None:
        if len(self.got) == self.fail_at:
            self.fail_at = None
            raise ConnectionError("down")
        self.got.append((checkpoint_id, sequence, batch.column("id").to_pylist()))

    def ids(self) -> list[int]:
        """Rows of a callee that drops the names it has seen."""
        return [i for ids in {(c, s): ids for c, s, ids in self.got}.values() for i in ids]


def test_a_callback_is_called_after_the_commit_with_stable_names() -> None:
    calls = Calls()
    job = Job(MemoryStateSpace(), CallbackSink(calls))
    assert job.sink.guarantee is Guarantee.AT_LEAST_ONCE
    job.write(30)
    prepared = job.prepare()
    job.commit(prepared)
    assert calls.got == []
    job.sink.publish(prepared.committables)
    assert [(c, s) for c, s, _ in calls.got] == [(1, 0), (1, 1), (1, 2)]
    job.sink.publish(prepared.committables)
    job.write(10)
    job.checkpoint()
    assert [(c, s) for c, s, _ in calls.got[3:]] == [(2, 3)]
    assert calls.ids() == list(range(40))
    assert job.prepare().committables == []
    job.close()


def test_a_callback_that_was_not_acknowledged_is_called_again_after_a_crash_with_the_same_names() -> None:
    space, calls = MemoryStateSpace(), Calls()
    for _ in range(4):
        job = Job(space, CallbackSink(calls))
        assert len(calls.ids()) == job.position
        job.write(20)
        job.checkpoint()
        job.write(20)
        job.commit(job.prepare())
        job.write(20)  # never committed
    Job(space, CallbackSink(calls)).close()
    assert calls.ids() == list(range(160))
    by_name: dict[tuple[int, int], list[int]] = {}
    for checkpoint, sequence, ids in calls.got:
        assert by_name.setdefault((checkpoint, sequence), ids) == ids


def test_a_raising_callback_is_named_and_called_again_from_there() -> None:
    space, calls = MemoryStateSpace(), Calls()
    job = Job(space, CallbackSink(calls))
    job.write(40)
    calls.fail_at = 2
    place = r"out: .*ConnectionError\('down'\) at checkpoint 1, sequence 2"
    with pytest.raises(UserFunctionError, match=place) as caught:
        job.checkpoint()
    assert isinstance(caught.value.__cause__, ConnectionError)
    job.write(10)
    job.checkpoint()
    assert [(c, s) for c, s, _ in calls.got] == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 4)]
    calls.fail_at = 5
    job.write(10)
    with pytest.raises(UserFunctionError):
        job.checkpoint()
    Job(space, CallbackSink(calls)).close()
    assert calls.ids() == list(range(60))


def test_names_are_never_used_twice_even_when_checkpoint_numbers_are() -> None:
    space, calls = MemoryStateSpace(), Calls()
    first = Job(space, CallbackSink(calls))
    for _ in range(2):
        first.write(20)
        first.prepare()  # these checkpoints fail, so the next is the first that is committed
    first.checkpoint()
    second = Job(space, CallbackSink(calls))
    for _ in range(3):
        second.write(20)
        second.checkpoint()
    assert [s for _, s, _ in calls.got] == [*range(4), *range(10)]  # the first four once more on opening
    assert [c for c, _, _ in calls.got[4:]] == [1, 1, 2, 2, 2, 2, 3, 3, 4, 4]
    assert calls.ids() == list(range(100))


def test_an_immediate_callback_is_called_at_once_and_promises_less() -> None:
    got: list[int] = []

    def function(batch: pa.RecordBatch) -> None:
        if batch.num_rows == 1:
            raise ValueError("one row")
        got.extend(batch.column("id").to_pylist())

    sink = ImmediateCallbackSink(function)
    assert sink.guarantee is Guarantee.AT_LEAST_ONCE
    job = Job(MemoryStateSpace(), sink)
    job.write(20)
    assert got == list(range(20))
    with pytest.raises(UserFunctionError, match="one row"):
        job.write(1)
    job.close()


# --- memory and print --------------------------------------------------------------------------------------------


def test_a_memory_sink_holds_what_was_written() -> None:
    sink = MemorySink()
    assert sink.guarantee is Guarantee.AT_LEAST_ONCE
    job = Job(MemoryStateSpace(), sink)
    assert sink.table().schema == SCHEMA
    job.write(25)
    job.checkpoint(final=True)
    job.close()
    assert sink.table().to_pylist() == rows(0, 25).to_pylist()
    assert [b.num_rows for b in sink.batches] == [10, 10, 5]


def test_a_print_sink_prints_the_first_rows_and_counts_the_others() -> None:
    text = io.StringIO()
    sink = PrintSink(max_rows=2, console=Console(file=text, width=80))
    assert sink.guarantee is Guarantee.AT_LEAST_ONCE
    job = Job(MemoryStateSpace(), sink)
    sink.write(pa.RecordBatch.from_arrays([[1, 2, 3], ["[red]x", None, "hidden"], np.zeros(3)], schema=SCHEMA))
    sink.write(rows(0, 0))
    printed = text.getvalue()
    assert "[red]x" in printed
    assert "hidden" not in printed
    assert "and 1 more rows" in printed
    assert printed.count("delay") == 1
    job.close()


@pytest.mark.parametrize("interference", ["deletes", "writes"])
def test_a_directory_is_removed_although_another_process_deletes_or_writes_there(
    interference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalOutputFiles(tmp_path)
    files.replace("_staging/1/rows", b"x")
    rmtree, meanwhile = shutil.rmtree, iter([True])

    def disturbed(path: Path) -> None:
        if next(meanwhile, False):
            rmtree(path)
            if interference == "deletes":
                raise FileNotFoundError(path)
            files.replace("_staging/1/late", b"y")
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path)

    monkeypatch.setattr("operators.sinks.files.shutil.rmtree", disturbed)
    files.remove_tree("_staging/1")
    assert list(tmp_path.rglob("*")) == [tmp_path / "_staging"]
