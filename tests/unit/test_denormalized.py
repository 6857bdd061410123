"""Programs written for Denormalized run, with what they lacked: windows that keep their keys over a restart."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators import BadInputError, SchemaError, SourceChangedError, StreamContext, UserFunctionError
from operators.denormalized import Accumulator, Context, col, lit, udaf, udf
from operators.denormalized import functions as f
from operators.formats import JsonFormat
from operators.sinks import MemorySink
from operators.topics import MemoryTopics, TopicSource, schema_of_json
from tests.support.kafka import KafkaBroker

SAMPLE = json.dumps({"occurred_at_ms": 100, "sensor_name": "foo", "reading": 0.0})
SERVER = "localhost:9092"


def measurements(topics: MemoryTopics, topic: str, rows: int, step: int = 50) -> list[dict[str, Any]]:
    sent = [
        {"occurred_at_ms": i * step, "sensor_name": f"sensor_{i % 7}", "reading": float(i % 11)} for i in range(rows)
    ]
    topics.send(topic, sent)
    topics.close(topic)
    return sent


def collected(rows: list[dict[str, Any]]) -> Any:
    return lambda batch: rows.extend(batch.to_pylist())


def test_the_aggregate_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    topics, rows = MemoryTopics(), []
    sent = measurements(topics, "temperature", 400)
    ctx = Context(transport=topics)
    ds = ctx.from_topic("temperature", SAMPLE, SERVER, "occurred_at_ms", "my_group")
    assert ds.schema().names == list(sent[0])
    windows = (
        ds.window(
            [col("sensor_name")],
            [
                f.count(col("reading"), distinct=False, filter=None).alias("count"),
                f.min(col("reading")).alias("min"),
                f.avg(col("reading")).alias("average"),
            ],
            1000,
            None,
        )
        .filter(col("count") > lit(0))
        .print_schema()
        .print_plan()
        .print_physical_plan()
    )
    windows.sink(collected(rows))
    assert list(rows[0]) == ["window_start_time", "window_end_time", "sensor_name", "count", "min", "average"]
    assert sum(r["count"] for r in rows) == 400
    assert len(rows) == len({(s["occurred_at_ms"] // 1000, s["sensor_name"]) for s in sent})
    printed = capsys.readouterr().out
    assert "window_start_time: timestamp[ms]" in printed
    assert printed.count("| state") == 2


def test_the_aggregate_example_runs_from_kafka_to_kafka_and_goes_on_where_it_was(
    kafka: KafkaBroker, tmp_path: Path
) -> None:
    topic, out = kafka.create_topic(partitions=2), kafka.create_topic()

    def send(first: int, rows: int) -> None:
        for partition in range(2):
            times = range(first, first + 50 * rows, 50)
            sent = [{"occurred_at_ms": t, "sensor_name": f"s{partition}", "reading": 1.0} for t in times]
            kafka.produce(topic, sent, partition=partition)

    def found() -> list[dict[str, Any]]:
        return [json.loads(record.value()) for record in kafka.records(out)]

    def run_until(rows: int) -> None:
        def stop() -> None:
            while len(found()) < rows and not ended.wait(0.05):
                pass
            os.kill(os.getpid(), signal.SIGINT)

        ended = threading.Event()
        watcher = threading.Thread(target=stop)
        watcher.start()
        ctx = Context(str(tmp_path / "state"), checkpoint_interval=0.1)
        ds = ctx.from_topic(topic, SAMPLE, kafka.servers, "occurred_at_ms", f"group-{topic}")
        windows = ds.window([col("sensor_name")], [f.count(col("reading")).alias("count")], 1000, None)
        try:
            windows.sink_kafka(kafka.servers, out)
        finally:
            ended.set()
            watcher.join()

    send(0, 50)
    run_until(4)
    send(2500, 50)
    run_until(8)
    windows = Counter((str(r["window_start_time"])[17:19], r["sensor_name"], r["count"]) for r in found())
    assert windows == Counter({(f"{second:02}", f"s{p}", 20): 1 for second in range(4) for p in range(2)})


def test_the_join_example_runs() -> None:
    topics, rows = MemoryTopics(), []
    for topic in ("temperature", "humidity"):
        measurements(topics, topic, 300)
    ctx = Context(transport=topics)
    temperature = ctx.from_topic("temperature", SAMPLE, SERVER, "occurred_at_ms")
    humidity = (
        ctx.from_topic("humidity", SAMPLE, SERVER, "occurred_at_ms")
        .with_column("humidity_sensor", col("sensor_name"))
        .drop_columns(["sensor_name"])
        .window([col("humidity_sensor")], [f.count(col("reading")).alias("avg_humidity")], 4000, None)
        .with_column("humidity_window_start_time", col("window_start_time"))
        .with_column("humidity_window_end_time", col("window_end_time"))
        .drop_columns(["window_start_time", "window_end_time"])
    )
    temperature.window([col("sensor_name")], [f.avg(col("reading")).alias("avg_temperature")], 4000, None).join(
        humidity, "inner", ["sensor_name", "window_start_time"], ["humidity_sensor", "humidity_window_start_time"]
    ).sink(collected(rows))
    assert len(rows) == 4 * 7
    assert all(r["window_start_time"] == r["humidity_window_start_time"] for r in rows)
    assert all(r["sensor_name"] == r["humidity_sensor"] for r in rows)


class TotalValuesRead(Accumulator):  # type: ignore[misc]
    """Written for the older interface: ``merge`` gets one array, the others return arrays of one value."""

    acc_state_type = pa.struct([("counts", pa.map_(pa.string(), pa.int64()))])

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def update(self, values: pa.Array) -> None:
        self.counts.update(values.to_pylist())

    def merge(self, states: pa.Array) -> None:
        for state in states:
            self.counts.update(dict(state["counts"].as_py() or []))

    def state(self) -> pa.Array:
        return pa.array([{"counts": list(self.counts.items())}], type=self.acc_state_type)

    def evaluate(self) -> pa.Array:
        return pa.array([json.dumps(self.counts, sort_keys=True)])


def test_the_examples_of_python_functions_run() -> None:
    topics, rows = MemoryTopics(), []
    sent = measurements(topics, "temperature", 100)
    sample_udaf = udaf(TotalValuesRead, [pa.string()], pa.string(), [TotalValuesRead.acc_state_type], "stable")
    greater_than_5 = udf(lambda values: pa.compute.greater(values, 5.0), [pa.float64()], pa.bool_(), "stable", "gt5")
    ctx = Context(transport=topics)
    ds = ctx.from_topic("temperature", SAMPLE, SERVER, "occurred_at_ms")
    ds = ds.with_column("high", greater_than_5(col("reading"))).filter(col("high")).select([col("sensor_name")])
    ds.window([], [sample_udaf(col("sensor_name")).alias("count")], 100_000, None).sink(collected(rows))
    (row,) = rows
    assert json.loads(row["count"]) == Counter(s["sensor_name"] for s in sent if s["reading"] > 5)


def test_join_on_and_print_stream_run(capsys: pytest.CaptureFixture[str]) -> None:
    topics = MemoryTopics()
    for topic in ("a", "b"):
        measurements(topics, topic, 5)
    ctx = Context(transport=topics)
    a = ctx.from_topic("a", SAMPLE, SERVER, "occurred_at_ms").select([col("sensor_name"), col("reading")])
    b = ctx.from_topic("b", SAMPLE, SERVER, "occurred_at_ms").select(
        [col("sensor_name").alias("other"), col("reading").alias("theirs")]
    )
    a.join_on(b, "inner", [col("sensor_name") == col("other")]).print_stream()
    printed = capsys.readouterr().out
    assert printed.count("sensor_3") == 2
    assert "_event_time" not in printed


def test_results_go_to_a_topic_and_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    topics = MemoryTopics()
    state = str(tmp_path / "state")

    def run(fail_at: float | None) -> None:
        def check(values: pa.Array) -> pa.Array:
            if fail_at is not None and pa.compute.max(values).as_py() >= fail_at:
                raise ValueError("power cut")
            return values

        checked = udf(check, [pa.float64()], pa.float64(), "stable", "checked")
        ctx = Context(state, transport=topics, checkpoint_interval=0.001)
        ds = ctx.from_topic("temperature", SAMPLE, SERVER, "occurred_at_ms").with_column(
            "reading", checked(col("reading"))
        )
        ds.window([col("sensor_name")], [f.count(col("reading")).alias("n")], 10_000).sink_kafka(SERVER, "out")

    topics.send("temperature", [{"occurred_at_ms": i, "sensor_name": "a", "reading": 1.0} for i in range(50)])
    topics.close("temperature")
    run(None)
    assert topics.messages("out")[0]["n"] == 50
    # The topic goes on; a job that is started again reads only what is new.
    topics.send("temperature", [{"occurred_at_ms": 30_000, "sensor_name": "a", "reading": 9.0}])
    with pytest.raises(UserFunctionError, match="power cut"):
        run(9.0)
    run(None)
    assert len(topics.messages("out")) == 1, "its time came after the end of the input, so it is late"


def test_a_topic_that_is_not_as_expected_is_told() -> None:
    topics = MemoryTopics()
    ctx = Context(transport=topics)
    with pytest.raises(SchemaError, match="no column 'time' in the sample"):
        ctx.from_topic("a", SAMPLE, SERVER, "time")
    with pytest.raises(ValueError, match="no name"):
        ctx.from_topic("", SAMPLE, SERVER, "occurred_at_ms")
    with pytest.raises(BadInputError, match="no JSON object"):
        schema_of_json("[1")
    topics.send("bad", [b'{"occurred_at_ms": 1}', b"{oops"])
    topics.close("bad")
    with pytest.raises(BadInputError, match=r"topic 'bad', offset 1: no JSON object: '{oops'"):
        ctx.from_topic("bad", SAMPLE, SERVER, "occurred_at_ms").sink(print)


def test_a_topic_that_shrank_is_refused() -> None:
    topics = MemoryTopics()
    topics.close("t")
    source = TopicSource(topics, "t", JsonFormat(pa.schema([("v", pa.int64())])))
    with pytest.raises(SourceChangedError, match="5 messages at least"):
        source.open(5)


def test_a_column_that_is_a_copy_of_the_event_time_takes_its_place() -> None:
    table = pa.table({"t": pa.array([1, 2]).cast(pa.timestamp("ms")), "v": [1, 2]})
    stream = StreamContext().from_batches(table, event_time="t")
    assert stream.with_column("u", col("t")).drop("t").event_time == "u"
    assert stream.with_column("u", col("t")).with_column("t", col("v")).event_time == "u"
    assert stream.select(col("t").alias("a"), col("t").alias("b")).drop("a").event_time == "b"
    gone = stream.with_column("u", col("t")).with_column("u", col("v")).drop("t")
    assert gone.event_time is None
    gone.sink(MemorySink())
