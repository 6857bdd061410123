"""From Kafka through windows into Parquet, with real processes that are killed."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tests.end_to_end.job_process import DISORDER_MS, KAFKA, ROWS, JobProcess, read_output
from tests.support.kafka import KafkaBroker
from tests.support.streams import as_multiset, events, one_shot

PARTITIONS = 3


def fill(kafka: KafkaBroker, seed: int) -> tuple[str, pa.Table]:
    """A topic of random events, dealt out to the partitions; and all of them."""
    table = events(seed, ROWS, disorder_ms=DISORDER_MS)
    topic = kafka.create_topic(partitions=PARTITIONS)
    counted = table.set_column(0, "t", table["t"].cast(pa.int64()))
    rows = counted.to_pylist()
    for partition in range(PARTITIONS):
        kafka.produce(topic, rows[partition::PARTITIONS], partition=partition)
    return topic, table


def assert_complete(output: Path, table: pa.Table) -> None:
    select = "count(1) AS n, sum(v) AS total, avg(x) AS mean, max(s) AS greatest"
    expected = one_shot(table, 2_000, 2_000, ("k", "j"), select)
    assert read_output(output)["w"] == as_multiset(expected.select(sorted(expected.column_names)))


def test_a_job_over_topics_that_is_killed_gives_every_window_once(kafka: KafkaBroker, tmp_path: Path) -> None:
    topic, table = fill(kafka, 1)
    where = {"source": f"{KAFKA}{kafka.servers}/{topic}", "state": tmp_path / "state", "output": tmp_path / "out"}
    with JobProcess("tumbling", **where, wait_s=0.03) as job:
        assert job.wait_for(lambda report: report.get("rows", 0) > 0)
        before = job.last["checkpoint"] or 0
        # The one after the next was cut when rows had been read.
        assert job.wait_for(lambda report: (report.get("checkpoint") or 0) >= before + 2)
        assert job.kill()
    with JobProcess("tumbling", **where, wait_s=0.03, kill_at="handed_over:2") as job:
        assert job.wait()[0] == -9
    with JobProcess("tumbling", **where) as job:
        code, errors = job.wait()
    assert code == 0, errors
    assert 0 < job.last["start_rows"] < ROWS
    assert_complete(tmp_path / "out", table)


@pytest.mark.soak
def test_soak_kills_of_jobs_over_topics_while_the_broker_comes_and_goes(kafka: KafkaBroker, tmp_path: Path) -> None:
    """A sixth of KILLS, thirty at least."""
    chance = random.Random(7)
    wanted, done, number = max(30, int(os.environ.get("KILLS", "200")) // 6), 0, 0
    with kafka.gate() as gate:
        while done < wanted:
            number += 1
            topic, table = fill(kafka, number)
            place = tmp_path / str(number)
            where = {"source": f"{KAFKA}{kafka.gated}/{topic}", "state": place / "state", "output": place / "out"}
            for _ in range(5):
                with JobProcess("tumbling", **where, wait_s=0.02) as job:
                    job.wait_for(lambda report: report.get("checkpoint") is not None)
                    time.sleep(chance.uniform(0, 0.3))
                    if chance.random() < 0.5:
                        gate.close()
                        time.sleep(chance.uniform(0, 0.3))
                    done += job.kill()
                    gate.close()
                    gate.open()
            with JobProcess("tumbling", **where) as job:
                gate.close()
                time.sleep(0.5)
                gate.open()
                code, errors = job.wait()
            assert code == 0, errors
            assert_complete(place / "out", table)
            print(f"topic {number}: {done} kills so far, output complete")
