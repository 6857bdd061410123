"""Random event streams, an exactly-once sink for tests, and a one-shot SQL answer to compare with."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datafusion import SessionContext

from operators.sinks.base import Guarantee, Prepared, SinkContext

AGGREGATES = "count(1) AS n, sum(v) AS total, min(v) AS low, max(v) AS high, avg(x) AS mean, max(s) AS last"


def events(
    seed: int, rows: int, *, disorder_ms: int = 0, kind: pa.DataType | None = None, step_ms: int = 50
) -> pa.Table:
    """Rows (t, k, j, v, x, s): times that go on by ``step_ms`` with some disorder, keys with nulls."""
    rng = np.random.default_rng(seed)
    times = (np.arange(rows) - rows // 3) * step_ms - (rng.integers(0, disorder_ms + 1, rows) if disorder_ms else 0)
    kind = kind or pa.timestamp("us", "UTC")
    per_s = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[kind.unit]
    raw = times * per_s // 1000
    names = [None, "a", "b", "Ä", "long key " * 4]
    return pa.table(
        {
            "t": pa.array(raw).view(kind),
            "k": pa.array([names[i] for i in rng.integers(0, len(names), rows)]),
            "j": pa.array(rng.integers(0, 3, rows).astype(np.int32)),
            "v": pa.array(rng.integers(-1000, 1000, rows), mask=rng.random(rows) < 0.05),
            "x": pa.array(rng.normal(size=rows)),
            "s": pa.array([f"s{i}" for i in rng.integers(0, 50, rows)]),
        }
    )


def cut(table: pa.Table, seed: int, mean_rows: int = 60) -> list[pa.RecordBatch]:
    """The rows in batches of random sizes, empty ones among them."""
    rng = np.random.default_rng(seed)
    batches, at = [], 0
    whole = table.combine_chunks().to_batches()[0]
    while at < table.num_rows:
        size = int(rng.integers(0, 2 * mean_rows))
        batches.append(whole.slice(at, size))
        at += size
    return batches


def milliseconds_of(column: pa.ChunkedArray) -> list[int]:
    per_ms = {"s": 1 / 1000, "ms": 1, "us": 1000, "ns": 10**6}[column.type.unit]
    return [math.floor(t / per_ms) for t in column.combine_chunks().view(pa.int64()).to_pylist()]


def one_shot(
    table: pa.Table, length: int, slide: int, keys: Sequence[str] = ("k", "j"), select: str = AGGREGATES
) -> pa.Table:
    """What one SQL query says: each row once per window that holds it, enumerated here, then GROUP BY."""
    places, starts = [], []
    for row, time in enumerate(milliseconds_of(table["t"])):
        start = math.floor(time / slide) * slide
        while start + length > time:
            places.append(row)
            starts.append(start)
            start -= slide
    zone = table["t"].type.tz
    rows = table.take(pa.array(places, pa.int64()))
    rows = rows.append_column("window_start_time", pa.array(starts, pa.int64()).cast(pa.timestamp("ms", zone)))
    ends = pa.array([s + length for s in starts], pa.int64()).cast(pa.timestamp("ms", zone))
    rows = rows.append_column("window_end_time", ends)
    session = SessionContext()
    session.register_record_batches("rows", [rows.to_batches()])
    group = ", ".join(["window_start_time", "window_end_time", *keys])
    return session.sql(f"SELECT {group}, {select} FROM rows GROUP BY {group}").to_arrow_table()


def as_multiset(table: pa.Table) -> Counter[tuple[Any, ...]]:
    """The rows, floats rounded to nine digits: merging orders differ. NaN equals NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and math.isnan(value):
            return "NaN"
        return float(f"{value:.9g}") + 0.0 if isinstance(value, float) else value

    return Counter(tuple(plain(v) for v in row.values()) for row in table.to_pylist())


class Ledger:
    """What sinks have published, by the name of each piece; outlives the jobs that write to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pieces: dict[str, bytes] = {}
        self.publications = 0

    def table(self) -> pa.Table:
        """All published rows."""
        with self.lock:
            pieces = [self.pieces[name] for name in sorted(self.pieces)]
        return pa.concat_tables(pa.ipc.open_stream(piece).read_all() for piece in pieces)


class LedgerSink:
    """Exactly once: each committable carries its rows and a name that is published once."""

    guarantee = Guarantee.EXACTLY_ONCE

    def __init__(self, ledger: Ledger, tag: str = "ledger") -> None:
        self.ledger = ledger
        self.tag = tag
        self.closed = 0
        self._rows: list[pa.RecordBatch] = []
        self._pending: dict[str, bytes] = {}
        self._published: set[str] = set()
        self._attempt = ""

    def describe(self) -> Mapping[str, Any]:
        return {"kind": self.tag}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        self._schema = context.schema
        self._attempt = context.attempt
        self._pending = {c["name"]: c["rows"] for c in committables}
        self.publish(committables)

    def write(self, batch: pa.RecordBatch) -> None:
        assert batch.schema.equals(self._schema), f"{batch.schema} != {self._schema}"
        self._rows.append(batch)

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:
        self._pending = {n: r for n, r in self._pending.items() if n not in self._published}
        if self._rows:
            stream = pa.BufferOutputStream()
            with pa.ipc.new_stream(stream, self._schema) as writer:
                for batch in self._rows:
                    writer.write_batch(batch)
            self._pending[f"{checkpoint_id:08d}-{self._attempt}"] = stream.getvalue().to_pybytes()
            self._rows = []
        return Prepared([{"name": n, "rows": r} for n, r in self._pending.items()])

    def publish(self, committables: Sequence[Any]) -> None:
        for committable in committables:
            with self.ledger.lock:
                self.ledger.pieces.setdefault(committable["name"], committable["rows"])
                self.ledger.publications += 1
            self._published.add(committable["name"])

    def close(self) -> None:
        self.closed += 1
