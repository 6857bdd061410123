"""From Kafka through windows into Kafka: each result once for those who read what is committed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators.formats import JsonFormat
from tests.end_to_end.job_process import KAFKA, JobProcess, build, filled_topic
from tests.support.kafka import KafkaBroker, OwnBroker
from tests.support.streams import as_multiset, one_shot

STEPS = ("poll", "barrier", "drained", "prepared", "handed_over", "committed", "publish", "published")


def expected_of(table: pa.Table) -> pa.Table:
    return one_shot(table, 2_000, 2_000, ("k", "j"), "count(1) AS n, sum(v) AS total, max(s) AS greatest")


def results(kafka: KafkaBroker, topic: str, schema: pa.Schema) -> Counter[tuple[Any, ...]]:
    """What a reader of committed records finds."""
    values = [message.value() for message in kafka.records(topic)]
    batch = JsonFormat(schema).decode(values) if values else schema.empty_table()
    return as_multiset(pa.table(batch).select(sorted(schema.names)))


def assert_complete(kafka: KafkaBroker, topic: str, table: pa.Table) -> None:
    expected = expected_of(table)
    assert results(kafka, topic, expected.schema) == as_multiset(expected.select(sorted(expected.column_names)))


class DeadError(Exception):
    """The process is gone."""


class Killer:
    """The hook of a job, which dies at a step once it has begun to publish: nothing happens any more."""

    def __init__(self, step: str) -> None:
        self._step = step
        self._lock = threading.Lock()
        self._publishes = False
        self.dead = False

    def __call__(self, step: str) -> None:
        with self._lock:
            self._publishes |= step == "publish"
            self.dead |= self._publishes and step == self._step
        if self.dead:
            raise DeadError(step)


def test_a_job_that_dies_at_every_step_of_its_checkpoints_sends_every_window_once(
    kafka: KafkaBroker, tmp_path: Path
) -> None:
    source, table = filled_topic(kafka, 1, 3_000)
    output = kafka.create_topic(partitions=2)
    place = f"{KAFKA}{kafka.servers}"
    where = {"source": f"{place}/{source}", "output": f"{place}/{output}", "state": tmp_path / "state"}
    for step in STEPS:
        killer = Killer(step)
        with pytest.raises(DeadError):
            build("topic", **where, interval_s=0.01, wait_s=0.005, batch_rows=20, hook=killer).run()
        assert killer.dead
    build("topic", **where, interval_s=0.01, batch_rows=20).run()
    assert_complete(kafka, output, table)
    build("topic", **where).run()
    assert_complete(kafka, output, table)


def test_a_process_that_is_killed_sends_every_window_once(kafka: KafkaBroker, tmp_path: Path) -> None:
    source, table = filled_topic(kafka, 2, 3_000)
    output = kafka.create_topic(partitions=2)
    place = f"{KAFKA}{kafka.servers}"
    where: dict[str, Any] = {"source": f"{place}/{source}", "output": f"{place}/{output}", "state": tmp_path / "state"}
    with JobProcess("topic", **where, wait_s=0.01, kill_at="publish:2") as job:
        assert job.wait()[0] == -signal.SIGKILL
    with JobProcess("topic", **where) as job:
        code, errors = job.wait()
    assert code == 0, errors
    assert_complete(kafka, output, table)


@pytest.mark.soak
def test_soak_kills_of_jobs_from_topic_to_topic_while_the_broker_is_killed_too(
    kafka: KafkaBroker, tmp_path: Path
) -> None:
    """A sixth of KILLS, thirty at least; the broker is killed and started again for about half of them."""
    del kafka  # where it is missing this is skipped
    chance = random.Random(11)
    wanted, done, restarts, number = max(30, int(os.environ.get("KILLS", "200")) // 6), 0, 0, 0
    with OwnBroker(tmp_path / "broker") as own:
        broker = own.broker
        while done < wanted:
            number += 1
            source, table = filled_topic(broker, number, 6_000)
            output = broker.create_topic(partitions=2)
            place = f"{KAFKA}{broker.servers}"
            where: dict[str, Any] = {
                "source": f"{place}/{source}",
                "output": f"{place}/{output}",
                "state": tmp_path / str(number),
            }
            for _ in range(6):
                with JobProcess("topic", **where, wait_s=0.02) as job:
                    job.wait_for(lambda report: report.get("checkpoint") is not None)
                    time.sleep(chance.uniform(0, 0.5))
                    meanwhile = chance.choice(("nothing", "nothing", "broker dies first", "broker is back"))
                    if meanwhile != "nothing":
                        own.kill()
                        restarts += 1
                    if meanwhile == "broker is back":
                        own.start()
                        time.sleep(chance.uniform(0, 0.5))
                    done += job.kill()
                    if meanwhile == "broker dies first":
                        own.start()
            with JobProcess("topic", **where) as job:
                code, errors = job.wait()
            assert code == 0, errors
            assert_complete(broker, output, table)
            print(f"topic {number}: {done} kills of the job and {restarts} of the broker so far, output complete")
