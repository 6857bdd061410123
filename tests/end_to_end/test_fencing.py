"""A second process takes over the state of a running job; the first one must not do any more harm."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from operators.exit_codes import ExitCode
from operators.sinks import published_rolls
from tests.end_to_end.job_process import ROWS, JobProcess, build, read_output, write_events

PIPELINE = "both"
SINKS = ("short", "long", "rows")


def published(output: Path) -> set[str]:
    """Every file that a reader may see, and every entry of the commit logs."""
    return {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file() and "_staging" not in p.parts}


def rolls(output: Path) -> set[str]:
    """Checkpoint and attempt of every published roll of every sink, as `checkpoint-attempt-sequence`."""
    return {roll.roll for sink in SINKS for roll in published_rolls(output / sink)}


@pytest.fixture
def where(tmp_path: Path) -> dict[str, Path]:
    write_events(tmp_path / "in", 11)
    return {"source": tmp_path / "in", "state": tmp_path / "state", "output": tmp_path / "out"}


def assert_complete(where: dict[str, Path], tmp_path: Path) -> None:
    build(PIPELINE, source=where["source"], state=None, output=tmp_path / "expected").run()
    assert read_output(where["output"]) == read_output(tmp_path / "expected")


def test_a_running_job_is_fenced_by_its_successor_and_publishes_nothing_more(
    tmp_path: Path, where: dict[str, Path]
) -> None:
    with JobProcess(PIPELINE, **where, wait_s=0.1) as first:
        assert first.wait_for(lambda report: (report.get("checkpoint") or 0) >= 2 and len(rolls(where["output"])) >= 2)
        before = rolls(where["output"])
        with JobProcess(PIPELINE, **where) as second:
            code, errors = first.wait()
            assert code == ExitCode.FENCED, errors
            assert errors.startswith("FencedError")
            assert len(errors.strip().splitlines()) == 1
            assert second.wait() == (0, "")
    assert first.last["rows"] < ROWS
    restored = second.last["restored_from"]
    assert restored >= first.last["checkpoint"]
    attempts = {roll.split("-")[1] for roll in before}
    late = {r for r in rolls(where["output"]) if r.split("-")[1] in attempts and int(r.split("-")[0]) > restored}
    assert len(attempts) == 1
    assert not late, "the first job published what was committed after the second had taken over"
    assert_complete(where, tmp_path)


def test_a_job_that_slept_through_its_takeover_publishes_nothing_when_it_wakes(
    tmp_path: Path, where: dict[str, Path]
) -> None:
    """The first process stands still while the second opens the store and finishes."""
    with JobProcess(PIPELINE, **where, wait_s=0.05) as first:
        assert first.wait_for(lambda report: (report.get("checkpoint") or 0) >= 2)
        first.signal(signal.SIGSTOP)
        with JobProcess(PIPELINE, **where) as second:
            assert second.wait() == (0, "")
        assert second.last["restored_from"] >= 2
        after = published(where["output"])
        complete = read_output(where["output"])
        first.signal(signal.SIGCONT)
        code, errors = first.wait()
    assert code == ExitCode.FENCED, errors
    assert published(where["output"]) == after
    assert read_output(where["output"]) == complete
    assert_complete(where, tmp_path)
