"""Sources: positions are exact, boundaries deterministic, and a changed input is refused."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from operators.errors import BadInputError, SchemaError, SourceChangedError, SourceNotReplayableError
from operators.sources import (
    IDLE,
    ArrowSource,
    CsvSource,
    Follow,
    IterableSource,
    JsonSource,
    ParquetSource,
    Source,
    SourceBatch,
)
from operators.sources.files import FileList
from operators.sources.readahead import ReadAhead
from operators.testing import check_source, ends_after


def numbers(start: int, rows: int) -> pa.Table:
    """Rows that tell their own place; some values are null."""
    ids = np.arange(start, start + rows)
    names = [None if i % 7 == 0 else f"name {i}" for i in ids]
    return pa.table({"id": pa.array(ids, pa.int64()), "name": pa.array(names, pa.string()), "half": ids / 2})


def drain(source: Source, position: Any = None) -> list[SourceBatch]:
    source.open(position)
    try:
        return list(iter(source.poll, None))
    finally:
        source.close()


def rows_of(batches: list[SourceBatch], schema: pa.Schema) -> list[dict[str, Any]]:
    return pa.Table.from_batches([b.batch for b in batches], schema).to_pylist()


def through_msgpack(position: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(position))


@pytest.fixture
def parquet_dir(tmp_path: Path) -> Path:
    """Three files of 1000, 0 and 777 rows, in row groups of 300 rows."""
    root = tmp_path / "in"
    root.mkdir()
    for name, start, rows in (("a.parquet", 0, 1000), ("b.parquet", 1000, 0), ("c.parquet", 1000, 777)):
        pq.write_table(numbers(start, rows), root / name, row_group_size=300)
    return root


@pytest.fixture
def csv_dir(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    root.mkdir()
    for name, start, rows in (("a.csv", 0, 1000), ("b.csv", 1000, 0), ("c.csv", 1000, 777)):
        pacsv.write_csv(numbers(start, rows), root / name)
    return root


# --- every file source -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1000, 300, 128, 7])
def test_a_parquet_source_restored_at_any_position_continues_with_the_same_batches(
    parquet_dir: Path, batch_rows: int
) -> None:
    full = drain(ParquetSource(parquet_dir, batch_rows=batch_rows))
    schema = ParquetSource(parquet_dir).schema
    assert [r["id"] for r in rows_of(full, schema)] == list(range(1777))
    for i in range(0, len(full), 1 + len(full) // 12):
        rest = drain(ParquetSource(parquet_dir, batch_rows=batch_rows), through_msgpack(full[i].position))
        assert [b.position for b in rest] == [b.position for b in full[i + 1 :]]
        assert all(x.batch.equals(y.batch) for x, y in zip(rest, full[i + 1 :], strict=True))


def test_a_parquet_position_holds_when_the_batch_size_changes(parquet_dir: Path) -> None:
    full = drain(ParquetSource(parquet_dir, batch_rows=70))
    for i, batch_rows in itertools.product(range(0, len(full), 4), (1, 64, 5000)):
        source = ParquetSource(parquet_dir, batch_rows=batch_rows)
        ids = [r["id"] for r in rows_of(drain(source, full[i].position), source.schema)]
        assert ids == list(range(full[i].position["rows"], 1777))


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_a_csv_source_restored_at_any_position_continues_with_the_same_batches(csv_dir: Path, block_bytes: int) -> None:
    full = drain(CsvSource(csv_dir, block_bytes=block_bytes))
    source = CsvSource(csv_dir)
    assert rows_of(full, source.schema) == numbers(0, 1777).to_pylist()
    for i in range(0, len(full), 1 + len(full) // 3):
        rest = drain(CsvSource(csv_dir, block_bytes=block_bytes), through_msgpack(full[i].position))
        assert [b.position for b in rest] == [b.position for b in full[i + 1 :]]
        assert all(x.batch.equals(y.batch) for x, y in zip(rest, full[i + 1 :], strict=True))


def make(kind: str, path: Any, **options: Any) -> Source:
    if kind == "parquet":
        return ParquetSource(path, batch_rows=100, **options)
    if kind in ("arrow", "arrows"):
        return ArrowSource(path, batch_rows=100, **options)
    if kind == "json":
        return JsonSource(path, block_bytes=2000, **options)
    return CsvSource(path, block_bytes=1000, **options)


def write(kind: str, path: Path, table: pa.Table) -> None:
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=300)
    elif kind == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    elif kind == "arrows":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    elif kind == "json":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    elif kind == "csv":
        pacsv.write_csv(table, path)
    else:
        codec = {"gz": "gzip", "zst": "zstd"}[kind.partition(".")[2]]
        with pa.CompressedOutputStream(path, codec) as out:
            pacsv.write_csv(table, out)


@pytest.fixture(params=["parquet", "csv", "csv.gz", "csv.zst", "json", "arrow", "arrows"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(kind: str, tmp_path: Path) -> Path:
    """Three files of 500 rows each."""
    directory = tmp_path / kind
    directory.mkdir()
    for i, name in enumerate("abc"):
        write(kind, directory / f"{name}.{kind}", numbers(500 * i, 500))
    return directory


def position_in(kind: str, root: Path, name: str) -> Any:
    """A position half-way through one of the files."""
    positions = [b.position for b in drain(make(kind, root)) if b.position["file"].startswith(name)]
    return positions[len(positions) // 2]


def test_a_position_holds_for_a_copy_of_the_input(kind: str, root: Path, tmp_path: Path) -> None:
    position = position_in(kind, root, "b")
    shutil.copytree(root, tmp_path / "copy")
    assert [b.position for b in drain(make(kind, tmp_path / "copy"), position)] == [
        b.position for b in drain(make(kind, root), position)
    ]


def test_files_after_the_position_may_come_and_go(kind: str, root: Path) -> None:
    position = position_in(kind, root, "b")
    (root / f"c.{kind}").unlink()
    write(kind, root / f"d.{kind}", numbers(1000, 3))
    source = make(kind, root)
    assert rows_of(drain(source, position), source.schema)[-3:] == numbers(1000, 3).to_pylist()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root, kind: (root / f"b.{kind}").unlink(), "b."),
        (lambda root, kind: write(kind, root / f"b.{kind}", numbers(500, 499)), "b."),
        (lambda root, kind: write(kind, root / f"b.{kind}", numbers(500, 501)), "b."),
        (lambda root, kind: write(kind, root / f"b.{kind}", numbers(501, 500)), "b."),
        (lambda root, kind: write(kind, root / f"a.{kind}", numbers(1, 500)), "a."),
        (lambda root, kind: (root / f"a.{kind}").unlink(), "before 'b."),
        (lambda root, kind: write(kind, root / f"aa.{kind}", numbers(0, 5)), "aa."),
    ],
    ids=["vanished", "shrank", "grew", "replaced", "finished replaced", "finished vanished", "appeared before"],
)
def test_an_input_that_changed_since_the_checkpoint_is_refused_by_name(
    kind: str, root: Path, change: Any, named: str
) -> None:
    position = position_in(kind, root, "b")
    change(root, kind)
    with pytest.raises(SourceChangedError, match=named.replace(".", r"\.")):
        make(kind, root).open(position)


def change_file(kind: str, victim: Path, change: str) -> None:
    if change == "vanish":
        victim.unlink()
    elif change == "grow":
        with victim.open("ab") as f:
            f.write(b"1,2,3\n")
    elif change == "replace":
        write(kind, victim, numbers(4001, 4000))
    else:
        os.truncate(victim, 1000)


def read_while_changing(source: Source, seen: list[SourceBatch], at: int, change: Callable[[], None]) -> None:
    """Read everything; make the change after ``at`` rows."""
    source.open(None)
    with contextlib.closing(source):
        while (batch := source.poll()) is not None:
            seen.append(batch)
            if batch.position["rows"] == at:
                change()


@pytest.mark.parametrize("change", ["vanish", "grow", "replace", "truncate"])
@pytest.mark.parametrize("when", ["before its first row", "half-way"])
def test_an_input_that_changes_while_it_is_read_is_an_error_that_names_it(
    kind: str, tmp_path: Path, change: str, when: str
) -> None:
    root = tmp_path
    for i, name in enumerate("abc"):
        table = numbers(4000 * i, 4000)
        if kind == "parquet":
            pq.write_table(table, root / f"{name}.{kind}", row_group_size=100)
        else:
            write(kind, root / f"{name}.{kind}", table)
    victim = root / f"b.{kind}"
    positions = [b.position for b in drain(make(kind, root))]
    in_victim = [p["rows"] for p in positions if p["file"] == victim.name]
    at = positions[0]["rows"] if when == "before its first row" else in_victim[len(in_victim) // 2]
    seen: list[SourceBatch] = []
    with pytest.raises(SourceChangedError, match=re.escape(str(victim))):
        read_while_changing(make(kind, root), seen, at, lambda: change_file(kind, victim, change))
    # Everything before the bad file was read; the end of the bad one never was.
    assert 4000 <= seen[-1].position["rows"] < 8000


def test_names_order_a_list_and_hidden_files_of_a_directory_are_no_data(kind: str, root: Path) -> None:
    (root / "_staging").mkdir()
    write(kind, root / "_staging" / f"x.{kind}", numbers(0, 9))
    write(kind, root / f".hidden.{kind}", numbers(0, 9))
    (root / "sub").mkdir()
    write(kind, root / "sub" / f"d.{kind}", numbers(1500, 9))
    source = make(kind, root)
    assert [r["id"] for r in rows_of(drain(source), source.schema)] == list(range(1509))
    listed = make(kind, [root / f"b.{kind}", root / f"a.{kind}"])
    assert [r["id"] for r in rows_of(drain(listed), listed.schema)] == list(range(1000))
    matched = make(kind, f"{root}/[bc].{kind}")
    assert [r["id"] for r in rows_of(drain(matched), matched.schema)] == list(range(500, 1500))


def test_a_source_reads_any_fsspec_filesystem(kind: str, root: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(root), f"/sources/{kind}", recursive=True)
    try:
        source = make(kind, f"memory://sources/{kind}")
        full = drain(source)
        assert rows_of(full, source.schema) == numbers(0, 1500).to_pylist()
        assert len(drain(source, full[3].position)) == len(full) - 4
        memory.rm(f"/sources/{kind}/b.{kind}")
        with pytest.raises(SourceChangedError, match="b"):
            make(kind, f"memory://sources/{kind}").open(full[-1].position)
    finally:
        memory.rm("/sources", recursive=True)


def test_missing_and_empty_inputs_are_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="nothing"):
        make(kind, tmp_path / f"nothing.{kind}")
    with pytest.raises(BadInputError, match=f"no \\*.{kind.partition('.')[0].replace('arrows', 'arrow')} file"):
        make(kind, tmp_path)
    (tmp_path / f"empty.{kind}").touch()
    reason = "no file there has a row" if kind == "json" else rf"empty\.{kind}.*0 bytes"
    with pytest.raises(BadInputError, match=reason):
        make(kind, tmp_path)


def test_a_closed_source_stops_its_thread_and_can_be_opened_again(kind: str, root: Path) -> None:
    source = make(kind, root)
    source.open(None)
    first = source.poll()
    source.close()
    source.close()
    assert not [t for t in threading.enumerate() if t.name == f"{kind}-source"]
    with pytest.raises(RuntimeError, match="not open"):
        source.poll()
    source.open(None)
    again = source.poll()
    assert first is not None
    assert again is not None
    assert again.batch.equals(first.batch)
    source.close()


# --- files whose columns differ ----------------------------------------------------------------------------------


def two_files(kind: str, root: Path, first: pa.Table, second: pa.Table) -> None:
    write(kind, root / f"a.{kind}", first)
    write(kind, root / f"b.{kind}", second)


NARROW = pa.table({"id": pa.array([1, 2], pa.int32()), "name": ["x", "y"]})
WIDE = pa.table({"id": pa.array([2**40], pa.int64()), "name": ["z"], "more": [0.5]})


def test_files_of_other_columns_are_refused_unless_asked(kind: str, tmp_path: Path) -> None:
    two_files(kind, tmp_path, NARROW, WIDE)
    if kind == "json":  # only reading tells
        with pytest.raises(SchemaError, match=r"b\.json has the columns \['more'\]"):
            drain(make(kind, tmp_path))
    else:
        with pytest.raises(SchemaError, match=rf"b\.{kind} has"):
            make(kind, tmp_path)
    with pytest.raises(ValueError, match="sideways"):
        make(kind, tmp_path, schema_drift="sideways")


def test_columns_that_a_file_lacks_are_null_and_narrow_ones_are_widened(kind: str, tmp_path: Path) -> None:
    two_files(kind, tmp_path, NARROW, WIDE)
    source = make(kind, tmp_path, schema_drift="widen")
    assert source.schema == pa.schema([("id", pa.int64()), ("name", pa.string()), ("more", pa.float64())])
    assert rows_of(drain(source), source.schema) == [
        {"id": 1, "name": "x", "more": None},
        {"id": 2, "name": "y", "more": None},
        {"id": 2**40, "name": "z", "more": 0.5},
    ]


def test_columns_that_the_first_file_does_not_have_can_be_left_out(kind: str, tmp_path: Path) -> None:
    two_files(kind, tmp_path, WIDE.drop_columns("more"), WIDE)
    source = make(kind, tmp_path, schema_drift="ignore_extra")
    assert source.schema.names == ["id", "name"]
    assert [r["id"] for r in rows_of(drain(source), source.schema)] == [2**40] * 2


def test_a_type_that_does_not_go_into_that_of_the_stream_is_refused(tmp_path: Path) -> None:
    two_files("parquet", tmp_path, NARROW, WIDE)
    with pytest.raises(SchemaError, match=r"b\.parquet: column 'id' is int64, the stream's is int32"):
        ParquetSource(tmp_path, schema_drift="ignore_extra")
    write("parquet", tmp_path / "b.parquet", pa.table({"id": ["text"]}))
    with pytest.raises(SchemaError, match=r"(?s)b\.parquet has columns.*do not go with"):
        ParquetSource(tmp_path, schema_drift="widen")
    needed = pa.schema([pa.field("id", pa.int64()), pa.field("more", pa.float64(), nullable=False)])
    with pytest.raises(SchemaError, match=r"a\.parquet: no column \['more'\], which cannot be null"):
        ParquetSource(tmp_path, schema=needed, schema_drift="widen")


# --- partitions --------------------------------------------------------------------------------------------------


def test_partitions_in_the_names_of_directories_are_columns(kind: str, tmp_path: Path) -> None:
    for number, place in enumerate(["day=2013-01-02/town=a%2Fb", "day=2013-01-01/town=__HIVE_DEFAULT_PARTITION__"]):
        (tmp_path / place).mkdir(parents=True)
        write(kind, tmp_path / place / f"x.{kind}", pa.table({"id": [number]}))
    source = make(kind, tmp_path, partitions={"day": pa.date32(), "town": pa.string()})
    assert source.schema == pa.schema([("id", pa.int64()), ("day", pa.date32()), ("town", pa.string())])
    assert rows_of(drain(source), source.schema) == [
        {"id": 1, "day": dt.date(2013, 1, 1), "town": None},
        {"id": 0, "day": dt.date(2013, 1, 2), "town": "a/b"},
    ]
    assert make(kind, tmp_path, partitions=["day"]).schema.field("day").type == pa.string()
    with pytest.raises(BadInputError, match="no directory hour="):
        drain(make(kind, tmp_path, partitions=["hour"]))
    with pytest.raises(BadInputError, match="town is not of type int64"):
        drain(make(kind, tmp_path, partitions={"town": pa.int64()}))


# --- a directory that grows --------------------------------------------------------------------------------------


class Watch:
    """The clock of a source that follows a directory; counts how often it was listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.listings = 0
        original = FileList.find

        def find(files: FileList) -> Any:
            self.listings += 1
            return original(files)

        monkeypatch.setattr(FileList, "find", find)

    def __call__(self) -> float:
        return self.now


def take(source: Source, rows: int) -> list[SourceBatch]:
    """Batches until there are so many rows."""
    found: list[SourceBatch] = []
    while sum(item.batch.num_rows for item in found) < rows:
        if isinstance(item := source.poll(), SourceBatch):
            found.append(item)
    return found


def ids(items: list[SourceBatch]) -> list[int]:
    return [i for item in items for i in item.batch.column("id").to_pylist()]


FAST = {"poll_seconds": 0.001}


@pytest.mark.parametrize("order", ["name", "time"])
def test_every_file_that_appears_is_read_once(kind: str, tmp_path: Path, order: Any) -> None:
    root = tmp_path / "not yet"
    source = make(kind, root, schema=numbers(0, 1).schema, follow=Follow(order=order, **FAST))
    source.open(None)
    assert source.poll() is IDLE
    root.mkdir()
    for number in range(3):
        write(kind, root / f".{number}.{kind}", numbers(500 * number, 500))
        (root / f".{number}.{kind}").rename(root / f"{number}.{kind}")
        items = take(source, 500)
        assert ids(items) == list(range(500 * number, 500 * number + 500))
        assert items[-1].position["ended"]
    assert source.total_rows is None
    source.close()
    last = through_msgpack(items[-1].position)
    for position, rest in ((last, []), (items[0].position, ids(items[1:]))):
        again = make(kind, root, schema=numbers(0, 1).schema, follow=Follow(order=order, **FAST))
        again.open(position)
        write(kind, root / f".3.{kind}", numbers(1500, 10))
        (root / f".3.{kind}").rename(root / f"3.{kind}")
        assert ids(take(again, len(rest) + 10)) == [*rest, *range(1500, 1510)]
        again.close()
        (root / f"3.{kind}").unlink()


@pytest.mark.parametrize("order", ["name", "time"])
def test_a_followed_directory_passes_the_check_of_sources(tmp_path: Path, order: Any) -> None:
    for number in range(4):
        write("parquet", tmp_path / f"{number}.parquet", numbers(300 * number, 300))
    follow = Follow(order=order, **FAST)
    assert check_source(lambda: ends_after(make("parquet", tmp_path, follow=follow), 1200), places=5) == 1200


def drop(root: Path, name: str, table: pa.Table, time_s: float) -> None:
    """A whole file appears, last modified at a time."""
    write("parquet", root / f".{name}.parquet", table)
    os.utime(root / f".{name}.parquet", (time_s, time_s))
    (root / f".{name}.parquet").rename(root / f"{name}.parquet")


def test_files_by_time_are_read_in_that_order_whatever_their_names(tmp_path: Path) -> None:
    for number, name in enumerate("cab"):
        drop(tmp_path, name, numbers(10 * number, 10), 1000 + number)
    source = make("parquet", tmp_path, follow=Follow(order="time", lookback_seconds=60, **FAST))
    source.open(None)
    assert ids(take(source, 30)) == list(range(30))
    drop(tmp_path, "0", numbers(30, 10), 990)  # older than the newest, within the lookback
    assert ids(take(source, 10)) == list(range(30, 40))
    drop(tmp_path, "1", numbers(0, 10), 900)  # beyond it
    drop(tmp_path, "2", numbers(40, 10), 2000)
    assert ids(take(source, 10)) == list(range(40, 50))
    drop(tmp_path, "3", numbers(50, 10), 3000)
    item = take(source, 10)[-1]
    assert ids([item]) == list(range(50, 60))
    assert len(item.position["seen"]) <= 16  # of the files before the lookback nothing is kept
    source.close()


def test_a_followed_directory_is_not_listed_more_often_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    for number in range(20):
        write("parquet", tmp_path / f"{number:02}.parquet", numbers(10 * number, 10))
    source = make("parquet", tmp_path, schema=numbers(0, 1).schema, follow=Follow(poll_seconds=3600.0, clock=watch))
    source.open(None)
    assert ids(take(source, 200)) == list(range(200))
    write("parquet", tmp_path / "99.parquet", numbers(200, 10))
    assert [source.poll() for _ in range(3)] == [IDLE] * 3
    assert watch.listings == 1
    source.close()


def test_a_file_that_still_grows_is_left_alone_until_it_has_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    (tmp_path / "a.csv").write_text("id\n1\n")
    follow = Follow(settle_seconds=10, clock=watch, **FAST)
    source = make("csv", tmp_path, schema=pa.schema([("id", pa.int64())]), follow=follow)
    source.open(None)

    def wait_for_listings(count: int) -> None:
        seen = watch.listings
        while watch.listings < seen + count:
            watch.now += 0.001
            assert source.poll() is IDLE

    wait_for_listings(2)
    (tmp_path / ".a.csv").write_text("id\n1\n2\n")
    (tmp_path / ".a.csv").rename(tmp_path / "a.csv")
    watch.now += 9
    wait_for_listings(2)
    assert source.poll() is IDLE
    watch.now += 11
    while not isinstance(item := source.poll(), SourceBatch):
        watch.now += 0.001
    assert ids([item]) == [1, 2]
    source.close()


@pytest.mark.parametrize("order", ["name", "time"])
def test_a_file_that_changes_after_it_was_read_is_an_error(tmp_path: Path, order: Any) -> None:
    (tmp_path / "a.csv").write_text("id\n1\n")
    source = make("csv", tmp_path, follow=Follow(order=order, **FAST))
    source.open(None)
    position = take(source, 1)[-1].position
    (tmp_path / ".a.csv").write_text("id\n1\n2\n")
    (tmp_path / ".a.csv").rename(tmp_path / "a.csv")
    with pytest.raises(SourceChangedError, match=r"a\.csv.*expected 5 bytes, all read, found 7 bytes"):
        take(source, 1)
    source.close()
    with pytest.raises(SourceChangedError, match=r"a\.csv"):
        make("csv", tmp_path, follow=Follow(order=order, **FAST)).open({**position, "ended": False})


def test_a_followed_file_that_changed_while_it_was_being_read_is_refused(tmp_path: Path) -> None:
    write("parquet", tmp_path / "a.parquet", numbers(0, 500))
    source = make("parquet", tmp_path, follow=Follow(**FAST))
    source.open(None)
    position = take(source, 1)[0].position
    source.close()
    write("parquet", tmp_path / "a.parquet", numbers(1, 500))
    with pytest.raises(SourceChangedError, match=r"a\.parquet"):
        make("parquet", tmp_path, schema=numbers(0, 1).schema, follow=Follow(**FAST)).open(position)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(SourceChangedError, match=r"a\.parquet"):
        make("parquet", tmp_path, schema=numbers(0, 1).schema, follow=Follow(**FAST)).open(position)


def test_a_directory_that_is_followed_needs_columns_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="pass schema="):
        make("parquet", tmp_path, follow=True)
    with pytest.raises(ValueError, match="only a directory can be followed"):
        make("parquet", [tmp_path / "a.parquet"], follow=True)
    for wrong in ({"order": "size"}, {"poll_seconds": 0}, {"settle_seconds": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Follow(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("drift", "found"), [("ignore_extra", [1, 2, 2**40]), ("widen", "more"), ("error", "more")])
def test_a_file_of_other_columns_in_a_followed_directory_meets_the_policy(
    tmp_path: Path, drift: str, found: Any
) -> None:
    write("parquet", tmp_path / "a.parquet", NARROW.set_column(0, "id", pa.array([1, 2], pa.int64())))
    source = make("parquet", tmp_path, follow=Follow(**FAST), schema_drift=drift)
    source.open(None)
    drop(tmp_path, "b", WIDE, 2e9)
    if isinstance(found, list):
        assert ids(take(source, 3)) == found
    else:
        with pytest.raises(SchemaError, match=rf"(?s)b\.parquet has .*{found}"):
            take(source, 3)
    source.close()


def test_a_truncated_compressed_file_is_an_error(tmp_path: Path) -> None:
    write("csv.gz", tmp_path / "a.csv.gz", numbers(0, 20_000))
    data = (tmp_path / "a.csv.gz").read_bytes()
    (tmp_path / "a.csv.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInputError, match=r"a\.csv\.gz"):
        drain(make("csv.gz", tmp_path))


# --- JSON lines --------------------------------------------------------------------------------------------------


def test_keys_that_an_object_lacks_are_null_and_others_an_error_unless_declared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": 1, "tags": ["x"]}\n\n{"tags": [], "id": 2}\n{"id": 3}\n')
    source = JsonSource(tmp_path)
    assert source.schema == pa.schema([("id", pa.int64()), ("tags", pa.list_(pa.string()))])
    assert rows_of(drain(source), source.schema)[2] == {"id": 3, "tags": None}
    declared = JsonSource(tmp_path, pa.schema([("id", pa.float32())]))
    assert rows_of(drain(declared), declared.schema) == [{"id": 1.0}, {"id": 2.0}, {"id": 3.0}]


def test_a_line_that_is_no_object_of_these_columns_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": 1}\n')
    (tmp_path / "b.json").write_text('{"id": 1}\n{"id": "seven"}\n')
    with pytest.raises(BadInputError, match=r"b\.json: the rows from byte 0 on"):
        drain(JsonSource(tmp_path))
    (tmp_path / "b.json").write_text("no json\n")
    with pytest.raises(BadInputError, match=r"b\.json: the rows from byte 0 on"):
        drain(JsonSource(tmp_path))


# --- Parquet -----------------------------------------------------------------------------------------------------


def test_a_parquet_source_knows_its_size_and_describes_itself(parquet_dir: Path) -> None:
    source = ParquetSource(parquet_dir, columns=["half", "id"])
    assert source.total_rows == 1777
    assert source.schema == pa.schema([("half", pa.float64()), ("id", pa.int64())])
    assert source.describe()["path"] == str(parquet_dir)
    msgpack.packb(source.describe())
    assert all(b.batch.schema.equals(source.schema, check_metadata=True) for b in drain(source))


def test_restoring_a_parquet_source_decodes_no_row_group_before_the_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(numbers(0, 1000), tmp_path / "a.parquet", row_group_size=100)
    full = drain(ParquetSource(tmp_path, batch_rows=100))
    decoded: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        decoded.extend(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    drain(ParquetSource(tmp_path, batch_rows=100), full[6].position)
    assert decoded == [7, 8, 9]


def test_parquet_files_with_other_columns_are_refused_with_both_schemas(parquet_dir: Path) -> None:
    pq.write_table(pa.table({"id": ["text"]}), parquet_dir / "d.parquet")
    with pytest.raises(SchemaError, match=r"(?s)d\.parquet.*id: string.*a\.parquet.*id: int64"):
        ParquetSource(parquet_dir)
    with pytest.raises(SchemaError, match=r"d\.parquet.*nothing"):
        ParquetSource(parquet_dir / "d.parquet", columns=["nothing"])


def test_a_file_that_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(BadInputError, match=r"text\.parquet"):
        ParquetSource(tmp_path)


def test_damaged_parquet_pages_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(numbers(0, 5000), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=r"a\.parquet"):
        drain(ParquetSource(path))


def test_small_row_groups_are_read_together(tmp_path: Path) -> None:
    pq.write_table(numbers(0, 1000), tmp_path / "a.parquet", row_group_size=10)
    assert [b.batch.num_rows for b in drain(ParquetSource(tmp_path, batch_rows=400))] == [400, 400, 200]


@pytest.mark.parametrize("statistics", [True, False])
def test_parquet_files_can_be_ordered_by_a_column_whatever_their_names(tmp_path: Path, statistics: bool) -> None:
    for name, start, rows in (("9", 0, 100), ("10", 100, 250), ("empty", 0, 0), ("1", 350, 50)):
        pq.write_table(numbers(start, rows), tmp_path / f"{name}.parquet", 30, write_statistics=statistics)
    source = ParquetSource(tmp_path, ["name", "id"], batch_rows=40, order_by="id")
    assert source.order_range == (0, 399)
    full = drain(source)
    assert rows_of(full, source.schema) == numbers(0, 400).select(["name", "id"]).to_pylist()
    for number, item in enumerate(full):
        rest = drain(ParquetSource(tmp_path, ["name", "id"], batch_rows=40, order_by="id"), item.position)
        assert rest == full[number + 1 :]


def test_parquet_files_that_overlap_in_the_column_that_orders_them_are_named(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 99)):
        pq.write_table(numbers(start, 100), tmp_path / f"{name}.parquet")
    with pytest.raises(BadInputError, match=r"a\.parquet \(0 to 99\) and .*b\.parquet \(from 99\) overlap in 'id'"):
        ParquetSource(tmp_path, order_by="id")
    with pytest.raises(SchemaError, match="no column 'nothing'"):
        ParquetSource(tmp_path, order_by="nothing")


# --- CSV ---------------------------------------------------------------------------------------------------------


def test_csv_types_are_declared_or_inferred_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,when,note,empty\n1,2013-01-01 05:15:00,NA,\n2,2013-01-01 05:16:00,"",\n')
    inferred = CsvSource(tmp_path)
    assert inferred.schema.types == [pa.int64(), pa.timestamp("s"), pa.string(), pa.string()]
    assert rows_of(drain(inferred), inferred.schema)[1]["note"] == ""
    assert rows_of(drain(inferred), inferred.schema)[0]["note"] is None
    declared = CsvSource(tmp_path, schema=pa.schema([("when", pa.timestamp("ms")), ("id", pa.int32())]))
    assert [b.batch.schema for b in drain(declared)] == [declared.schema]
    assert "timestamp[ms]" in declared.describe()["schema"]


def test_a_csv_value_of_another_type_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    rows = "".join(f"{i}\n" for i in range(100))
    (tmp_path / "a.csv").write_text(f"id\n{rows}")
    (tmp_path / "b.csv").write_text("id\nseven\n")
    source = CsvSource(tmp_path)
    source.open(None)
    assert source.poll() is not None
    with pytest.raises(BadInputError, match=r"b\.csv.*byte 3.*seven"):
        source.poll()
    source.close()


def test_csv_headers_must_agree(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,name\n1,x\n")
    (tmp_path / "b.csv").write_text("name,id\nx,1\n")
    with pytest.raises(SchemaError, match=r"b\.csv.*'name', 'id'.*'id', 'name'"):
        CsvSource(tmp_path)
    schema = pa.schema([("id", pa.int64())])
    source = CsvSource(tmp_path, schema=schema)
    assert rows_of(drain(source), schema) == [{"id": 1}, {"id": 1}]
    with pytest.raises(SchemaError, match=r"a\.csv.*other"):
        CsvSource(tmp_path, schema=pa.schema([("other", pa.int64())]))
    (tmp_path / "c.csv").write_text("id,id\n1,1\n")
    with pytest.raises(SchemaError, match=r"c\.csv.*twice"):
        CsvSource(tmp_path, schema=schema)


@pytest.mark.parametrize("block_bytes", [1, 9, 1 << 20])
def test_csv_values_may_hold_line_breaks_when_asked(tmp_path: Path, block_bytes: int) -> None:
    expected = [{"id": i, "text": f'line "one"\nline {i}\n'} for i in range(20)]
    pacsv.write_csv(pa.Table.from_pylist(expected), tmp_path / "a.csv")
    source = CsvSource(tmp_path, newlines_in_values=True, block_bytes=block_bytes)
    assert rows_of(drain(source), source.schema) == expected


@pytest.mark.parametrize("text", ["id,name", "id,name\n", "\ufeffid,name\r\n", "\r\nid,name\n\n\n"])
def test_a_csv_file_with_only_a_header_has_no_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    source = CsvSource(tmp_path)
    assert source.schema.names == ["id", "name"]
    assert drain(source) == []
    (tmp_path / "b.csv").write_text("id,name\n1,last line without a break")
    assert rows_of(drain(CsvSource(tmp_path)), CsvSource(tmp_path).schema) == [
        {"id": 1, "name": "last line without a break"}
    ]


def test_a_csv_file_of_blank_lines_has_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n\n")
    with pytest.raises(BadInputError, match=r"a\.csv.*header"):
        CsvSource(tmp_path)


# --- iterables ---------------------------------------------------------------------------------------------------

BATCHES = [numbers(10 * i, 10).to_batches()[0] for i in range(6)]


def seeking(start: int) -> list[pa.RecordBatch]:
    return BATCHES[start:]


@pytest.mark.parametrize(
    "replayable",
    [pa.Table.from_batches(BATCHES), BATCHES, tuple(BATCHES), lambda: iter(BATCHES), lambda: BATCHES, seeking],
    ids=["table", "list", "tuple", "generator factory", "list factory", "seeking factory"],
)
def test_a_replayable_iterable_restores_at_every_batch(replayable: Any) -> None:
    full = drain(IterableSource(replayable))
    assert [b.batch for b in full] == BATCHES
    for i, batch in enumerate(full):
        rest = drain(IterableSource(replayable, schema=BATCHES[0].schema), through_msgpack(batch.position))
        assert [b.batch for b in rest] == BATCHES[i + 1 :]
        assert [b.position for b in rest] == [b.position for b in full[i + 1 :]]


def test_a_seeking_factory_is_asked_for_the_batch_only() -> None:
    asked: list[int] = []

    def factory(start: int) -> list[pa.RecordBatch]:
        asked.append(start)
        return BATCHES[start:]

    source = IterableSource(factory, schema=BATCHES[0].schema)
    drain(source, {"batches": 4, "rows": 40})
    assert asked == [4]


@pytest.mark.parametrize(
    "once",
    [lambda: iter(BATCHES), lambda: pa.RecordBatchReader.from_batches(BATCHES[0].schema, BATCHES)],
    ids=["iterator", "reader"],
)
def test_a_one_shot_iterator_is_read_once_and_never_restored(once: Any) -> None:
    source = IterableSource(once())
    assert source.total_rows is None
    assert [b.batch for b in drain(source)] == BATCHES
    with pytest.raises(SourceNotReplayableError, match="second time"):
        source.open(None)
    with pytest.raises(SourceNotReplayableError, match="start at batch 2"):
        IterableSource(once()).open({"batches": 2, "rows": 20})


def test_a_factory_that_supplies_other_rows_is_refused() -> None:
    with pytest.raises(SourceChangedError, match="40 rows in 3 batches"):
        IterableSource(BATCHES).open({"batches": 3, "rows": 40})
    with pytest.raises(SourceChangedError, match="60 rows in 6 batches"):
        IterableSource(BATCHES).open({"batches": 7, "rows": 70})


def test_a_batch_with_other_columns_or_no_batch_at_all_is_refused() -> None:
    other = pa.RecordBatch.from_pydict({"id": ["text"]})
    source = IterableSource([BATCHES[0], other])
    source.open(None)
    assert source.poll() is not None
    with pytest.raises(SchemaError, match=r"(?s)batch 1 .*id: string.*id: int64"):
        source.poll()
    with pytest.raises(BadInputError, match="schema"):
        IterableSource(list)
    with pytest.raises(TypeError, match=r"batch 0 .*dict"):
        drain(IterableSource([{"id": 1}], schema=other.schema))
    with pytest.raises(TypeError, match="int"):
        IterableSource(7)  # type: ignore[arg-type]
    assert drain(IterableSource(list, schema=other.schema)) == []


def test_an_error_of_the_users_iterator_passes_through_with_a_note() -> None:
    def failing() -> Any:
        yield BATCHES[0]
        raise KeyError("mine")

    source = IterableSource(failing)
    source.open(None)
    source.poll()
    with pytest.raises(KeyError, match="mine") as caught:
        source.poll()
    assert "batch 1" in caught.value.__notes__[0]


# --- read-ahead --------------------------------------------------------------------------------------------------


def test_read_ahead_is_bounded_and_ordered_and_hands_over_errors_last() -> None:
    made: list[int] = []

    def items() -> Any:
        for i in range(10):
            made.append(i)
            yield i
        raise ValueError("the end")

    ahead = ReadAhead(items(), depth=2, name="test")
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2]
    assert [ahead.next() for _ in range(10)] == list(range(10))
    for _ in range(2):
        with pytest.raises(ValueError, match="the end"):
            ahead.next()
    ahead.close()


def test_closing_a_read_ahead_closes_its_iterator() -> None:
    closed = threading.Event()

    def items() -> Any:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    ahead = ReadAhead(items(), depth=1, name="test")
    ahead.next()
    ahead.close()
    assert closed.is_set()
