"""What file sinks write in each format comes back, and the commit log tells what counts."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from operators import StreamContext, read_published
from operators.errors import OutputVanishedError, SchemaError
from operators.sinks import ArrowSink, CsvSink, FileSink, JsonSink, ParquetSink, published_rolls
from operators.sources import ArrowSource, CsvSource, JsonSource, ParquetSource
from statebackend import CorruptionError, UnsupportedFormatError

FLAT = pa.table(
    {
        "id": pa.array([1, 2, 3, None], pa.int64()),
        "text": ["", None, 'a "quoted", word\nand a line', "ü"],
        "x": pa.array([0.1, math.inf, None, -0.0]),
        "flag": [True, False, None, True],
        "at": pa.array([1_357_017_300_123_456, None, None, None], pa.timestamp("us")),
        "zoned": pa.array([dt.datetime(2013, 1, 1, 5, 15, tzinfo=dt.UTC), None, None, None], pa.timestamp("ms", "UTC")),
        "day": [dt.date(2013, 1, 1), None, None, None],
        "price": pa.array([decimal.Decimal("1.25"), None, None, decimal.Decimal(-3)], pa.decimal128(9, 2)),
    }
)
NESTED = FLAT.append_column("tags", pa.array([["a", None], [], None, ["b"]])).append_column(
    "place", pa.array([{"x": 1, "y": "one"}, None, {"x": None, "y": "two"}, {"x": 4, "y": None}])
)

SINKS: dict[str, tuple[Callable[..., FileSink], dict[str, Any]]] = {
    "parquet": (ParquetSink, {}),
    "csv": (CsvSink, {}),
    "csv, gzip": (CsvSink, {"compression": "gzip", "delimiter": ";"}),
    "json": (JsonSink, {}),
    "json, zstd": (JsonSink, {"compression": "zstd"}),
    "arrow": (ArrowSink, {}),
    "arrow stream": (ArrowSink, {"stream": True, "compression": "none"}),
}


def publish(table: pa.Table, sink: FileSink) -> None:
    context = StreamContext()
    context.from_batches(table).sink(sink, name="out")
    context.run()


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("partition_by", [[], ["day", "flag"]])
def test_rows_come_back_as_they_were_written(tmp_path: Path, kind: str, partition_by: list[str]) -> None:
    make, options = SINKS[kind]
    table = FLAT if kind.startswith("csv") else NESTED
    if kind.startswith("json"):  # which knows no infinity
        table = table.set_column(2, "x", pa.array([0.1, 1e300, None, -0.0]))
    sink = make(tmp_path, partition_by, **options)
    publish(table, sink)
    found = read_published(tmp_path, verify=True)
    assert found.schema == table.schema
    by_row = sorted(found.read_all().to_pylist(), key=repr)
    assert by_row == sorted(table.to_pylist(), key=repr)
    assert sorted(sink.published().to_pylist(), key=repr) == by_row


def test_other_programs_read_the_files(tmp_path: Path) -> None:
    publish(FLAT.select(["id", "text"]), CsvSink(tmp_path / "csv"))
    (path,) = (tmp_path / "csv").glob("*.csv")
    assert path.read_text().startswith('"id","text"\n1,""\n2,\n3,"a ""quoted"", word')
    assert pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True)).num_rows == 4
    publish(NESTED.select(["id", "tags", "place"]), JsonSink(tmp_path / "json", compression="gzip"))
    (path,) = (tmp_path / "json").glob("*.json.gz")
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert lines[0] == {"id": 1, "tags": ["a", None], "place": {"x": 1, "y": "one"}}
    assert lines[1] == {"id": 2, "tags": []}


@pytest.mark.parametrize(
    ("kind", "source"), [("parquet", ParquetSource), ("csv", CsvSource), ("json", JsonSource), ("arrow", ArrowSource)]
)
def test_a_source_reads_what_a_sink_wrote(tmp_path: Path, kind: str, source: Any) -> None:
    publish(FLAT.select(["id", "flag", "day"]), SINKS[kind][0](tmp_path, ["day"]))
    context = StreamContext()
    schema = pa.schema([("id", pa.int64()), ("flag", pa.bool_())])
    options = {"schema": schema, "partitions": {"day": pa.date32()}}
    read = context.from_source(source(tmp_path, **options))
    read.sink(ArrowSink(tmp_path / "again"), name="again")
    context.run()
    again = read_published(tmp_path / "again").read_all().to_pylist()
    assert sorted(again, key=repr) == sorted(FLAT.select(["id", "flag", "day"]).to_pylist(), key=repr)


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (CsvSink, pa.list_(pa.int64()), "CSV cannot hold"),
        (CsvSink, pa.binary(), "cast 'c' to text"),
        (JsonSink, pa.binary(), "cast 'c' to text"),
        (JsonSink, pa.map_(pa.string(), pa.int64()), "JSON cannot hold"),
        (ParquetSink, pa.month_day_nano_interval(), "Parquet cannot hold"),
    ],
)
def test_columns_that_a_format_cannot_give_back_are_refused(
    tmp_path: Path, make: Any, kind: pa.DataType, reason: str
) -> None:
    with pytest.raises(SchemaError, match=f"(?s){reason}"):
        publish(pa.table({"c": pa.nulls(1, kind)}), make(tmp_path))


def test_a_codec_that_a_format_does_not_have_is_refused(tmp_path: Path) -> None:
    for make in (ParquetSink, CsvSink, JsonSink, ArrowSink):
        with pytest.raises(ValueError, match="compression must be one of"):
            make(tmp_path, compression="zip")


# --- the commit log ----------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    publish(FLAT.select(["id", "flag"]), CsvSink(tmp_path / "out", ["flag"]))
    return tmp_path / "out"


def entry_of(out: Path) -> Path:
    (entry,) = (p for p in (out / "_committed").rglob("*.json") if p.name != "_claim.json")
    return entry


def test_the_log_names_every_file_with_its_rows_and_the_checksum_of_its_bytes(out: Path) -> None:
    (roll,) = published_rolls(out)
    assert (roll.format["kind"], roll.partition_by, roll.rows) == ("csv", ("flag",), 4)
    assert roll.schema == pa.schema([("id", pa.int64()), ("flag", pa.bool_())])
    assert sum(f.rows for f in roll.files) == 4
    assert {f.name: f.bytes for f in roll.files} == {
        str(p.relative_to(out)): p.stat().st_size for p in out.rglob("part-*")
    }


def test_files_that_were_not_published_are_not_read(out: Path) -> None:
    (out / "flag=true" / "part-of-somebody-else.csv").write_text("id\n7\n")
    assert sorted(map(repr, read_published(out).read_all()["id"].to_pylist())) == ["1", "2", "3", "None"]
    with pytest.raises(SchemaError, match="nothing was published there"):
        read_published(out / "nowhere")
    assert read_published(out / "nowhere", schema=FLAT.schema).read_all().equals(FLAT.slice(0, 0))
    with pytest.raises(SchemaError, match=r"(?s)published the columns.*expected.*price"):
        read_published(out, schema=FLAT.schema)


@pytest.mark.parametrize("change", ["rows", "roll", "files"])
def test_an_entry_that_was_changed_is_found_out(out: Path, change: str) -> None:
    entry = json.loads(entry_of(out).read_text())
    entry_of(out).write_text(json.dumps({**entry, change: 0}))
    with pytest.raises(CorruptionError, match=r"_committed/.*checksum"):
        published_rolls(out)
    entry_of(out).write_text(json.dumps({"version": "?"}))
    with pytest.raises(CorruptionError, match="no version"):
        published_rolls(out)
    entry_of(out).write_text(json.dumps({**entry, "version": 99}))
    with pytest.raises(UnsupportedFormatError, match="version 99"):
        read_published(out)


def test_an_entry_that_is_still_being_written_does_not_count_yet(out: Path) -> None:
    entry_of(out).write_bytes(entry_of(out).read_bytes()[:50])
    assert published_rolls(out) == []


def test_files_that_vanished_or_changed_are_named(out: Path) -> None:
    path = out / published_rolls(out)[0].files[0].name
    data = path.read_bytes()
    path.write_bytes(data + b"5\n")
    with pytest.raises(CorruptionError, match=f"{path.name} has .* rows"):
        read_published(out).read_all()
    path.write_bytes(data.replace(b"\n", b" ", 1))
    with pytest.raises(CorruptionError, match=path.name):
        read_published(out, verify=True).read_all()
    path.unlink()
    with pytest.raises(OutputVanishedError, match=path.name):
        read_published(out).read_all()


def test_rolls_of_other_columns_are_refused(out: Path) -> None:
    publish(FLAT.select(["id"]), CsvSink(out, existing="append"))
    with pytest.raises(SchemaError, match=r"(?s)out published the columns.*but out published"):
        read_published(out)


# --- how much memory a sink takes --------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [False, True])
def test_a_sink_that_is_full_holds_back_the_sources(tmp_path: Path, slow: bool) -> None:
    batch = pa.record_batch({"id": range(1000)})
    limit = 5 * batch.nbytes
    sink = ParquetSink(tmp_path, memory_bytes=limit)
    held: list[int] = []
    reading = threading.Event()

    def look(step: str) -> None:
        if step == "poll":
            staging = sum(b.nbytes for roll in tuple(sink._unpublished.values()) for b in roll.batches or ())
            held.append(sink._chunk_bytes + sink._pending.bytes + staging)
            reading.set()
        elif step == "stage" and slow:
            reading.clear()
            reading.wait(0.01)  # as long as the job reads on

    context = StreamContext(checkpoint_interval=None, hook=look)
    context.from_batches([batch] * 100).sink(sink, name="out")
    result = context.run()
    assert sink.published().num_rows == 100_000
    assert 10 <= len(result.checkpoints) <= 25
    assert limit / 2 <= max(held) <= 2 * limit + batch.nbytes
