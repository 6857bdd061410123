"""Tumbling 10 s window, five aggregates, 100,000 Zipf keys, batches of 64k, a checkpoint every second.

The events are in memory, 100,000 per second of event time, so that one window holds a million. Each
run starts a new job on a new store on the local disk; start-up (building and planning the stream,
opening the store, first checkpoint) is reported apart. In the same run DataFusion computes the same
query in one batch over the same events. Runs with and without checkpoints alternate.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datafusion import SessionConfig, SessionContext, col, lit
from datafusion import functions as f

from operators import StreamContext
from operators.sinks import MemorySink, ParquetSink, Sink

__all__ = ["run"]

KEYS = 100_000
BATCH_ROWS = 65_536
EVENTS_PER_SECOND = 100_000  # of event time
WINDOW_MS = 10_000
SCHEMA = pa.schema([("ts", pa.timestamp("ms")), ("key", pa.int64()), ("value", pa.float64())])
START_MS = 1_700_000_000_000 // WINDOW_MS * WINDOW_MS


class Events:
    """An endless, replayable stream: ``distinct`` batches repeated with shifted times."""

    def __init__(self, distinct: int = 64, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        weights = 1.0 / np.arange(1, KEYS + 1)
        rows = distinct * BATCH_ROWS
        keys = rng.choice(KEYS, rows, p=weights / weights.sum())
        times = START_MS + np.arange(rows) * 1000 // EVENTS_PER_SECOND - rng.integers(0, 500, rows)
        self.period_ms = rows * 1000 // EVENTS_PER_SECOND
        self.rows = [
            (times[i : i + BATCH_ROWS], pa.array(keys[i : i + BATCH_ROWS]), pa.array(rng.random(BATCH_ROWS)))
            for i in range(0, rows, BATCH_ROWS)
        ]

    def batch(self, number: int) -> pa.RecordBatch:
        times, keys, values = self.rows[number % len(self.rows)]
        shifted = pa.array(times + number // len(self.rows) * self.period_ms).cast(SCHEMA.field("ts").type)
        return pa.RecordBatch.from_arrays([shifted, keys, values], schema=SCHEMA)


class _CountingSink(MemorySink):
    """Counts rows and keeps none."""

    def write(self, batch: pa.RecordBatch) -> None:
        self.rows = getattr(self, "rows", 0) + batch.num_rows


@dataclass(frozen=True, slots=True)
class Life:
    """One run of the job."""

    events_per_second: float
    startup_s: float
    seconds: float
    events: int
    rows_out: int
    checkpoints: int
    sync_ms: list[float]
    drain_ms: list[float]
    duration_ms: list[float]
    checkpoint_bytes: list[int]


def run(*, seconds: float = 12.0, repeats: int = 3, sink: str = "count") -> dict[str, Any]:
    """All figures; ``seconds`` is the steady state of each run."""
    events = Events()
    batch = [_datafusion_in_one_batch(events) for _ in range(repeats)]
    with_checkpoints, without = [], []
    for _ in range(repeats):
        with_checkpoints.append(_life(events, seconds, 1.0, sink))
        without.append(_life(events, seconds, None, sink))
    rate = statistics.median(x.events_per_second for x in with_checkpoints)
    plain = statistics.median(x.events_per_second for x in without)
    one_batch = statistics.median(batch)
    sync = sorted(ms for x in with_checkpoints for ms in x.sync_ms)
    return {
        "sink": sink,
        "events_per_second": rate,
        "events_per_second_without_checkpoints": plain,
        "datafusion_in_one_batch": one_batch,
        "ratio_to_datafusion": rate / one_batch,
        "cost_of_checkpoints": 1 - rate / plain,
        "sync_ms_p50": statistics.median(sync),
        "sync_ms_max": sync[-1],
        "drain_ms_p50": statistics.median(ms for x in with_checkpoints for ms in x.drain_ms),
        "checkpoint_ms_p50": statistics.median(ms for x in with_checkpoints for ms in x.duration_ms),
        "checkpoint_bytes_p50": statistics.median(b for x in with_checkpoints for b in x.checkpoint_bytes),
        "checkpoints_per_run": [x.checkpoints for x in with_checkpoints],
        "startup_s": statistics.median(x.startup_s for x in with_checkpoints),
        "runs": [x.events_per_second for x in with_checkpoints],
        "runs_without_checkpoints": [x.events_per_second for x in without],
        "rows_out": [x.rows_out for x in with_checkpoints],
    }


def _life(events: Events, seconds: float, interval_s: float | None, sink_kind: str) -> Life:
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        clock = {"first": 0.0, "last": 0.0, "events": 0}

        def feed(start: int) -> Iterator[pa.RecordBatch]:
            number = start
            clock["first"] = time.perf_counter()
            while time.perf_counter() - clock["first"] < seconds:
                yield events.batch(number)
                number += 1
            clock["events"] = (number - start) * BATCH_ROWS

        context = StreamContext(name="bench", state=f"{directory}/state", checkpoint_interval=interval_s or 1e9)
        stream = context.from_batches(feed, schema=SCHEMA, event_time="ts", max_disorder=timedelta(milliseconds=500))
        windows = stream.window([col("key")], _aggregates("value"), timedelta(milliseconds=WINDOW_MS))
        sink: Sink = _CountingSink() if sink_kind == "count" else ParquetSink(str(Path(directory) / "out"))
        windows.sink(sink)
        result = context.run()
        ended = time.perf_counter()
    stats = result.checkpoints[:-1] if interval_s else result.checkpoints
    return Life(
        events_per_second=clock["events"] / (ended - clock["first"]),
        startup_s=clock["first"] - began,
        seconds=ended - clock["first"],
        events=int(clock["events"]),
        rows_out=max(o.rows_in for name, o in result.operators.items() if o.rows_out == 0),
        checkpoints=len(stats),
        sync_ms=[c.sync_ms for c in stats],
        drain_ms=[c.drain_ms for c in stats],
        duration_ms=[c.duration_ms for c in stats],
        checkpoint_bytes=[c.bytes for c in stats],
    )


def _aggregates(value: str) -> list[Any]:
    v = col(value)
    return [
        f.count(lit(1)).alias("cnt"), f.sum(v).alias("total"), f.min(v).alias("lo"), f.max(v).alias("hi"),
        f.avg(v).alias("mean"),
    ]  # fmt: skip


def _datafusion_in_one_batch(events: Events, batches: int = 320) -> float:
    """Events per second of DataFusion over 20 M of the same events, on as many partitions as there are cores."""
    context = SessionContext(SessionConfig().with_target_partitions(2))
    data = [events.batch(i) for i in range(batches)]
    context.register_record_batches("events", [data[::2], data[1::2]])
    began = time.perf_counter()
    rows = 0
    for out in context.sql(
        "SELECT date_bin(INTERVAL '10 seconds', ts) AS w, key, "
        "count(*), sum(value), min(value), max(value), avg(value) "
        "FROM events GROUP BY 1, 2"
    ).execute_stream():
        rows += out.to_pyarrow().num_rows
    return batches * BATCH_ROWS / (time.perf_counter() - began)
