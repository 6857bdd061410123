"""The runner: what it counts, what it prints, what it reads, how it dies and goes on."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pytest
from rich.console import Console

from operators.cli import main
from operators.errors import SourceChangedError
from operators.nexmark.counter import EventCounter
from operators.nexmark.merge import MergedFiles
from operators.nexmark.queries import QUERIES
from operators.nexmark.screen import progress_bar
from operators.sources import ParquetSource
from tests.nexmark.conftest import EVENTS
from tests.nexmark.reference import expected
from tests.nexmark.running import assert_equals_reference, drain, output_of, run, run_with_crashes

KEYS = [
    "query", "events", "seconds", "events_per_second", "peak_rss_mib", "rows_out", "checkpoints",
    "checkpoint_sync_ms_p50", "checkpoint_sync_ms_max", "checkpoint_bytes", "restored_from",
]  # fmt: skip


def command(query: str, events: Path, directory: Path, *options: str) -> list[str]:
    places = ["--input", str(events), "--state", str(directory / "state"), "--output", str(directory / "out")]
    return ["nexmark", "run", query, *places, *options]


def report_of(output: str) -> dict[str, object]:
    report = json.loads(output.splitlines()[-1])
    assert isinstance(report, dict)
    return report


# -- the command


def test_the_last_line_is_one_json_object(ordered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("w", ordered, tmp_path)) == 0
    report = report_of(capsys.readouterr().out)
    assert list(report) == KEYS
    assert report["query"] == "w"
    assert report["events"] == EVENTS
    assert report["rows_out"] == output_of(tmp_path).num_rows == expected("w", ordered).num_rows
    assert report["restored_from"] is None
    assert report["seconds"] > 0
    assert abs(report["events_per_second"] * report["seconds"] / EVENTS - 1) < 0.1
    assert report["peak_rss_mib"] > 10
    assert report["checkpoints"] >= 1
    assert report["checkpoint_sync_ms_p50"] <= report["checkpoint_sync_ms_max"]


@pytest.mark.parametrize("query", ["w", "q9"])
def test_a_killed_process_is_restored_and_publishes_every_row_once(query: str, ordered: Path, tmp_path: Path) -> None:
    options = ["--checkpoint-events", "4000", "--batch-rows", "1000"]
    arguments = command(query, ordered, tmp_path, *options, "--kill-after-events", "17000")
    killed = subprocess.run([sys.executable, "-m", "operators", *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert killed.stdout == b""
    arguments = command(query, ordered, tmp_path, *options)
    last = subprocess.run([sys.executable, "-m", "operators", *arguments], capture_output=True, check=True)
    report = report_of(last.stdout.decode())
    assert report["events"] == EVENTS
    assert report["restored_from"] is not None
    assert report["rows_out"] == output_of(tmp_path).num_rows
    assert_equals_reference(query, ordered, tmp_path)


def test_a_run_after_the_end_adds_nothing(ordered: Path, tmp_path: Path) -> None:
    first = run("w", ordered, tmp_path)
    again = run("w", ordered, tmp_path)
    assert again.restored_from is not None
    assert again.events == EVENTS
    assert again.events_per_second == 0
    assert again.rows_out == first.rows_out
    assert_equals_reference("w", ordered, tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_makes_it_take_a_checkpoint_and_the_same_command_goes_on(
    number: int,
    code: int,
    ordered: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def interrupting_bar(*_: object) -> Iterator[Callable[[int], None]]:
        once = iter([number])
        yield lambda _: next((signal.raise_signal(number) for number in once), None)

    arguments = command("w", ordered, tmp_path, "--batch-rows", "1000")
    with monkeypatch.context() as patch:
        patch.setattr("operators.nexmark.command.progress_bar", interrupting_bar)
        assert main(arguments) == code
    captured = capsys.readouterr()
    stopped = report_of(captured.out)
    assert 0 < stopped["events"] < EVENTS
    assert "the same command goes on from there" in captured.err
    assert main(arguments) == 0
    assert report_of(capsys.readouterr().out)["restored_from"] is not None
    assert_equals_reference("w", ordered, tmp_path)


def test_a_checkpoint_is_taken_every_so_many_events(ordered: Path, tmp_path: Path) -> None:
    options = {"batch_rows": 500, "checkpoint_interval_s": None}
    report = run("w", ordered, tmp_path / "every", checkpoint_events=3_000, **options)
    assert EVENTS // 3_000 <= report.checkpoints <= EVENTS // 3_000 + 3
    assert run("w", ordered, tmp_path / "end", **options).checkpoints <= 2


def test_queries_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nexmark", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(QUERIES)


@pytest.mark.parametrize("command_", [[], ["generate"], ["run"], ["list"]])
def test_every_command_has_help(command_: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["nexmark", *command_, "--help"])
    assert done.value.code == 0
    assert capsys.readouterr().out


def test_progress_goes_into_a_pipe_as_a_line_now_and_then() -> None:
    now, pipe = [0.0], io.StringIO()
    with progress_bar(Console(file=pipe), "w", 3_000, clock=lambda: now[0]) as advance:
        for now[0], events in ((1.0, 100), (6.0, 1_000), (7.0, 1_200), (11.5, 2_500)):
            advance(events)
    assert pipe.getvalue().splitlines() == ["w: event 1,000 of 3,000", "w: event 2,500 of 3,000"]


# -- what is wrong


def test_an_unknown_query_is_wrong_usage(ordered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(command("q99", ordered, tmp_path))
    assert done.value.code == 2
    assert "q99" in capsys.readouterr().err


def test_a_kind_that_the_query_needs_and_is_not_there_is_named(
    ordered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("w", tmp_path / "nowhere", tmp_path)) == 1
    assert f"{tmp_path / 'nowhere' / 'bid'}" in capsys.readouterr().err
    only = tmp_path / "only"
    only.mkdir()
    (only / "person").symlink_to(ordered / "person")
    assert main(command("w", only, tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: BadInputError: no bid events: {only / 'bid'}: no")
    assert not (tmp_path / "state").exists()


def test_a_kind_that_the_query_does_not_need_may_be_missing(ordered: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    (only / "bid").symlink_to(ordered / "bid")
    assert run("q2", only, tmp_path).events == EVENTS


def test_a_missing_column_is_named(ordered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(ordered, tmp_path / "in", bid="SELECT * EXCLUDE (price) FROM events ORDER BY seq")
    assert main(command("w", tmp_path / "in", tmp_path)) == 1
    error = capsys.readouterr().err
    assert "SchemaError" in error
    assert "price" in error


def test_a_column_of_a_type_that_does_not_convert_is_named(
    ordered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(ordered, tmp_path / "in", bid="SELECT * REPLACE ('a' || price AS price) FROM events ORDER BY seq")
    assert main(command("w", tmp_path / "in", tmp_path)) == 1
    error = capsys.readouterr().err
    assert "SchemaError" in error
    assert "'price' is string, which is no int64" in error


# -- files that others wrote


def rewritten(events: Path, directory: Path, name: str = "data", **selects: str) -> None:
    """Events as DuckDB writes them: one file for each select, microseconds, row groups of its own size."""
    with duckdb.connect() as connection:
        for kind, select in selects.items():
            (directory / kind).mkdir(parents=True, exist_ok=True)
            connection.execute(
                f"CREATE OR REPLACE VIEW events AS SELECT * FROM read_parquet('{events}/{kind}/*.parquet')"
            )
            target = directory / kind / f"{name}.parquet"
            connection.execute(f"COPY ({select}) TO '{target}' (FORMAT parquet, ROW_GROUP_SIZE 2048)")


def test_names_sizes_and_types_of_the_files_do_not_matter(ordered: Path, tmp_path: Path) -> None:
    files = {"9": (0, 500), "10": (500, 20_000), "a b": (20_000, 20_001), "1": (20_001, EVENTS)}
    for name, (start, end) in files.items():
        narrow = "SELECT * REPLACE (auction::INT AS auction, bidder::INT AS bidder) FROM events"
        where = f"WHERE seq >= {start} AND seq < {end} ORDER BY seq"
        rewritten(ordered, tmp_path / "in", name, bid=f"{narrow} {where}")
    report = run("w", tmp_path / "in", tmp_path)
    assert report.events == EVENTS
    assert_equals_reference("w", ordered, tmp_path)


def test_files_that_overlap_are_merged_and_crashes_change_nothing(ordered: Path, tmp_path: Path) -> None:
    for part in range(3):  # by hash: every file spans the whole stream
        rewritten(ordered, tmp_path / "in", f"hash-{part}", bid=f"FROM events WHERE auction % 5 = {part} ORDER BY seq")
    for part, (start, end) in enumerate(((0, 12_000), (11_000, 25_000), (24_000, EVENTS))):  # each begins in the last
        shared = f"FROM events WHERE auction % 5 > 2 AND seq >= {start} AND seq < {end}"
        only = f"{shared} AND (seq < {end - 1000} OR seq % 2 = 0) AND (seq >= {start + 1000} OR seq % 2 = 1)"
        edges = {
            0: only.replace(f"seq >= {start + 1000}", "true"),
            1: only,
            2: only.replace(f"seq < {end - 1000}", "true"),
        }
        rewritten(ordered, tmp_path / "in", f"time-{part}", bid=f"{edges[part]} ORDER BY seq")
    assert len(ParquetSource(tmp_path / "in" / "bid", ["seq"]).chains("seq")) == 5
    options = {"checkpoint_events": 4_000, "checkpoint_interval_s": None, "batch_rows": 900}
    run_with_crashes("w", tmp_path / "in", tmp_path, [9_000, 17_000], **options)
    assert_equals_reference("w", ordered, tmp_path)


def test_rows_out_of_order_within_the_delay_may_lie_in_files_of_any_name(ordered: Path, tmp_path: Path) -> None:
    jittered = "SELECT *, ntile(4) OVER (ORDER BY epoch_ms(dateTime) + hash(seq) % 3500, seq) AS part FROM events"
    for part in range(1, 5):
        rows = f"SELECT * EXCLUDE (part) FROM ({jittered}) WHERE part = {part}"
        select = f"{rows} ORDER BY epoch_ms(dateTime) + hash(seq) % 3500, seq"
        rewritten(ordered, tmp_path / "in", f"data_{12 - part}", person=select, auction=select, bid=select)
    for query in ("q8", "w"):
        run_with_crashes(query, tmp_path / "in", tmp_path / query, [13_000], checkpoint_events=4_000)
        assert_equals_reference(query, ordered, tmp_path / query)


def test_merged_files_are_in_order_and_restored_at_every_batch(ordered: Path, tmp_path: Path) -> None:
    for part in range(3):
        rewritten(
            ordered, tmp_path, f"{part}", bid=f"FROM events WHERE bidder % 3 = {part} ORDER BY seq // 40, seq % 7"
        )
    bids = str(tmp_path / "bid")
    full = drain(MergedFiles(bids, ["seq", "bidder"], batch_rows=3_000))
    numbers = np.concatenate([item.batch.column("seq").to_numpy() for item in full])
    assert len(numbers) == EVENTS * 46 // 50
    assert (np.maximum.accumulate(numbers) - numbers).max() < 80
    for at in range(0, len(full), 3):
        assert drain(MergedFiles(bids, ["seq", "bidder"], batch_rows=3_000), full[at].position) == full[at + 1 :]
    rewritten(ordered, tmp_path, "more", bid="FROM events WHERE seq % 100 = 5 ORDER BY seq")
    with pytest.raises(SourceChangedError, match="chains"):
        drain(MergedFiles(bids, ["seq", "bidder"], batch_rows=3_000), full[0].position)


# -- the count


def test_the_stream_has_passed_what_every_reader_has_passed() -> None:
    kills: list[int] = []
    counter = EventCounter(1_000, checkpoint_events=100, kill_after=250, kill=lambda: kills.append(counter.passed))
    counter.open("bid", 0)
    counter.open("person", 0)
    for bids, persons, due in ((120, 0, False), (120, 130, True), (260, 150, False), (260, 255, True)):
        counter.poll()
        counter.reach("bid", bids)
        counter.reach("person", persons)
        assert counter.passed == min(bids, persons)
        assert counter.checkpoint_due() == due
        assert not counter.checkpoint_due()
    assert not kills
    counter.poll()
    assert kills == [255]


def test_a_reader_at_its_end_has_passed_everything() -> None:
    counter = EventCounter(1_000, kill_after=1_000, kill=lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    counter.open("person", 0)
    counter.reach("person", 951)
    counter.poll()
    with pytest.raises(RuntimeError, match="killed"):
        counter.end("person")
    assert counter.passed == 1_000


def test_a_run_that_is_restored_beyond_the_point_is_not_killed_there_again() -> None:
    counter = EventCounter(1_000, checkpoint_events=100, kill_after=500, kill=lambda: pytest.fail("killed"))
    counter.open("bid", 700)
    counter.open("person", 500)
    counter.poll()
    assert counter.first == 500
    assert not counter.checkpoint_due()
    counter.reach("person", 601)
    counter.poll()
    assert counter.checkpoint_due()
