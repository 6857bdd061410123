"""What the demo computes, said twice: as a streaming job and as one SQL query.

Both give, per origin and carrier, in windows of one hour and in windows of six hours that start
every hour: the number of flights, the mean, maximum and 95th percentile of the departure delay, the
number of different aircraft, and the last flight. Cancelled flights have no delay and perhaps no
tail number; every function passes over such nulls, in both. Last means the greatest by scheduled
time, carrier, flight and tail number (null first), which orders all flights but equal ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import SessionConfig, SessionContext, col, literal
from datafusion import functions as f

from operators.checkpoint import Hook
from operators.context import StreamContext
from operators.sources import ParquetSource
from operators.sources.base import Idle, Position, SourceBatch
from statebackend import StateBackend

__all__ = ["EVENT_TIME", "KEYS", "MAX_DISORDER", "WINDOWS", "FlightSource", "build_job", "sql_answer"]

EVENT_TIME = "sched_time"
MAX_DISORDER = timedelta(minutes=20)
"""How far behind the latest scheduled time a flight may come in the stream."""
WINDOWS = {"tumbling": timedelta(hours=1), "sliding": timedelta(hours=6)}
"""Length of each kind of window; all start every hour."""
SLIDE = timedelta(hours=1)
KEYS = ("window_start_time", "origin", "carrier")
"""What identifies a row of the output."""

_ROLL_S = 1.0
_CATCH_UP_S = 0.2
"""So much delay a paced source makes good; more would come as one burst."""
_LAST_ORDER = (EVENT_TIME, "carrier", "flight", "tailnum")


def build_job(
    source: FlightSource,
    *,
    state: str | os.PathLike[str] | StateBackend,
    output: str | os.PathLike[str],
    checkpoint_interval_s: float,
    hook: Hook | None = None,
) -> StreamContext:
    """The streaming job: Parquet directories ``tumbling`` and ``sliding`` below ``output``, by origin."""
    context = StreamContext("flights", state=state, checkpoint_interval=checkpoint_interval_s, hook=hook)
    flights = context.from_source(source, event_time=EVENT_TIME, max_disorder=MAX_DISORDER, name="flights")
    order: list[Any] = [col(name).sort(ascending=True, nulls_first=True) for name in _LAST_ORDER]
    aggregates = [
        f.count(literal(1)).alias("flights"),
        f.avg(col("dep_delay")).alias("mean_delay"),
        f.max(col("dep_delay")).alias("max_delay"),
        f.approx_percentile_cont(col("dep_delay").sort(), 0.95).alias("p95_delay"),
        f.count(col("tailnum"), distinct=True).alias("aircraft"),
        f.last_value(col("flight"), order_by=order).alias("last_flight"),
    ]
    for kind, length in WINDOWS.items():
        windows = flights.window(["origin", "carrier"], aggregates, length, SLIDE, name=kind)
        target = f"{os.fspath(output)}/{kind}"
        windows.write_parquet(target, ["origin"], name=f"{kind}-parquet", roll_seconds=_ROLL_S)
    return context


_SQL = """
WITH panes AS (
    SELECT date_bin(INTERVAL '1 hour', sched_time) AS pane, * FROM flights
), windows AS (
    SELECT 'tumbling' AS kind, pane AS window_start_time, pane + INTERVAL '1 hour' AS window_end_time, panes.*
    FROM panes
    UNION ALL
    SELECT 'sliding', pane - ago AS window_start_time, pane - ago + INTERVAL '6 hours', panes.*
    FROM panes CROSS JOIN (VALUES
        (INTERVAL '0 hours'), (INTERVAL '1 hour'), (INTERVAL '2 hours'),
        (INTERVAL '3 hours'), (INTERVAL '4 hours'), (INTERVAL '5 hours')) AS offsets(ago)
), aircraft AS (
    -- what count(DISTINCT tailnum) says, which would keep a set of 8 KiB for each of 334,000 groups
    SELECT kind, window_start_time, origin, carrier, count(tailnum) AS aircraft
    FROM (SELECT DISTINCT kind, window_start_time, origin, carrier, tailnum FROM windows)
    GROUP BY kind, window_start_time, origin, carrier
), delays AS (
    SELECT
        kind, window_start_time, window_end_time, origin, carrier,
        count(*) AS flights,
        avg(dep_delay) AS mean_delay,
        max(dep_delay) AS max_delay,
        approx_percentile_cont(0.95) WITHIN GROUP (ORDER BY dep_delay) AS p95_delay,
        last_value(flight ORDER BY
            sched_time NULLS FIRST, carrier NULLS FIRST, flight NULLS FIRST, tailnum NULLS FIRST) AS last_flight
    FROM windows
    GROUP BY kind, window_start_time, window_end_time, origin, carrier
)
SELECT * FROM delays JOIN aircraft USING (kind, window_start_time, origin, carrier)
"""


def sql_answer(flights: Path) -> dict[str, pa.Table]:
    """The same from one query over all files of the directory ``flights``, by kind of window."""
    session = SessionContext(SessionConfig({"datafusion.execution.parquet.schema_force_view_types": "false"}))
    session.register_parquet("flights", flights)
    answer = session.sql(_SQL).to_arrow_table()
    return {kind: answer.filter(pc.equal(answer["kind"], kind)).drop_columns("kind") for kind in WINDOWS}


class FlightSource:
    """A `ParquetSource` over the flights, slowed down to so many rows per second.

    Its identity is how the flights were made and not where their files lie, so a kept job goes on
    with a new copy. ``start_rows``: rows before the position it was opened at.
    """

    def __init__(self, flights: Path, *, seed: int, batch_rows: int, rows_per_s: float | None) -> None:
        self._source = ParquetSource(flights, batch_rows=batch_rows)
        self._seed = seed
        self._rows_per_s = rows_per_s
        self._due = 0.0
        self.start_rows = 0

    @property
    def schema(self) -> pa.Schema:
        """See `read_flights`."""
        return self._source.schema

    @property
    def total_rows(self) -> int | None:
        """All rows of the file."""
        return self._source.total_rows

    def describe(self) -> Mapping[str, Any]:
        """Which flights, in which order."""
        return {"kind": "flights", "rows": self.total_rows, "seed": self._seed}

    def open(self, position: Position | None) -> None:
        """Start at a position."""
        self._source.open(position)
        self.start_rows = 0 if position is None else int(position["rows"])
        self._due = time.monotonic()

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch, when it is due."""
        item = self._source.poll()
        if isinstance(item, SourceBatch) and self._rows_per_s is not None:
            now = time.monotonic()
            self._due = max(self._due, now - _CATCH_UP_S) + item.batch.num_rows / self._rows_per_s
            time.sleep(max(0.0, self._due - now))
        return item

    def close(self) -> None:
        """Close the file."""
        self._source.close()
