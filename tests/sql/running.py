"""Runs queries as streams, undisturbed or with crashes, and the same questions in DuckDB over all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from operators import DataStream, StreamContext
from operators.sinks import MemorySink
from tests.support.restarts import survive
from tests.support.streams import cut, events

__all__ = [
    "Rows",
    "answered",
    "as_rows",
    "context",
    "differences",
    "streamed",
    "streamed_together",
    "survived",
    "tables",
]

Rows = Counter[tuple[Any, ...]]

DIMENSION = pa.table({"j": pa.array([0, 1, 1, 7, None], pa.int64()), "label": ["zero", "one", "uno", "seven", "none"]})
PRODUCT = pa.table({"id": pa.array([0, 2], pa.int64()), "name": ["chair", "table"]})
DISORDER_MS = 400

_VIEWS = {
    "bid": "SELECT n AS bid_id, t AS bidtime, v AS price, s AS item, k AS supplier_id FROM a",
    "orders": "SELECT n AS order_id, t AS order_time, j AS product_id, k AS users, v AS amount, x AS tax FROM a",
    "shipments": "SELECT n AS order_id, t AS ship_time, k AS carrier FROM b",
    "cars": """SELECT t AS time, n % 23 AS driver_id, CASE WHEN v > 0 THEN 'pickup' ELSE 'dropoff' END AS event_type,
               k AS location, x AS load FROM a""",
    "impulse": "SELECT t AS time, n AS counter, j AS subtask_index, x AS load FROM a",
}
"""The streams of the documentations of Flink and of Arroyo, as queries over ours."""

_MACROS = """
CREATE MACRO win(t, size) AS make_timestamp(CAST(floor(epoch_us(t) / (size * 1000000)) AS BIGINT) * size * 1000000);
CREATE MACRO tumble(t, size) AS time_bucket(size, t, TIMESTAMP '1970-01-01 00:00:00');
CREATE MACRO date_bin(size, t) AS time_bucket(size, t, TIMESTAMP '1970-01-01 00:00:00');
"""


@lru_cache(1)
def tables() -> Mapping[str, pa.Table]:
    """Rows (n, t, k, j, v, x, s) of two streams; n numbers them, k and v have nulls, t goes back by some."""
    found = {}
    for name, seed, rows in (("a", 11, 360), ("b", 12, 240)):
        rows_of = events(seed, rows, disorder_ms=DISORDER_MS, kind=pa.timestamp("us"), step_ms=100)
        found[name] = rows_of.add_column(0, "n", pa.array(range(rows), pa.int64()))
    return found


@lru_cache
def _batches(seed: int, mean_rows: int) -> Mapping[str, list[pa.RecordBatch]]:
    return {name: cut(table, seed, mean_rows) for name, table in tables().items()}


def context(batches: Mapping[str, Sequence[pa.RecordBatch]] | None = None) -> StreamContext:
    """A job with both streams, their views, and the tables."""
    found = StreamContext(checkpoint_interval=None, worker_threads=1)
    for name, table in tables().items():
        rows = [table] if batches is None else batches[name]
        found.from_batches(rows, table.schema, event_time="t", max_disorder=DISORDER_MS, name=name)
    _complete(found)
    return found


def _complete(job: StreamContext) -> None:
    """Register what a query may name beside the streams of the sources."""
    job.register("dim", DIMENSION)
    job.register("product", PRODUCT)
    for name, query in _VIEWS.items():
        job.register(name, job.sql(query, name=name))


def streamed(query: str, *, crashes: int = 2, seed: int = 0, directory: Path | str | None = None) -> pa.Table:
    """What the query publishes, over a job that dies and is restored."""
    return survived([query], crashes=crashes, seed=seed, directory=directory)[0]


def survived(
    queries: Sequence[str], *, crashes: int, seed: int = 0, directory: Path | str | None = None
) -> list[pa.Table]:
    """What each query publishes, all of them in one job that dies at random batches and is restored."""

    def pipeline(streams: Mapping[str, DataStream]) -> Mapping[str, DataStream]:
        job = next(iter(streams.values())).context
        _complete(job)
        return {str(number): job.sql(query, name=f"q{number}") for number, query in enumerate(queries)}

    found = survive(
        pipeline,
        _batches(seed + 1, 40),
        seed=seed,
        crashes=crashes,
        incident_chance=0.25,
        directory=directory,
        event_time="t",
        max_disorder=DISORDER_MS,
    )
    return [found[str(number)] for number in range(len(queries))]


def streamed_together(queries: Sequence[str], seed: int = 1) -> list[pa.Table]:
    """What each query emits, all of them in one undisturbed job."""
    job = context(_batches(seed, 150))
    found = [MemorySink() for _ in queries]
    for number, (query, sink) in enumerate(zip(queries, found, strict=True)):
        try:
            job.sql(query, name=f"q{number}").sink(sink, name=f"out-{number}")
        except Exception as error:
            error.add_note(query)
            raise
    job.run()
    return [sink.table() for sink in found]


@lru_cache(1)
def _duckdb() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    for name, table in {**tables(), "dim": DIMENSION, "product": PRODUCT}.items():
        connection.register(name, table)
    connection.execute(_MACROS)
    for name, query in _VIEWS.items():
        connection.execute(f"CREATE VIEW {name} AS {query}")
    return connection


def answered(query: str) -> pa.Table:
    """What DuckDB says in batch."""
    return _duckdb().sql(query).to_arrow_table()


def differences(found: pa.Table, wanted: pa.Table) -> str:
    """How a stream's rows differ from those wanted, for messages; empty if they do not."""
    names = [name for name in found.column_names if name != "op"]
    if names != wanted.column_names:
        return f"columns {names}, wanted {wanted.column_names}"
    one, other = as_rows(found), as_rows(wanted)
    if one == other:
        return ""
    return f"too much: {list((one - other).items())[:5]}, missing: {list((other - one).items())[:5]}"


def as_rows(table: pa.Table) -> Rows:
    """The rows that hold after all corrections, as a multiset; numbers to nine digits, times without zone or unit.

    Fails where a row is taken back that is not there.
    """
    rows: Rows = Counter()
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    ops = columns.pop("op", ["insert"] * table.num_rows)
    plain = [[_plain(value) for value in column] for column in columns.values()]
    for op, row in zip(ops, zip(*plain, strict=True), strict=True):
        taken = op in ("delete", "update-before")
        assert not taken or rows[row] > 0, f"{row} is taken back, but is not there"
        rows[row] += -1 if taken else 1
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
