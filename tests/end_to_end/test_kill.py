"""Real processes, killed with SIGKILL at random moments and between the steps of the protocol.

Each kill comes after at least one committed checkpoint, each restart really restores, and in the end the output
equals that of a run that was never killed.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.job_process import PIPELINES, ROWS, JobProcess, build, read_output, write_events
from tests.support.streams import as_multiset, one_shot

WAIT_S = 0.02
"""Before each of the hundred batches: two seconds that a kill may fall into."""


def uninterrupted(pipeline: str, source: Path, output: Path) -> dict[str, Counter[tuple[Any, ...]]]:
    build(pipeline, source=source, state=None, output=output).run()
    return read_output(output)


def run_and_kill(pipeline: str, seed: int, directory: Path, kills: int) -> tuple[int, int]:
    """Run a job that is killed so often; returns (kills, rows read more than once)."""
    chance = random.Random(seed)
    source, output = directory / "in", directory / "out"
    write_events(source, seed)
    where = {"source": source, "state": directory / "state", "output": output}
    done = replayed = reached = last_checkpoint = 0
    while True:
        with JobProcess(pipeline, **where, wait_s=WAIT_S) as job:
            if done < kills and job.wait_for(lambda report: report.get("checkpoint") is not None):
                time.sleep(chance.uniform(0.0, 0.3))
                killed = job.kill()
            else:
                killed = False
                code, errors = job.wait()
                assert code == 0, errors
                assert job.last["outcome"] == "finished"
            if done:
                restored, start = job.reports[0]["restored_from"], job.reports[0]["start_rows"]
                assert restored is not None
                assert restored >= last_checkpoint, "a committed checkpoint was forgotten"
                assert start > 0
                replayed += max(0, reached - start)
            if not killed:
                break
            done += 1
            reports = [r for r in job.reports if "rows" in r]
            reached, last_checkpoint = reports[-1]["rows"], reports[-1]["checkpoint"]
    assert read_output(output) == uninterrupted(pipeline, source, directory / "expected")
    return done, replayed


@pytest.mark.parametrize(
    ("pipeline", "seed"), [("tumbling", 1), ("sliding", 2), ("both", 3), ("joins", 4), ("keyed", 5)]
)
def test_a_job_killed_at_random_moments_gives_the_output_of_one_that_was_not(
    tmp_path: Path, pipeline: str, seed: int
) -> None:
    kills, _ = run_and_kill(pipeline, seed, tmp_path, 2)
    assert kills == 2


RESTORED = {"barrier": {2}, "drained": {2}, "prepared": {2}, "handed_over": {2, 3}, "committed": {3}, "published": {3}}
"""Where a job comes back that dies in its third checkpoint, by step."""


@pytest.mark.parametrize("step", RESTORED)
def test_a_kill_between_any_two_steps_of_a_checkpoint_neither_loses_nor_repeats_output(
    tmp_path: Path, step: str
) -> None:
    write_events(tmp_path / "in", 7)
    where = {"source": tmp_path / "in", "state": tmp_path / "state", "output": tmp_path / "out"}
    with JobProcess("both", **where, wait_s=WAIT_S / 2, kill_at=f"{step}:3") as job:
        assert job.wait()[0] == -9
    with JobProcess("both", **where) as job:
        code, errors = job.wait()
    assert code == 0, errors
    assert job.last["restored_from"] in RESTORED[step]
    assert 0 < job.last["start_rows"] < ROWS
    assert read_output(tmp_path / "out") == uninterrupted("both", tmp_path / "in", tmp_path / "expected")


def test_a_kill_in_the_last_checkpoint_of_a_bounded_input_loses_nothing(tmp_path: Path) -> None:
    """The input has ended, all windows have fired, and the process dies before their commit is published."""
    write_events(tmp_path / "in", 8)
    where = {"source": tmp_path / "in", "state": tmp_path / "state", "output": tmp_path / "out"}
    with JobProcess("both", **where, interval_s=1000, kill_at="committed:1") as job:
        assert job.wait()[0] == -9
    assert not [p for p in (tmp_path / "out").glob("*/**/*.parquet") if "_staging" not in p.parts]
    with JobProcess("both", **where, interval_s=1000) as job:
        code, errors = job.wait()
    assert code == 0, errors
    assert (job.last["restored_from"], job.last["start_rows"]) == (1, ROWS)
    assert read_output(tmp_path / "out") == uninterrupted("both", tmp_path / "in", tmp_path / "expected")


def test_what_the_jobs_are_compared_with_is_what_sql_says(tmp_path: Path) -> None:
    table = write_events(tmp_path / "in", 9)
    found = uninterrupted("tumbling", tmp_path / "in", tmp_path / "out")["w"]
    select = "count(1) AS n, sum(v) AS total, avg(x) AS mean, max(s) AS greatest"
    expected = one_shot(table, 2_000, 2_000, ("k", "j"), select)
    assert found == as_multiset(expected.select(sorted(expected.column_names)))


@pytest.mark.soak
def test_soak_kills(tmp_path: Path) -> None:
    """KILLS kills in all, five for each job; prints a line for each job."""
    wanted, done, replayed = int(os.environ.get("KILLS", "200")), 0, 0
    began, number = time.monotonic(), 0
    while done < wanted:
        pipeline = list(PIPELINES)[number % len(PIPELINES)]
        kills, again = run_and_kill(pipeline, 1000 + number, tmp_path / str(number), min(5, wanted - done))
        number, done, replayed = number + 1, done + kills, replayed + again
        print(f"job {number:3} ({pipeline}, seed {999 + number}): {kills} kills, {again} rows replayed, output equal")
    seconds = time.monotonic() - began
    print(f"{done} kills of {number} jobs in {seconds:.0f} s, {replayed} rows replayed, all outputs equal")
