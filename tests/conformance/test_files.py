"""File sources and sinks on every filesystem, S3 through a real server among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from operators import StreamContext, read_published
from operators.sinks import CsvSink, ParquetSink, published_rolls
from operators.sources import CsvSource, Follow, ParquetSource
from operators.testing import check_exactly_once, check_source, ends_after
from tests.conformance.conftest import Place

KINDS = ["local", "memory", "s3"]
TABLE = pa.table({"id": range(40), "word": ["a", "b"] * 20})


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, place_of: Callable[[str], Place]) -> Place:
    return place_of(request.param)


def test_a_file_sink_is_exactly_once(place: Place) -> None:
    def pipeline(context: StreamContext, trial: Path) -> None:
        sink = ParquetSink(f"{place.url}/{trial.name}", ["word"], roll_rows=1, storage_options=place.options)
        context.from_batches(TABLE.to_batches(max_chunksize=20), name="in").sink(sink, name="out")

    report = check_exactly_once(pipeline, times_per_step=1, steps=("staged", "committed", "publish"))
    assert report.rows == {"out": 40}


def test_what_is_published_is_read_whole_and_nothing_else(place: Place) -> None:
    context = StreamContext()
    sink = CsvSink(place.url, compression="gzip", storage_options=place.options)
    context.from_batches(TABLE).sink(sink, name="out")
    context.run()
    fs, root = fsspec.core.url_to_fs(place.url, **place.options)
    fs.pipe_file(f"{root}/somebody-else.csv", b"id,word\n7,x\n")
    assert read_published(place.url, verify=True, storage_options=place.options).read_all().equals(TABLE)
    assert len(published_rolls(place.url, place.options)) == 1


@pytest.mark.parametrize("order", ["name", "time"])
def test_a_directory_is_followed(place: Place, order: str) -> None:
    fs, root = fsspec.core.url_to_fs(place.url, **place.options)
    for number in range(3):
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, "gzip") as compressed:
            pacsv.write_csv(TABLE, compressed)
        fs.makedirs(f"{root}/day={number}", exist_ok=True)
        fs.pipe_file(f"{root}/day={number}/x.csv.gz", out.getvalue().to_pybytes())

    def make() -> CsvSource:
        follow = Follow(order=order, poll_seconds=0.001)  # type: ignore[arg-type]
        return CsvSource(
            place.url, block_bytes=100, follow=follow, partitions={"day": pa.int64()}, storage_options=place.options
        )

    assert make().schema.names == ["id", "word", "day"]
    assert check_source(lambda: ends_after(make(), 120), places=2) == 120


def test_a_list_of_files_and_a_glob_need_their_options_too(place: Place) -> None:
    context = StreamContext()
    sink = ParquetSink(place.url, ["word"], storage_options=place.options)
    context.from_batches(TABLE).sink(sink, name="out")
    context.run()
    names = [file.name for roll in published_rolls(place.url, place.options) for file in roll.files]
    paths = [f"{place.url}/{name}" for name in names]
    assert check_source(lambda: ParquetSource(paths, storage_options=place.options), places=1) == 40
    assert check_source(lambda: ParquetSource(f"{place.url}/word=*/*", storage_options=place.options), places=1) == 40
