"""From Kafka through an aggregation into PostgreSQL: in the end one row of each key, with the right numbers."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import SessionContext

from tests.end_to_end.job_process import KAFKA, JobProcess, build, filled_topic
from tests.support.kafka import KafkaBroker
from tests.support.postgres import PostgresServer


def assert_complete(postgres: PostgresServer, output: str, table: pa.Table) -> None:
    """Also that a row was not counted twice: the numbers are those of one SQL query."""
    session = SessionContext()
    session.register_record_batches("rows", [table.to_batches()])
    expected = session.sql("SELECT s, j, count(1) AS n, sum(v) AS total FROM rows GROUP BY s, j").to_arrow_table()
    assert sorted(postgres.query(f"SELECT s, j, n, total FROM {output}")) == sorted(
        tuple(row.values()) for row in expected.to_pylist()
    )


def test_a_job_that_is_stopped_and_goes_on_leaves_the_rows_of_one_query(
    kafka: KafkaBroker, postgres: PostgresServer, tmp_path: Path
) -> None:
    source, table = filled_topic(kafka, 5, 600)
    output = postgres.table()
    where: dict[str, Any] = {
        "source": f"{KAFKA}{kafka.servers}/{source}",
        "output": f"{postgres.url} {output}",
        "state": tmp_path / "state",
    }

    def dies(step: str) -> None:
        if step == "published":
            raise ConnectionAbortedError(step)

    context = build("totals", **where, interval_s=0.01, wait_s=0.01, batch_rows=20, hook=dies)
    with pytest.raises(ConnectionAbortedError):
        context.run()
    build("totals", **where, interval_s=0.05, batch_rows=20).run()
    assert_complete(postgres, output, table)


@pytest.mark.soak
def test_soak_kills_of_jobs_into_a_database_that_is_killed_too(
    kafka: KafkaBroker, postgres: PostgresServer, tmp_path: Path
) -> None:
    """A sixth of KILLS, thirty at least; the server is killed and started again for about half of them."""
    chance = random.Random(13)
    wanted, done, restarts, number = max(30, int(os.environ.get("KILLS", "200")) // 6), 0, 0, 0
    while done < wanted:
        number += 1
        source, table = filled_topic(kafka, number, 6_000)
        output = postgres.table()
        where: dict[str, Any] = {
            "source": f"{KAFKA}{kafka.servers}/{source}",
            "output": f"{postgres.url} {output}",
            "state": tmp_path / str(number),
        }
        for _ in range(6):
            with JobProcess("totals", **where, wait_s=0.02) as job:
                job.wait_for(lambda report: report.get("checkpoint") is not None)
                time.sleep(chance.uniform(0, 0.5))
                meanwhile = chance.choice(("nothing", "nothing", "server dies first", "server is back"))
                if meanwhile != "nothing":
                    postgres.kill()
                    restarts += 1
                if meanwhile == "server is back":
                    postgres.start()
                    time.sleep(chance.uniform(0, 0.5))
                done += job.kill()
                if meanwhile == "server dies first":
                    postgres.start()
        with JobProcess("totals", **where) as job:
            code, errors = job.wait()
        assert code == 0, errors
        assert_complete(postgres, output, table)
        print(f"table {number}: {done} kills of the job and {restarts} of the server so far, output complete")
