"""A real job in a process of its own, and what a test does with such a process.

As a program it runs one of the pipelines below to its end and reports on its standard output, a JSON
object a line. Its exit code is that of the commands: 3 when it was fenced.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from datafusion import col, lit
from datafusion import functions as f

from operators import DataStream, JobProgress, OperatorError, StreamContext
from operators.exit_codes import exit_code_of
from operators.sources import KafkaSource, ParquetSource
from operators.sources.base import IDLE, Idle, Source, SourceBatch
from statebackend import StateStoreError
from tests.support.kafka import KafkaBroker
from tests.support.streams import as_multiset, events

ROWS = 6_000
DISORDER_MS = 400
SOURCE = "events"
KAFKA = "kafka:"
"""What a source begins with that is a topic: ``kafka:SERVERS/TOPIC``."""
SOON = {"reconnect.backoff.ms": 10, "reconnect.backoff.max.ms": 100}
"""How long a client of a broker that comes and goes in a test waits before it tries again."""
_DEADLINE_S = 60.0


def write_events(directory: Path, seed: int, rows: int = ROWS, files: int = 3) -> pa.Table:
    """Random events as Parquet files; returns them in the order in which they are read."""
    directory.mkdir(parents=True)
    table = events(seed, rows, disorder_ms=DISORDER_MS)
    for i in range(files):
        part = table.slice(i * rows // files, (i + 1) * rows // files - i * rows // files)
        pq.write_table(part, directory / f"{i}.parquet", row_group_size=500)
    return table


def filled_topic(kafka: KafkaBroker, seed: int, rows: int, partitions: int = 3) -> tuple[str, pa.Table]:
    """A topic of random events, dealt out to the partitions; and all of them."""
    table = events(seed, rows, disorder_ms=DISORDER_MS)
    topic = kafka.create_topic(partitions=partitions)
    counted = table.set_column(0, "t", table["t"].cast(pa.int64())).to_pylist()
    for partition in range(partitions):
        kafka.produce(topic, counted[partition::partitions], partition=partition)
    return topic, table


# -- pipelines


def tumbling(stream: DataStream, output: str) -> None:
    aggregates = [
        f.count(lit(1)).alias("n"),
        f.sum(col("v")).alias("total"),
        f.avg(col("x")).alias("mean"),
        f.max(col("s")).alias("greatest"),
    ]
    stream.window(["k", "j"], aggregates, 2_000, name="w").write_parquet(f"{output}/w", ["j"], roll_seconds=0.2)


def sliding(stream: DataStream, output: str) -> None:
    aggregates = [
        f.count(col("s"), distinct=True).alias("different"),
        f.stddev(col("x")).alias("spread"),
        f.last_value(col("v"), order_by=[col(c).sort() for c in ("t", "v", "x")]).alias("last"),
        f.median(col("v")).alias("middle"),
    ]
    windows = stream.filter(col("j") != lit(2)).window(["k"], aggregates, 6_000, 1_000, name="w")
    windows.write_parquet(f"{output}/w", roll_seconds=0.0)


def both(stream: DataStream, output: str) -> None:
    """Two windows and a stateless branch over one source."""
    count = [f.count(lit(1)).alias("n"), f.min(col("v")).alias("low")]
    stream.window(["k"], count, 1_000, name="short").write_parquet(f"{output}/short", roll_seconds=0.3)
    stream.window(["j"], count, 10_000, 2_500, name="long").write_parquet(f"{output}/long", ["j"], roll_rows=200)
    doubled = stream.with_column("v2", col("v") * lit(2)).drop("x")
    doubled.write_parquet(f"{output}/rows", name="rows", roll_rows=500)


def joins(stream: DataStream, output: str) -> None:
    """Two parts of one stream, joined in every way that keeps state."""
    left = stream.filter(col("j") == lit(0)).select("t", "k", "v")
    right = stream.filter(col("j") == lit(1)).select(col("t").alias("u"), "k", col("v").alias("w"))
    near = left.interval_join(right, "k", "full", before=300, after=100, name="near")
    near.write_parquet(f"{output}/near", roll_rows=500)
    left.interval_join(right, "k", "semi", before=100, after=100, name="some").write_parquet(f"{output}/some")
    left.window_join(right, 1_000, 500, on="k", how="left", name="same").write_parquet(f"{output}/same", ["k"])
    left.asof_join(right, "k", "left", name="latest").write_parquet(f"{output}/latest", roll_seconds=0.2)


def keyed(stream: DataStream, output: str) -> None:
    """A changelog, the final rows of an aggregation over it, and rows that are final when the watermark passes."""
    latest = stream.deduplicate(["k", "s"], keep="last", order_by=["v", "x"], name="latest")
    latest.write_parquet(f"{output}/latest", roll_seconds=0.2)
    counts = latest.filter(col("v") > lit(0)).aggregate(
        "k", [f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total")], emit_every=5_000, name="counts"
    )
    counts.final_rows(name="final").write_parquet(f"{output}/final")
    stream.deduplicate(["j", "s"], order_by=["v", "x"], emit="final", name="first").write_parquet(
        f"{output}/first", roll_rows=20
    )
    order = [col("v").sort(ascending=False), col("x").sort()]
    stream.top_n(2, "s", order, window=3_000, with_rank="place", name="top").write_parquet(f"{output}/top")


def topic(stream: DataStream, output: str) -> None:
    """Windows into a topic: ``output`` is ``kafka:SERVERS/TOPIC``."""
    servers, _, name = output.removeprefix(KAFKA).rpartition("/")
    aggregates = [f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total"), f.max(col("s")).alias("greatest")]
    stream.window(["k", "j"], aggregates, 2_000, name="w").write_kafka(
        name, servers, key=["k", "j"], timestamp="window_end_time", name="out", options=SOON
    )


def totals(stream: DataStream, output: str) -> None:
    """A changelog into a table of PostgreSQL: ``output`` is ``URL TABLE``."""
    url, _, table = output.partition(" ")
    aggregates = [f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total")]
    stream.aggregate(["s", "j"], aggregates, name="a").write_postgres(table, url, name="out")


PIPELINES: Mapping[str, Callable[[DataStream, str], None]] = {
    "tumbling": tumbling,
    "sliding": sliding,
    "both": both,
    "joins": joins,
    "keyed": keyed,
    "topic": topic,
    "totals": totals,
}


class PacedTopic(KafkaSource):
    """Waits after each batch, and never catches up."""

    def __init__(self, place: str, batch_rows: int, wait_s: float) -> None:
        servers, _, topic = place.removeprefix(KAFKA).rpartition("/")
        options = {"fetch.wait.max.ms": 10, **SOON}
        schema = events(0, 1).schema
        super().__init__(topic, servers, schema=schema, end="latest", batch_rows=batch_rows, options=options)
        self._wait_s = wait_s

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        item = super().poll()
        if item not in (None, IDLE):
            time.sleep(self._wait_s)
        return item


class PacedSource(ParquetSource):
    """Waits before each batch, and never catches up."""

    def __init__(self, path: str, batch_rows: int, wait_s: float) -> None:
        super().__init__(path, batch_rows=batch_rows)
        self._wait_s = wait_s

    def poll(self) -> SourceBatch | None:
        time.sleep(self._wait_s)
        return super().poll()


def build(
    pipeline: str,
    *,
    source: Path | str | Source,
    state: Path | str | None,
    output: Path | str,
    interval_s: float = 0.1,
    batch_rows: int = 60,
    wait_s: float = 0.0,
    hook: Callable[[str], None] | None = None,
) -> StreamContext:
    context = StreamContext(pipeline, state=state, checkpoint_interval=interval_s, hook=hook)
    if isinstance(source, (str, Path)):
        paced = PacedTopic if str(source).startswith(KAFKA) else PacedSource
        source = paced(str(source), batch_rows, wait_s)
    stream = context.from_source(source, event_time="t", max_disorder=DISORDER_MS, name=SOURCE)
    PIPELINES[pipeline](stream, str(output))
    return context


# -- what a test looks at


def read_output(output: Path) -> dict[str, Counter[tuple[Any, ...]]]:
    """The rows of every sink as multisets, as any reader of Parquet directories finds them."""
    found = {}
    for directory in sorted(p for p in output.iterdir() if p.is_dir()):
        table = pads.dataset(directory, format="parquet", partitioning="hive").to_table()
        found[directory.name] = as_multiset(table.select(sorted(table.column_names)))
    return found


class JobProcess:
    """One life of a job. Use as a context manager: it never outlives the block."""

    def __init__(self, pipeline: str, *, source: Path | str, state: Path, output: Path, **options: object) -> None:
        arguments = {"source": source, "state": state, "output": output, **options}
        command = [sys.executable, "-m", "tests.end_to_end.job_process", pipeline]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        self.pid = self._process.pid
        self.reports: list[dict[str, Any]] = []

    def __enter__(self) -> JobProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def last(self) -> dict[str, Any]:
        return self.reports[-1]

    def wait_for(self, reached: Callable[[dict[str, Any]], bool]) -> bool:
        """Read reports until one is as wanted; False if the process ended before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith("\n"):
                break  # torn by a kill
            self.reports.append(json.loads(line))
            if reached(self.last):
                return True
        return False

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Read on to the end of the process; its exit code and what it said on standard error."""
        self.wait_for(lambda _: False)
        _, errors = self._process.communicate(timeout=_DEADLINE_S)
        return self._process.returncode, errors

    def kill(self) -> bool:
        """SIGKILL; whether that was what ended it."""
        self._process.kill()
        return self.wait()[0] == -signal.SIGKILL


# -- the program


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline", choices=PIPELINES)
    parser.add_argument("--source", required=True)
    parser.add_argument("--state", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--interval-s", type=float, default=0.1)
    parser.add_argument("--wait-s", type=float, default=0.0)
    parser.add_argument("--kill-at", default="", metavar="STEP:N", help="SIGKILL at the Nth time of a protocol step")
    args = parser.parse_args()
    context = build(
        args.pipeline,
        source=args.source,
        state=args.state,
        output=args.output,
        interval_s=args.interval_s,
        wait_s=args.wait_s,
        hook=_killer(args.kill_at) if args.kill_at else None,
    )

    def on_progress(progress: JobProgress) -> None:
        checkpoint = max((c.checkpoint_id for c in progress.checkpoints), default=None)
        _say(
            rows=_rows_before(progress.positions.get(SOURCE)),
            start_rows=_rows_before(progress.positions.get(SOURCE)) - progress.rows_read,
            restored_from=progress.restored_from,
            checkpoint=checkpoint,
        )

    try:
        result = context.run(on_progress)
    except (OperatorError, StateStoreError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return exit_code_of(error)
    restored = _rows_before(result.restored_positions.get(SOURCE))
    _say(outcome=str(result.outcome), restored_from=result.restored_from, start_rows=restored)
    return 0


def _rows_before(position: Mapping[str, Any] | None) -> int:
    if position is None:
        return 0
    return position["rows"] if "rows" in position else sum(o for split, o in position.items() if "/" in split)


def _killer(where: str) -> Callable[[str], None]:
    step, _, number = where.partition(":")
    left = [int(number)]

    def hook(name: str) -> None:
        left[0] -= name == step
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _say(**report: object) -> None:
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
