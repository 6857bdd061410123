"""Runs a query as a stream that crashes, and the same question in DuckDB over all rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from operators import DataStream, StreamContext
from tests.support.restarts import survive
from tests.support.streams import cut, events

__all__ = ["DIMENSION", "Rows", "answered", "as_rows", "context", "streamed", "tables"]

Rows = Counter[tuple[Any, ...]]

DIMENSION = pa.table({"j": pa.array([0, 1, 1, 7], pa.int64()), "label": ["zero", "one", "uno", "seven"]})
DISORDER_MS = 400

_MACROS = """
CREATE MACRO win(t, size) AS make_timestamp(CAST(floor(epoch_us(t) / (size * 1000000)) AS BIGINT) * size * 1000000);
"""


@lru_cache(1)
def tables() -> Mapping[str, pa.Table]:
    """Rows (n, t, k, j, v, x, s) of two streams; n numbers them, k and v have nulls, t goes back by some."""
    found = {}
    for name, seed, rows in (("a", 11, 360), ("b", 12, 240)):
        rows_of = events(seed, rows, disorder_ms=DISORDER_MS, kind=pa.timestamp("us"), step_ms=100)
        found[name] = rows_of.add_column(0, "n", pa.array(range(rows), pa.int64()))
    return found


def context() -> StreamContext:
    """A job with both streams and the table."""
    found = StreamContext()
    for name, table in tables().items():
        found.register(name, found.from_batches([table], event_time="t", max_disorder=DISORDER_MS, name=name))
    found.register("dim", DIMENSION)
    return found


def streamed(query: str, *, crashes: int = 2, seed: int = 0, directory: Path | None = None) -> pa.Table:
    """What the query publishes, over a job that dies and is restored."""

    def pipeline(streams: Mapping[str, DataStream]) -> Mapping[str, DataStream]:
        job = next(iter(streams.values())).context
        for name, stream in streams.items():
            job.register(name, stream)
        job.register("dim", DIMENSION)
        return {"out": job.sql(query)}

    inputs = {name: cut(table, seed + 1, 40) for name, table in tables().items()}
    used = {name: batches for name, batches in inputs.items() if re.search(rf"(FROM|JOIN|,) {name}\b", query)}
    return survive(
        pipeline, used, seed=seed, crashes=crashes, directory=directory, event_time="t", max_disorder=DISORDER_MS
    )["out"]


def answered(query: str) -> pa.Table:
    """What DuckDB says in batch."""
    with duckdb.connect() as connection:
        for name, table in {**tables(), "dim": DIMENSION}.items():
            connection.register(name, table)
        connection.execute(_MACROS)
        return connection.sql(query).to_arrow_table()


def as_rows(table: pa.Table) -> Rows:
    """The rows that hold after all corrections, as a multiset; numbers to nine digits, times without zone or unit."""
    rows: Rows = Counter()
    for row in table.to_pylist():
        taken = row.pop("op", "insert") in ("delete", "update-before")
        rows[tuple(_plain(value) for value in row.values())] += -1 if taken else 1
    assert all(count >= 0 for count in rows.values()), "a row was taken back that was not there"
    return +rows


def _plain(value: Any) -> Any:
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return float(f"{float(value):.9g}") + 0.0
    if isinstance(value, datetime):
        return value.replace(tzinfo=None)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)  # noqa: DTZ001
    if isinstance(value, list):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _plain(v)) for k, v in value.items())
    return value
