"""Topics of Kafka as a source, against a real broker: what is read, from where on, and what is never passed over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import BadInputError, SchemaError, SourceChangedError, SourceUnavailableError, StreamContext
from operators.kafka import KafkaSettings
from operators.sinks import MemorySink
from operators.sources import IDLE, KafkaSource, SourceBatch
from operators.sources.kafka.position import KafkaPosition
from operators.testing import check_source
from statebackend import MemoryStateBackend, MemoryStateSpace
from tests.support.kafka import SASL_GUEST, SASL_PASSWORD, SASL_USER, KafkaBroker
from tests.support.restarts import CrashError
from tests.support.streams import Ledger, LedgerSink, as_multiset, one_shot

A = pa.schema([("a", pa.int64())])
FAST = {"fetch.wait.max.ms": 10, "reconnect.backoff.ms": 10, "reconnect.backoff.max.ms": 50}


def numbers(*values: int) -> list[dict[str, Any]]:
    return [{"a": value} for value in values]


def source(kafka: KafkaBroker, topic: Any, servers: str | None = None, **options: Any) -> KafkaSource:
    options = {"schema": A, "options": FAST, **options}
    return KafkaSource(topic, servers or kafka.servers, **options)


class Reading:
    """An open source, and what it gave so far."""

    def __init__(self, source: KafkaSource, position: Any = None) -> None:
        self.source = source
        self.batches: list[SourceBatch] = []
        source.open(position)

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    def until(self, reached: Callable[[], bool] = lambda: False, seconds: float = 60) -> Reading:
        """Poll until something is reached, or to the end of the source."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"waited {seconds} s; so far {self.rows}"
            item = self.source.poll()
            if item is None:
                return self
            if item is not IDLE:
                self.batches.append(item)
        return self

    def rows_are(self, count: int) -> Reading:
        return self.until(lambda: len(self.rows) >= count)

    @property
    def rows(self) -> list[Any]:
        return [row for item in self.batches for row in item.batch.to_pylist()]

    @property
    def values(self) -> list[int]:
        return [row["a"] for row in self.rows]

    @property
    def position(self) -> Any:
        return self.batches[-1].position


def read(kafka: KafkaBroker, topic: Any, position: Any = None, **options: Any) -> Reading:
    """All that there is."""
    with Reading(source(kafka, topic, end="latest", **options), position) as reading:
        return reading.until()


# -- what is read


def test_every_record_of_every_partition_is_read_once_and_in_its_order(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=3)
    for partition in range(3):
        kafka.produce(topic, numbers(*range(100 * partition, 100 * partition + 50)), partition=partition)
    reading = read(kafka, topic, batch_rows=7)
    for partition in range(3):
        found = [r["a"] for b in reading.batches if b.split == f"{topic}/{partition}" for r in b.batch.to_pylist()]
        assert found == list(range(100 * partition, 100 * partition + 50))
    assert {k: v for k, v in reading.position.items() if "/" in k} == {f"{topic}/{p}": 50 for p in range(3)}
    assert read(kafka, topic, reading.position).rows == [], "after its end there is nothing more"


def test_what_is_known_beside_the_value_becomes_columns(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=2)
    kafka.produce(
        topic, numbers(1, 2), partition=1, key=b"k", headers=[("h", b"1"), ("h", None)], timestamp_ms=86_400_000
    )
    names = {n: n for n in ("topic", "partition", "offset", "timestamp", "headers")}
    [first, second] = read(kafka, topic, metadata={"key": "record_key", **names}).rows
    assert first == {
        "a": 1,
        "record_key": b"k",
        "topic": topic,
        "partition": 1,
        "offset": 0,
        "timestamp": datetime(1970, 1, 2, tzinfo=UTC),
        "headers": [{"name": "h", "value": b"1"}, {"name": "h", "value": None}],
    }
    assert second["offset"] == 1


def test_several_topics_are_one_stream(kafka: KafkaBroker) -> None:
    topics = [kafka.create_topic(), kafka.create_topic()]
    for number, topic in enumerate(topics):
        kafka.produce(topic, numbers(number))
    found = read(kafka, topics, metadata=["topic"]).rows
    assert sorted((r["topic"], r["a"]) for r in found) == sorted(zip(topics, (0, 1), strict=True))


def test_other_formats(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, [b"1,x", b"\xff", None])
    assert read(kafka, topic, format="raw", schema=None).rows == [
        {"value": b"1,x"},
        {"value": b"\xff"},
        {"value": None},
    ]
    schema = pa.schema([("n", pa.int8()), ("s", pa.string())])
    told = f"'{topic}', partition 0, offset 1: the record cannot be read as csv"
    with pytest.raises(BadInputError, match=told):
        read(kafka, topic, format="csv", schema=schema)


def test_columns_are_inferred_from_a_sample_or_from_the_first_records(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    assert source(kafka, topic, schema={"a": 1, "s": None}).schema.names == ["a", "s"]
    with pytest.raises(BadInputError, match="no record to infer columns from; give schema="):
        source(kafka, topic, schema=None)
    kafka.produce(topic, [{"x": 1.5}, None, {"y": "z"}])
    found = source(kafka, topic, schema=None).schema
    assert found == pa.schema([("x", pa.float64()), ("y", pa.string())])


def test_only_records_of_committed_transactions_are_seen_unless_all_are_asked_for(kafka: KafkaBroker) -> None:
    from confluent_kafka import Producer

    topic = kafka.create_topic()
    kafka.produce(topic, numbers(0))
    producers = []
    for number, outcome in enumerate(("commit", "abort", "commit", None), 1):
        producer = Producer(
            {"bootstrap.servers": kafka.servers, "transactional.id": f"{topic}-{number}", "log_level": 0}
        )
        producer.init_transactions(30)
        producer.begin_transaction()
        producer.produce(topic, b'{"a": %d}' % number)
        producer.flush(30)
        if outcome == "commit":
            producer.commit_transaction(30)
        elif outcome == "abort":
            producer.abort_transaction(30)
        producers.append(producer)
    reading = read(kafka, topic)
    assert reading.values == [0, 1, 3]
    assert read(kafka, topic, isolation="read_uncommitted").values == [0, 1, 2, 3, 4]
    with Reading(source(kafka, topic), reading.position) as later:
        producers[-1].commit_transaction(30)
        assert later.rows_are(1).values == [4], "an open transaction does not end a partition"


# -- from where on


def test_where_a_new_job_begins(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=2)
    for partition in range(2):
        for number in range(4):
            kafka.produce(topic, numbers(number), partition=partition, timestamp_ms=1000 * (number + 1))
    assert sorted(read(kafka, topic, start="earliest").values) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert read(kafka, topic, start="latest").values == []
    assert sorted(read(kafka, topic, start=datetime.fromtimestamp(2.5, UTC)).values) == [2, 2, 3, 3]
    assert sorted(read(kafka, topic, start=4000).values) == [3, 3]
    assert read(kafka, topic, start=4001).values == []
    assert sorted(read(kafka, topic, start={1: 3}).values) == [0, 1, 2, 3, 3]
    assert sorted(read(kafka, topic, start={f"{topic}/0": 2, f"{topic}/1": 4}).values) == [2, 3]


def test_a_job_that_began_at_the_end_misses_nothing_although_nothing_had_come(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, numbers(1))
    with Reading(source(kafka, topic, start="latest")) as reading:
        position = reading.until(lambda: bool(reading.batches)).position
    kafka.produce(topic, numbers(2))
    assert read(kafka, topic, position, start="latest").values == [2]


def test_a_restored_source_goes_on_where_it_was(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=2)
    for partition in range(2):
        kafka.produce(topic, numbers(*range(20)), partition=partition)
    with Reading(source(kafka, topic, batch_rows=5)) as reading:
        reading.rows_are(15)
    after = read(kafka, topic, reading.position)
    assert sorted(reading.values + after.values) == sorted([*range(20)] * 2)


def test_partitions_that_are_added_are_read_from_their_first_record(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    with Reading(source(kafka, topic, start="latest", discovery_interval=0.05)) as reading:
        reading.until(lambda: bool(reading.batches))
        assert reading.source.splits == {f"{topic}/0"}
        kafka.add_partitions(topic, 2)
        kafka.produce(topic, numbers(7), partition=1)
        assert reading.rows_are(1).values == [7]
        assert reading.source.splits == {f"{topic}/0", f"{topic}/1"}
    kafka.add_partitions(topic, 3)
    kafka.produce(topic, numbers(8), partition=2)
    assert read(kafka, topic, reading.position, start="latest").values == [8], "while the job stood still, too"


def test_a_group_is_told_what_is_committed_and_never_asked(kafka: KafkaBroker) -> None:
    from confluent_kafka import Consumer, TopicPartition

    topic = kafka.create_topic()
    kafka.produce(topic, numbers(*range(9)))
    group = Consumer({"bootstrap.servers": kafka.servers, "group.id": f"g-{topic}"})
    group.commit(offsets=[TopicPartition(topic, 0, 5)], asynchronous=False)
    with Reading(source(kafka, topic, group_id=f"g-{topic}")) as reading:
        assert reading.rows_are(9).values == list(range(9))
        reading.source.committed(reading.position)
        reading.until(lambda: group.committed([TopicPartition(topic, 0)], 10)[0].offset == 9)
    kafka.produce(topic, numbers(9))
    context = StreamContext(checkpoint_interval=None)
    bounded = source(kafka, topic, group_id=f"g-{topic}", end="latest")
    context.from_source(bounded).sink(MemorySink())
    context.run()
    assert group.committed([TopicPartition(topic, 0)], 10)[0].offset == 10, "of its last checkpoint, too"
    group.close()


def test_paused_partitions_are_held_back(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=2)
    for partition in range(2):
        kafka.produce(topic, numbers(*[partition] * 50), partition=partition)
    reading = Reading(source(kafka, topic, batch_rows=5))
    reading.source.pause(frozenset([f"{topic}/1"]))
    with reading:
        reading.rows_are(50)
        assert set(reading.values) == {0}
        assert reading.position[f"{topic}/1"] == 0
        reading.source.pause(frozenset())
        assert reading.rows_are(100).values.count(1) == 50


# -- records that cannot be read


def test_a_poison_record_is_an_error_that_names_its_place(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, [{"a": 1}, b"poison", {"a": 3}])
    for _ in range(2):
        with pytest.raises(
            BadInputError, match=rf"'{topic}', partition 0, offset 1: .* no JSON object: 'poison'. To go"
        ):
            read(kafka, topic)


def test_records_that_cannot_be_read_can_be_handed_on_with_the_reason(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=2)
    kafka.produce(topic, [{"a": 1}, b"poison", None, {"a": 3}], key=b"k", timestamp_ms=1000)
    kafka.produce(topic, [b"all bad"], partition=1)
    context = StreamContext(checkpoint_interval=None)
    stream = context.read_kafka(topic, kafka.servers, schema=A, on_bad_record="divert", end="latest", options=FAST)
    rows, dead = MemorySink(), MemorySink()
    stream.sink(rows)
    stream.dead_letters().sink(dead)
    context.run()
    assert rows.table().to_pylist() == numbers(1, 3)
    found = sorted(dead.table().to_pylist(), key=lambda r: (r["partition"], r["offset"]))
    assert [(r["partition"], r["offset"], r["value"]) for r in found] == [
        (0, 1, b"poison"),
        (0, 2, None),
        (1, 0, b"all bad"),
    ]
    assert found[0] == {
        "topic": topic,
        "partition": 0,
        "offset": 1,
        "timestamp": datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC),
        "key": b"k",
        "value": b"poison",
        "error": "no JSON object: 'poison'",
    }
    assert "tombstone" in found[1]["error"]
    with pytest.raises(ValueError, match='on_bad_record="divert"'):
        StreamContext().read_kafka(topic, kafka.servers, schema=A).dead_letters()


def test_tombstones_are_an_error_left_out_or_rows_of_nulls(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, [None, {"a": 1}, None, {"a": 2}, None], key=b"k")
    with pytest.raises(BadInputError, match=r"offset 0: .* has no value"):
        read(kafka, topic)
    assert read(kafka, topic, tombstones="drop", metadata=["offset"]).rows == [
        {"a": 1, "offset": 1},
        {"a": 2, "offset": 3},
    ]
    found = read(kafka, topic, tombstones="null", metadata=["offset", "key"]).rows
    assert [(r["a"], r["offset"], r["key"]) for r in found] == [
        (v, i, b"k") for i, v in enumerate([None, 1, None, 2, None])
    ]


# -- jobs


def test_partitions_far_apart_in_event_time_bring_no_late_rows(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=3)
    for partition in range(3):
        rows = [{"k": "x", "t": 10_000_000 * partition + 100 * i} for i in range(100)]
        kafka.produce(topic, rows, partition=partition)
    context = StreamContext(checkpoint_interval=None)
    schema = pa.schema([("k", pa.string()), ("t", pa.timestamp("ms"))])
    stream = context.read_kafka(
        topic, kafka.servers, schema=schema, end="latest", event_time="t", batch_rows=10, options=FAST
    )
    windows = stream.window("k", f.count(lit(1)).alias("n"), 1000)
    found, late = MemorySink(), MemorySink()
    windows.sink(found)
    windows.late_rows().sink(late)
    context.run()
    assert late.table().num_rows == 0
    assert found.table()["n"].to_pylist() == [10] * 30


@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_that_dies_at_random_publishes_what_one_that_does_not_publishes(kafka: KafkaBroker, seed: int) -> None:
    rng = random.Random(seed)
    topic = kafka.create_topic(partitions=3)
    rows = [{"k": rng.choice("abc"), "t": 10 * i + rng.randrange(50), "v": rng.randrange(100)} for i in range(600)]
    for partition in range(3):
        kafka.produce(topic, rows[partition::3], partition=partition)
    schema = pa.schema([("k", pa.string()), ("t", pa.timestamp("ms")), ("v", pa.int64())])
    space, ledger, chances = MemoryStateSpace(), Ledger(), [0.1] * 3

    class Mortal(KafkaSource):
        def poll(self) -> Any:
            if chances and rng.random() < chances[-1]:
                chances.pop()
                raise CrashError
            return super().poll()

    def one_life() -> bool:
        state = MemoryStateBackend(space)
        context = StreamContext(
            "mortal", state=state, checkpoint_interval=None, checkpoint_trigger=lambda: rng.random() < 0.2
        )
        origin = Mortal(topic, kafka.servers, schema=schema, end="latest", batch_rows=11, options=FAST)
        stream = context.from_source(origin, event_time="t", max_disorder=50, name="rows")
        stream.window("k", [f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total")], 500).sink(LedgerSink(ledger))
        try:
            return context.run().outcome == "finished"
        except CrashError:
            return False
        finally:
            state.close()

    while not one_life():
        pass
    assert not chances
    expected = one_shot(pa.Table.from_pylist(rows, schema), 500, 500, ["k"], "count(1) AS n, sum(v) AS total")
    assert as_multiset(ledger.table()) == as_multiset(expected)


# -- what is refused when the stream is built


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topics": []}, "at least one topic"),
        ({"bootstrap_servers": " "}, "bootstrap_servers"),
        ({"bootstrap_servers": "user:pw@host:1"}, "without credentials"),
        ({"format": "xml"}, "format: 'xml' is not one of json"),
        ({"format": "csv", "schema": None}, "needs schema="),
        ({"format": "raw"}, "takes no schema"),
        ({"metadata": ["offset", "color"]}, "metadata: 'color' is not one of key"),
        ({"metadata": {"offset": "a"}}, "two columns are called 'a'"),
        ({"start": "middle"}, "start: 'middle'"),
        ({"start": {"other/0": 1}}, "start: topic 'other' is not read"),
        ({"start": datetime(2024, 1, 1)}, "time zone"),  # noqa: DTZ001
        ({"topics": ["t", "u"], "start": {0: 1}}, "of which topic"),
        ({"tombstones": "keep"}, "keep"),
        ({"options": {"group.id": "g"}}, "use group_id="),
        ({"on_data_loss": "ignore"}, "on_data_loss: 'ignore'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"topics": "t", "bootstrap_servers": "127.0.0.1:1", "schema": A, **options}
    with pytest.raises((ValueError, SchemaError), match=message):
        KafkaSource(**given)


# -- what is never passed over


def test_offsets_that_are_gone_are_an_error_and_never_a_jump(
    kafka: KafkaBroker, caplog: pytest.LogCaptureFixture
) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, numbers(*range(20)))
    kafka.delete_records(topic, 0, 12)
    position = KafkaPosition({f"{topic}/0": 5}).stored()
    with pytest.raises(
        SourceChangedError, match=rf"'{topic}', partition 0: .*expected offset 5, found only offsets from 12"
    ):
        read(kafka, topic, position)
    with pytest.raises(SourceChangedError, match=r"7 records were deleted before .*on_data_loss='skip'"):
        read(kafka, topic, position)
    assert read(kafka, topic, position, on_data_loss="skip").values == list(range(12, 20))
    assert f"{topic}/0: 7 records from offset 5 on were deleted" in caplog.text
    for options in ({}, {"on_data_loss": "skip"}):
        with pytest.raises(SourceChangedError, match="expected offset 21, found only offsets up to 20"):
            read(kafka, topic, KafkaPosition({f"{topic}/0": 21}).stored(), **options)


@pytest.mark.parametrize("on_data_loss", ["error", "skip"])
def test_records_deleted_while_the_job_runs_are_noticed(kafka: KafkaBroker, on_data_loss: str) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, numbers(0))
    with kafka.gate() as gate, Reading(source(kafka, topic, kafka.gated, on_data_loss=on_data_loss)) as reading:
        reading.rows_are(1)
        gate.close()
        kafka.produce(topic, numbers(*range(1, 10)))
        kafka.delete_records(topic, 0, 6)
        gate.open()
        if on_data_loss == "skip":
            assert reading.rows_are(5).values == [0, 6, 7, 8, 9]
        else:
            with pytest.raises(SourceChangedError, match="expected offset 1, found only offsets from 6 to 10"):
                reading.until()


def test_a_topic_that_does_not_exist_is_named(kafka: KafkaBroker) -> None:
    with pytest.raises(BadInputError, match=r"topic 'no-such-topic': there is none of that name at 127.0.0.1"):
        read(kafka, "no-such-topic")


def test_a_topic_that_was_deleted_is_an_error(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, numbers(1))
    with Reading(source(kafka, topic, discovery_interval=0.05)) as reading:
        reading.rows_are(1)
        kafka.delete_topic(topic)
        with pytest.raises(SourceChangedError, match=f"'{topic}'.* no such topic"):
            reading.until()
    with pytest.raises(SourceChangedError, match=f"'{topic}'.* no such topic"):
        read(kafka, topic, reading.position)


def test_a_topic_that_was_made_again_is_not_the_one_that_was_read(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, numbers(1, 2))
    position = read(kafka, topic).position
    kafka.delete_topic(topic)
    kafka.create_topic(topic)
    kafka.produce(topic, numbers(3, 4, 5))
    with pytest.raises(SourceChangedError, match=f"'{topic}'.*deleted and made again.*start with a new state"):
        read(kafka, topic, position)
    assert read(kafka, topic).values == [3, 4, 5]


# -- a broker that does not answer


def test_a_broker_that_is_down_is_waited_for(kafka: KafkaBroker, caplog: pytest.LogCaptureFixture) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, numbers(1))
    caplog.set_level("INFO", "operators.sources.kafka")
    with kafka.gate(opened=False) as gate, Reading(source(kafka, topic, kafka.gated)) as reading:
        reading.until(lambda: "does not answer" in caplog.text)
        gate.open()
        assert reading.rows_are(1).values == [1]
        caplog.clear()
        gate.close()
        reading.until(lambda: "does not answer" in caplog.text)
        kafka.produce(topic, numbers(2))
        gate.open()
        assert reading.rows_are(2).values == [1, 2]
        reading.until(lambda: "answers again" in caplog.text)


def test_a_broker_that_stays_away_ends_the_job_with_its_address(kafka: KafkaBroker) -> None:
    told = r"127.0.0.1:1 did not answer for .*topics t are read on from"
    with (
        Reading(source(kafka, "t", "127.0.0.1:1", unavailable_timeout=0.2)) as reading,
        pytest.raises(SourceUnavailableError, match=told),
    ):
        reading.until()


# -- credentials


def test_a_password_lets_in_and_is_never_told(kafka: KafkaBroker, caplog: pytest.LogCaptureFixture) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, numbers(1))
    caplog.set_level("DEBUG")
    secret = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": SASL_USER, **FAST}
    told = []
    good = source(kafka, topic, kafka.sasl, end="latest", options={**secret, "sasl.password": SASL_PASSWORD})
    with Reading(good) as reading:
        assert reading.until().values == [1]
    told += [repr(good), str(good.describe()), str(reading.position), repr(good._settings), repr(good._options)]
    wrong = f"not-{SASL_PASSWORD}"
    with (
        Reading(source(kafka, topic, kafka.sasl, options={**secret, "sasl.password": wrong})) as reading,
        pytest.raises(SourceUnavailableError, match=r"refuses: .*[Aa]uthentication.*check credentials") as refused,
    ):
        reading.until()
    with pytest.raises(ValueError, match="No such configuration property") as unknown:
        source(kafka, topic, schema=None, options={"sasl.pasword": SASL_PASSWORD, "sasl.password": SASL_PASSWORD})
    told += [str(refused.value), repr(refused.value.__cause__), str(unknown.value), repr(unknown.value.__cause__)]
    told += [caplog.text]
    assert not [text for text in told if SASL_PASSWORD in text]


def test_what_the_client_library_says_is_told_without_secrets() -> None:
    secrets = {
        "sasl.password": "pass-1",
        "ssl.key.password": "pass-2",
        "ssl.key.pem": "pem-3",
        "sasl.oauthbearer.client.secret": "secret-4",
        "sasl.jaas.config": "jaas-5",
    }
    settings = KafkaSettings("host:9092", {**secrets, "sasl.username": "app", "ssl.ca.location": "/ca"})
    said = settings.redact(f"Invalid value {' '.join(secrets.values())} of app at host:9092 with /ca")
    assert said == "Invalid value *** *** *** *** *** of app at host:9092 with /ca"
    assert not [value for value in secrets.values() if value in repr(settings)]


def test_who_may_not_use_groups_reads_and_who_may_not_read_is_told(
    kafka: KafkaBroker, caplog: pytest.LogCaptureFixture
) -> None:
    topic, closed = kafka.create_topic(), kafka.create_topic()
    kafka.produce(topic, numbers(*range(5)))
    kafka.forbid("group", f"g-{topic}")
    kafka.forbid("topic", closed)
    guest = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": SASL_GUEST, **FAST}
    guest["sasl.password"] = SASL_PASSWORD
    with Reading(source(kafka, topic, kafka.sasl, options=guest, group_id=f"g-{topic}")) as reading:
        assert reading.rows_are(5).values == list(range(5))
        reading.source.committed(reading.position)
        reading.until(lambda: "is not told positions: no right to it" in caplog.text)
    with (
        Reading(source(kafka, closed, kafka.sasl, options=guest)) as reading,
        pytest.raises(SourceUnavailableError, match=r"refuses: .*[Aa]uthoriz"),
    ):
        reading.until()


def test_a_source_keeps_what_sources_promise(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=2)
    for partition in range(2):
        kafka.produce(topic, numbers(*range(30)), partition=partition)
    assert check_source(lambda: source(kafka, topic, end="latest", batch_rows=8), places=3) == 60
