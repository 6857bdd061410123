"""The Kafka sinks on a real broker: each record once for readers of what is committed, whatever happens when."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col
from datafusion import functions as f

from operators import StreamContext
from operators.errors import OutputUncertainError, SinkRefusedError, SinkUnavailableError
from operators.kafka.producer import TryAgainError
from operators.kafka.records import RecordColumns
from operators.kafka.settings import KafkaSettings
from operators.kafka.transactions import KafkaTransactions
from operators.sinks import BoundedSink, ImmediateKafkaSink, KafkaSink, SinkContext
from operators.testing import check_exactly_once
from statebackend import FencedError, JobState, MemoryStateBackend, MemoryStateSpace, open_backend
from tests.support.kafka import SASL_PASSWORD, SASL_USER, KafkaBroker

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])
STEPS = ("init", "marker", "begin", "send", "mark", "commit")
POINTS = [*((step, False) for step in STEPS), ("commit", True)]
"""Before each step, and after the last one."""


class KilledError(Exception):
    """The process is gone at this step."""


class Faults:
    """What happens at which call of which step; ``wrap`` is given to a sink in place of the real transactions."""

    def __init__(self, step: str = "", call: int = 1, *, after: bool = False, error: type[Exception] = KilledError):
        self.calls: Counter[str] = Counter()
        self._at = (step, call)
        self._after = after
        self._error = error

    def expect(self, step: str, *, after: bool, error: type[Exception]) -> None:
        """At the next call of the step."""
        self._at, self._after, self._error = (step, self.calls[step] + 1), after, error

    def wrap(self, settings: KafkaSettings, topic: str, transactional_id: str) -> Any:
        return _Faulty(KafkaTransactions(settings, topic, transactional_id), self)

    def run(self, step: str, action: Callable[[], Any]) -> Any:
        self.calls[step] += 1
        meets = (step, self.calls[step]) == self._at
        if meets and not self._after:
            raise self._error(step)
        answer = action()
        if meets:
            raise self._error(step)
        return answer


class _Faulty:
    def __init__(self, inner: KafkaTransactions, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def discard(self) -> None:
        self._inner.discard()

    def __getattr__(self, step: str) -> Any:
        assert step in STEPS
        return lambda *arguments: self._faults.run(step, lambda: getattr(self._inner, step)(*arguments))


class Life:
    """One process: a sink behind a source of numbers, with checkpoints as a job takes them."""

    def __init__(self, space: MemoryStateSpace | str, sink: Any) -> None:
        self.backend: Any = MemoryStateBackend(space) if isinstance(space, MemoryStateSpace) else open_backend(space)
        restored = self.backend.restored
        self.position = restored.job.sources["in"] if restored else 0
        self.checkpoint_id = restored.checkpoint_id if restored else 0
        self.sink = sink
        committables = restored.job.committables.get("out", ()) if restored else ()
        LIVES.append(self)
        sink.open(SinkContext("out", SCHEMA, self.backend, str(self.backend.store_id), uuid.uuid4().hex), committables)

    def write(self, count: int) -> None:
        ids = range(self.position, self.position + count)
        self.sink.write(pa.RecordBatch.from_pydict({"id": ids, "name": [f"n{i % 5}" for i in ids]}, SCHEMA))
        self.position += count

    def commit(self) -> list[Any]:
        self.checkpoint_id += 1
        prepared = self.sink.prepare(self.checkpoint_id, final=False)
        state = JobState(sources={"in": self.position}, committables={"out": list(prepared.committables)})
        self.backend.checkpoint(state, [prepared.stage] if prepared.stage else []).result(30)
        return list(prepared.committables)

    def checkpoint(self) -> None:
        self.sink.publish(self.commit())

    def die(self) -> None:
        """Nothing more is said to the broker; a transaction that is open stays open there."""
        self.sink.close()
        self.backend.close()


LIVES: list[Life] = []


@pytest.fixture(autouse=True)
def close_lives() -> Iterator[None]:
    yield
    while LIVES:
        LIVES.pop().die()


def ids(kafka: KafkaBroker, topic: str) -> list[int]:
    return sorted(json.loads(m.value())["id"] for m in kafka.records(topic))


def run_to(space: MemoryStateSpace, sink: Any, end: int) -> None:
    """Ten records a batch, two batches a checkpoint, until the end."""
    life = Life(space, sink)
    while life.position < end:
        life.write(10)
        life.write(10)
        life.checkpoint()
    life.commit()


# -- records


def murmur2(data: bytes) -> int:
    """As Java's default partitioner computes it (org.apache.kafka.common.utils.Utils.murmur2)."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    for i in range(0, len(data) - len(data) % 4, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = h * m & mask ^ k
    if rest := data[len(data) - len(data) % 4 :]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def test_records_carry_key_value_headers_time_and_go_where_java_would_send_them(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=7)
    columns = RecordColumns(columns=["id"], key=["name"], headers={"who": "name"}, timestamp="id")
    life = Life(MemoryStateSpace(), KafkaSink(topic, kafka.servers, columns))
    names = ["", "a", "bcd", "abcd", "schlüssel", "x" * 41]
    life.sink.write(pa.RecordBatch.from_pydict({"id": range(6), "name": names}, SCHEMA))
    life.checkpoint()
    found = {m.key().decode(): m for m in kafka.records(topic)}
    assert {n: m.partition() for n, m in found.items()} == {n: (murmur2(n.encode()) & 0x7FFFFFFF) % 7 for n in names}
    for number, name in enumerate(names):
        message = found[name]
        assert json.loads(message.value()) == {"id": number}
        assert message.headers() == [("who", name.encode())]
        assert message.timestamp()[1] == number or number == 0


def test_a_column_may_say_which_partition(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=3)
    life = Life(MemoryStateSpace(), KafkaSink(topic, kafka.servers, RecordColumns(key=["name"], partition="id")))
    life.sink.write(pa.RecordBatch.from_pydict({"id": [2, 0, 2], "name": ["x"] * 3}, SCHEMA))
    life.checkpoint()
    assert [m.partition() for m in kafka.records(topic)] == [0, 2, 2]
    life.write(10)
    committables = life.commit()
    with pytest.raises(SinkRefusedError, match=r"(?s)Unknown partition.*key 'n"):
        life.sink.publish(committables)


def test_a_changelog_leaves_tombstones_for_what_is_gone(kafka: KafkaBroker) -> None:
    topic, rows = kafka.create_topic(), kafka.create_topic()
    schema = pa.schema([("user", pa.string()), ("points", pa.int64())])
    batches = [
        pa.RecordBatch.from_pydict({"user": ["ada", "bob"], "points": [1, 5]}, schema),
        pa.RecordBatch.from_pydict({"user": ["ada"], "points": [7]}, schema),
    ]
    context = StreamContext()
    newest = context.from_batches(batches, name="in").aggregate("user", f.max(col("points")).alias("best"))
    late = newest.filter(col("best") < 6)
    late.write_kafka(topic, kafka.servers, name="late")
    late.write_kafka(rows, kafka.servers, changes="rows", key="user", name="rows")
    context.run()
    sent = [(m.key(), m.value() and json.loads(m.value())) for m in kafka.records(topic)]
    assert sent[-1] == (b"ada", None)
    assert sorted(sent[:-1]) == [(b"ada", {"user": "ada", "best": 1}), (b"bob", {"user": "bob", "best": 5})]
    assert [json.loads(m.value())["op"] for m in kafka.records(rows)] == ["insert", "insert", "delete"]


# -- exactly once


def test_nothing_is_visible_before_the_checkpoint_is_committed(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    life = Life(MemoryStateSpace(), KafkaSink(topic, kafka.servers))
    life.write(20)
    committables = life.commit()
    assert kafka.records(topic, isolation="read_uncommitted") == []
    life.sink.publish(committables)
    assert ids(kafka, topic) == list(range(20))
    life.sink.publish(committables)
    assert ids(kafka, topic) == list(range(20))


def test_a_crash_between_any_two_steps_neither_loses_nor_repeats_a_record(kafka: KafkaBroker) -> None:
    """One job, killed at each point of a publication, and again at the same point of the recovery."""
    topic, space = kafka.create_topic(), MemoryStateSpace()
    run_to(space, KafkaSink(topic, kafka.servers), 20)
    for number, (step, after) in enumerate(POINTS, 2):
        for kill in range(2):
            LIVES.pop().die()
            faults = Faults(step, after=after)
            with contextlib.suppress(KilledError):
                run_to(space, KafkaSink(topic, kafka.servers, transactions=faults.wrap), 20 * number)
            assert faults.calls[step] or kill, f"no {step}"
    LIVES.pop().die()
    run_to(space, KafkaSink(topic, kafka.servers), 20 * number)
    assert ids(kafka, topic) == list(range(20 * number))


def test_a_session_that_is_lost_at_any_step_is_begun_again(kafka: KafkaBroker) -> None:
    topic, faults = kafka.create_topic(), Faults()
    life = Life(MemoryStateSpace(), KafkaSink(topic, kafka.servers, transactions=faults.wrap))
    for number, (step, after) in enumerate(POINTS[2:], 2):
        faults.expect(step, after=after, error=TryAgainError)
        life.write(10)
        life.checkpoint()
        assert faults.calls["init"] >= number, step
    assert ids(kafka, topic) == list(range(life.position))


def test_what_a_zombie_sends_after_its_successor_began_never_becomes_visible(kafka: KafkaBroker) -> None:
    topic, space = kafka.create_topic(), MemoryStateSpace()
    zombie = Life(space, KafkaSink(topic, kafka.servers))
    zombie.write(10)
    committables = zombie.commit()
    transactions = zombie.sink._publication._transactions
    deadline = 2.0**40
    transactions.begin()
    transactions.send(zombie.sink._kept.batches(committables[0])[0].batch, deadline)
    successor = Life(space, KafkaSink(topic, kafka.servers))
    assert ids(kafka, topic) == list(range(10))
    with pytest.raises(TryAgainError, match=r"(?i)fenced|epoch"):
        transactions.mark(1, deadline)
    # It begins anew, as a process does that was only slow, finds the marker moved, and fences its successor in turn,
    # who gets over it.
    zombie.sink.publish(committables)
    successor.write(10)
    successor.checkpoint()
    assert ids(kafka, topic) == list(range(20))


def test_a_process_that_was_only_slow_sends_nothing_once_its_successor_has_gone_on(kafka: KafkaBroker) -> None:
    topic, space = kafka.create_topic(), MemoryStateSpace()
    slow = Life(space, KafkaSink(topic, kafka.servers))
    slow.write(10)
    committables = slow.commit()
    successor = Life(space, KafkaSink(topic, kafka.servers))
    successor.write(10)
    successor.checkpoint()
    with pytest.raises(FencedError, match="another process has gone on with this output, up to number 2"):
        slow.sink.publish(committables)
    assert ids(kafka, topic) == list(range(20))


def test_records_wait_in_the_real_store_too(kafka: KafkaBroker, tmp_path: Any) -> None:
    topic, url = kafka.create_topic(), str(tmp_path / "state")
    for _ in range(2):
        life = Life(url, KafkaSink(topic, kafka.servers))
        life.write(10)
        life.checkpoint()
        life.write(10)
        life.commit()
        LIVES.pop().die()
    Life(url, KafkaSink(topic, kafka.servers))
    assert ids(kafka, topic) == list(range(40))


def test_another_prefix_still_ends_what_was_begun_under_the_old_one(kafka: KafkaBroker) -> None:
    topic, space = kafka.create_topic(), MemoryStateSpace()
    first = Life(space, KafkaSink(topic, kafka.servers, transactional_id_prefix="old"))
    first.write(10)
    first.sink._publication._transactions.begin()
    first.commit()
    LIVES.pop().die()
    second = Life(space, KafkaSink(topic, kafka.servers, transactional_id_prefix="new"))
    assert ids(kafka, topic) == list(range(10))
    second.write(10)
    second.checkpoint()
    assert ids(kafka, topic) == list(range(20))


def test_a_marker_that_is_gone_or_ahead_is_never_guessed_at(kafka: KafkaBroker) -> None:
    topic, space = kafka.create_topic(), MemoryStateSpace()
    life = Life(space, KafkaSink(topic, kafka.servers))
    life.write(10)
    life.checkpoint()
    group = life.sink._transactional_id
    life.write(10)
    life.commit()
    LIVES.pop().die()
    admin = kafka.admin()
    for future in admin.delete_consumer_groups([group]).values():
        future.result(30)
    with pytest.raises(OutputUncertainError, match=r"number 1 to 2.*assume_published=1 to send it, or 2 if"):
        Life(space, KafkaSink(topic, kafka.servers))
    LIVES.pop().die()
    again = Life(space, KafkaSink(topic, kafka.servers, assume_published=1))
    assert ids(kafka, topic) == list(range(20))
    again.write(10)
    again.checkpoint()
    LIVES.pop().die()
    ahead = Life(MemoryStateSpace(), KafkaSink(topic, kafka.servers))
    ahead.backend.close()
    with pytest.raises(OutputUncertainError, match=r"up to number 3 .* knows of 0 only.*assume_published=0"):
        _reopen_as(ahead, group, kafka, topic, None)
    _reopen_as(ahead, group, kafka, topic, 0)
    _reopen_as(ahead, group, kafka, topic, None)


def _reopen_as(life: Life, transactional_id: str, kafka: KafkaBroker, topic: str, assume: int | None) -> None:
    """An empty state with the name of another: as if that one had gone back to its beginning."""
    _, store_id, operator_id = transactional_id.split("-", 2)
    backend = MemoryStateBackend(MemoryStateSpace())
    sink = KafkaSink(topic, kafka.servers, assume_published=assume)
    try:
        sink.open(SinkContext(operator_id, SCHEMA, backend, store_id, "a"), ())
    finally:
        sink.close()
        backend.close()


@pytest.mark.soak
def test_a_pipeline_into_kafka_passes_the_check_at_every_step_of_the_checkpoint(kafka: KafkaBroker) -> None:
    batches = [pa.RecordBatch.from_pydict({"id": range(i, i + 5), "name": ["x"] * 5}, SCHEMA) for i in range(0, 30, 5)]
    topics: dict[str, str] = {}

    def topic_of(place: Any) -> str:
        if place.name not in topics:
            topics[place.name] = kafka.create_topic()
        return topics[place.name]

    def pipeline(context: StreamContext, place: Any) -> None:
        context.from_batches(batches, name="in").write_kafka(topic_of(place), kafka.servers, name="out")

    def read(place: Any) -> pa.Table:
        return pa.Table.from_pylist([json.loads(m.value()) for m in kafka.records(topic_of(place))], SCHEMA)

    report = check_exactly_once(pipeline, read, times_per_step=1)
    assert {"publish", "committed", "prepared", "handed_over"} <= {step for step, _ in report.killed}


# -- brokers that are not there, and what they do not take


def test_a_broker_that_is_away_is_waited_for_and_nothing_is_lost(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    with kafka.gate() as gate:
        life = Life(MemoryStateSpace(), KafkaSink(topic, kafka.gated))
        life.write(10)
        committables = life.commit()
        gate.close()
        life.sink._records.timeout_s = 0.3
        with pytest.raises(SinkUnavailableError, match=rf"{topic}.*did not take records"):
            life.sink.publish(committables)
        assert isinstance(SinkUnavailableError("x"), OSError), "an error that the job tolerates for some checkpoints"
        life.write(10)
        committables = life.commit()
        gate.open()
        life.sink._records.timeout_s = 30
        life.sink.publish(committables)
        assert ids(kafka, topic) == list(range(20))
        gate.close()
        life.die()
        with pytest.raises(SinkUnavailableError, match="did not take records"):
            Life(MemoryStateSpace(), KafkaSink(topic, kafka.gated, timeout_s=0.3))


def test_a_full_sink_says_so_and_is_not_full_when_its_records_are_published(kafka: KafkaBroker) -> None:
    sink = KafkaSink(kafka.create_topic(), kafka.servers, buffer_bytes=1000)
    life = Life(MemoryStateSpace(), sink)
    assert isinstance(sink, BoundedSink)
    life.write(5)
    assert not sink.full
    life.write(100)
    assert sink.full
    life.checkpoint()
    life.commit()
    assert not sink.full


@pytest.mark.parametrize("kind", [KafkaSink, ImmediateKafkaSink])
def test_a_missing_topic_and_a_refused_password_are_told_at_once_without_the_password(
    kafka: KafkaBroker, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SinkRefusedError, match=r"topic 'nowhere' at .*: Broker: Unknown topic"):
        Life(MemoryStateSpace(), kind("nowhere", kafka.servers))
    wrong = "secret-that-is-wrong"
    sasl = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": SASL_USER}
    topic = kafka.create_topic()
    with pytest.raises(SinkRefusedError, match="Authentication failed") as refused:
        Life(MemoryStateSpace(), kind(topic, kafka.sasl, options={**sasl, "sasl.password": wrong}))
    sink = kind(topic, kafka.sasl, options={**sasl, "sasl.password": SASL_PASSWORD})
    life = Life(MemoryStateSpace(), sink)
    life.write(10)
    life.checkpoint()
    assert ids(kafka, topic) == list(range(10))
    told = [str(refused.value), repr(sink), str(sink.describe()), caplog.text, repr(vars(sink))]
    assert not [text for text in told if wrong in text or SASL_PASSWORD in text]


@pytest.mark.parametrize("kind", [KafkaSink, ImmediateKafkaSink])
def test_a_record_that_the_topic_does_not_take_is_named(kafka: KafkaBroker, kind: Any) -> None:
    topic = kafka.create_topic(max_message_bytes="1000")
    life = Life(MemoryStateSpace(), kind(topic, kafka.servers, RecordColumns(key=["id"])))
    life.sink.write(pa.RecordBatch.from_pydict({"id": [1, 2, 3], "name": ["a", "b" * 5000, "c"]}, SCHEMA))
    with pytest.raises(SinkRefusedError, match=r"too large; the record: 5\d\d\d bytes, key '2'"):
        life.checkpoint()


# -- at least once


def test_at_least_once_a_checkpoint_is_committed_when_everything_has_arrived(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    with kafka.gate() as gate:
        life = Life(MemoryStateSpace(), ImmediateKafkaSink(topic, kafka.gated))
        life.write(10)
        gate.close()
        life.sink._records.timeout_s = 0.3
        life.write(10)
        with pytest.raises(SinkUnavailableError, match="did not take records"):
            life.commit()
        gate.open()
        life.sink._records.timeout_s = 30
        life.write(10)
        life.commit()
        assert ids(kafka, topic) == list(range(30))


def test_at_least_once_a_crash_sends_again_what_was_not_in_a_checkpoint(kafka: KafkaBroker) -> None:
    topic, space = kafka.create_topic(), MemoryStateSpace()
    first = Life(space, ImmediateKafkaSink(topic, kafka.servers))
    first.write(10)
    first.checkpoint()
    first.write(10)
    first.sink._flush()
    LIVES.pop().die()
    run_to(space, ImmediateKafkaSink(topic, kafka.servers), 20)
    assert Counter(ids(kafka, topic)) == Counter([*range(20), *range(10, 30)])
