"""The broker that the tests start: what it can do, and that nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.kafka import ROOT, KafkaBroker, mock_cluster


def test_records_come_back_as_they_were_sent(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic(partitions=2)
    kafka.produce(topic, [{"a": 1}, b"two", None], key=b"k", headers=[("h", b"v")], timestamp_ms=5)
    kafka.produce(topic, [b"other"], partition=1)
    found = [(m.partition(), m.offset(), m.key(), m.value()) for m in kafka.records(topic)]
    assert found == [(0, 0, b"k", b'{"a": 1}'), (0, 1, b"k", b"two"), (0, 2, b"k", None), (1, 0, None, b"other")]
    first = kafka.records(topic)[0]
    assert (first.headers(), first.timestamp()) == ([("h", b"v")], (1, 5))


def test_the_gate_is_the_way_to_the_broker(kafka: KafkaBroker) -> None:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    with kafka.gate() as gate:
        admin = AdminClient(
            {
                "bootstrap.servers": kafka.gated,
                "log_level": 0,
                "reconnect.backoff.ms": 10,
                "reconnect.backoff.max.ms": 50,
            }
        )
        assert admin.list_topics(timeout=10).brokers
        gate.close()
        with pytest.raises(KafkaException):
            admin.list_topics(timeout=0.2)
        gate.open()
        assert admin.list_topics(timeout=10).brokers


def test_the_imitated_cluster_takes_records() -> None:
    from confluent_kafka import Consumer, Producer, TopicPartition

    with mock_cluster() as servers:
        producer = Producer({"bootstrap.servers": servers})
        producer.produce("t", b"x", partition=0)
        assert producer.flush(10) == 0
        consumer = Consumer({"bootstrap.servers": servers, "group.id": "g"})
        consumer.assign([TopicPartition("t", 0, 0)])
        message = consumer.poll(10)
        consumer.close()
    assert message is not None
    assert message.value() == b"x"


_USER = """
import sys, time
from pathlib import Path
from tests.support.kafka import shared_broker
with shared_broker(Path(sys.argv[1])) as broker:
    print(Path(broker.directory, "broker.pid").read_text(), flush=True)
    time.sleep(60)
"""


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_broker_outlives_those_who_need_it(kafka: KafkaBroker, tmp_path: Path, number: int) -> None:
    del kafka  # here, so that jars are at hand
    users = [
        subprocess.Popen([sys.executable, "-c", _USER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    pids = {int(user.stdout.readline()) for user in users if user.stdout is not None}
    assert len(pids) == 1, "one broker for both"
    [pid] = pids
    users[0].send_signal(number)
    users[0].wait(10)
    assert _lives(pid), "the other one needs it"
    users[1].send_signal(number)
    users[1].wait(10)
    deadline = time.monotonic() + 20
    while _lives(pid):
        assert time.monotonic() < deadline, "the broker is still there"
        time.sleep(0.05)
    for user in users:
        assert user.stdout is not None
        user.stdout.close()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
