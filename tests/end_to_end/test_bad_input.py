"""What goes wrong outside of a job: a clear error, and once the cause is mended, the right output.

Every story has three lives. The first reads file 0 and a part of file 1, and stops. The second meets the
trouble and raises. For the third the trouble is gone; it finishes, and the output must be that of a job to
which nothing ever happened.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from operators import (
    BadEventTimeError,
    BadInputError,
    JobMismatchError,
    JobResult,
    SchemaError,
    SinkOccupiedError,
    SourceChangedError,
    StreamContext,
)
from operators.sources import ParquetSource
from operators.sources.base import SourceBatch
from statebackend import StorageFullError
from tests.end_to_end.job_process import DISORDER_MS, ROWS, both, build, read_output, tumbling, write_events

STOP_AT = 2_500
BATCH_ROWS = 50


class CallingSource(ParquetSource):
    """Calls back once, before the batch at this row."""

    def __init__(self, path: Path, row: int, call: Callable[[], object]) -> None:
        super().__init__(path, batch_rows=BATCH_ROWS)
        self._row = row
        self._call: Callable[[], object] | None = call

    def poll(self) -> SourceBatch | None:
        item = super().poll()
        if self._call is not None and item is not None and item.position["rows"] >= self._row:
            self._call()
            self._call = None
        return item


@dataclass
class Story:
    """The places of one job."""

    source: Path
    state: Path
    output: Path
    expected: Path

    def first_life(self) -> None:
        """Read up to the middle of file 1."""
        source = CallingSource(self.source, STOP_AT, lambda: job.stop())
        job = build("both", source=source, state=self.state, output=self.output, interval_s=0.05).job()
        result = job.run()
        assert result.outcome == "stopped"
        assert ROWS / 3 < result.rows_read < 2 * ROWS / 3

    def run(self, source: ParquetSource | None = None) -> JobResult:
        target = source or ParquetSource(self.source, batch_rows=BATCH_ROWS)
        return build("both", source=target, state=self.state, output=self.output, interval_s=0.05).run()

    def assert_the_output_is_right(self) -> None:
        """Finish; the output is that of a job to which nothing happened."""
        result = self.run()
        assert result.restored_from is not None
        assert result.restored_positions["events"]["rows"] >= STOP_AT
        build("both", source=self.source, state=None, output=self.expected).run()
        assert read_output(self.output) == read_output(self.expected)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    write_events(tmp_path / "in", 21)
    story = Story(tmp_path / "in", tmp_path / "state", tmp_path / "out", tmp_path / "expected")
    story.first_life()
    return story


# -- files


def rewrite(name: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], object]:
    def damage(source: Path) -> None:
        table = change(pq.read_table(source / name))
        pq.write_table(table, source / name, row_group_size=500)

    return damage


def set_time(row: int, value: datetime | None) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        times = table["t"].to_pylist()
        times[row] = value
        return table.set_column(0, "t", pa.array(times, table.schema.field("t").type))

    return change


def cast_v(table: pa.Table) -> pa.Table:
    return table.set_column(3, "v", table["v"].cast(pa.string()))


def remove_all(source: Path) -> None:
    for path in source.iterdir():
        path.unlink()


TROUBLES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "a column is missing": (
        rewrite("2.parquet", lambda t: t.drop_columns("v")),
        SchemaError,
        r"2\.parquet.*0\.parquet",
    ),
    "a column is of another type": (rewrite("2.parquet", cast_v), SchemaError, r"2\.parquet.*v: string.*v: int64"),
    "an event time is null": (
        # In the first batch of its file: a checkpoint inside the damaged file would rightly refuse the mended one.
        rewrite("2.parquet", set_time(30, None)),
        BadEventTimeError,
        r"'t'.*null.*row 30 .*2\.p",
    ),
    "an event time is far in the future": (
        rewrite("2.parquet", set_time(7, datetime(3000, 1, 1, tzinfo=UTC))),
        BadEventTimeError,
        r"'t'.*ahead of the clock.*3000.*row 7 ",
    ),
    "a file is empty": (lambda d: (d / "2.parquet").write_bytes(b""), BadInputError, r"2\.parquet.*0 bytes"),
    "a new file is empty": (lambda d: (d / "3.parquet").touch(), BadInputError, r"3\.parquet.*0 bytes"),
    "a file is torn": (
        lambda d: (d / "2.parquet").write_bytes((d / "2.parquet").read_bytes()[:-100]),
        BadInputError,
        r"2\.parquet.*not a Parquet file",
    ),
    "a file that was read has grown": (
        rewrite("0.parquet", lambda t: pa.concat_tables([t, t.slice(0, 10)])),
        SourceChangedError,
        r"0\.parquet",
    ),
    "the file that is being read has grown": (
        rewrite("1.parquet", lambda t: pa.concat_tables([t, t.slice(0, 10)])),
        SourceChangedError,
        r"1\.parquet.*expected \d+ bytes.*found \d+ bytes",
    ),
    "a file that was read vanished": (
        lambda d: (d / "0.parquet").unlink(),
        SourceChangedError,
        r"1\.parquet.*vanished",
    ),
    "the file that is being read vanished": (
        lambda d: (d / "1.parquet").unlink(),
        SourceChangedError,
        r"1\.parquet.*no such file",
    ),
    "all files vanished": (remove_all, BadInputError, r"no \*\.parquet file"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_bad_input_is_named_and_nothing_is_lost(story: Story, trouble: str) -> None:
    damage, error, message = TROUBLES[trouble]
    good = {p.name: p.read_bytes() for p in story.source.iterdir()}
    damage(story.source)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        story.run()
    remove_all(story.source)
    for name, content in good.items():
        (story.source / name).write_bytes(content)
    story.assert_the_output_is_right()


def test_a_file_that_vanishes_while_it_is_read_is_named_and_nothing_is_lost(story: Story) -> None:
    aside = story.source.parent / "aside"
    source = CallingSource(story.source, STOP_AT + 200, lambda: (story.source / "2.parquet").rename(aside))
    with pytest.raises(SourceChangedError, match=r"2\.parquet.*no such file"):
        story.run(source)
    aside.rename(story.source / "2.parquet")
    story.assert_the_output_is_right()


def test_a_csv_file_that_grew_between_two_runs_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    table = write_events(tmp_path / "in", 22)
    path = tmp_path / "events.csv"
    pacsv.write_csv(table.set_column(0, "t", table["t"].cast(pa.timestamp("ms", "UTC"))), path)

    def context(state: Path | None, output: Path) -> StreamContext:
        context = StreamContext("csv", state=state, checkpoint_interval=0.02)
        stream = context.read_csv(path, event_time="t", max_disorder=DISORDER_MS, name="events", block_bytes=1 << 14)
        tumbling(stream, str(output))
        return context

    job = context(tmp_path / "state", tmp_path / "out").job(lambda _: job.stop())
    assert job.run().outcome == "stopped"
    good = path.read_bytes()
    path.write_bytes(good + good.splitlines(keepends=True)[-1])
    with pytest.raises(SourceChangedError, match=r"events\.csv.*expected \d+ bytes.*found \d+ bytes"):
        context(tmp_path / "state", tmp_path / "out").run()
    path.write_bytes(good)
    assert context(tmp_path / "state", tmp_path / "out").run().restored_from is not None
    context(None, tmp_path / "expected").run()
    assert read_output(tmp_path / "out") == read_output(tmp_path / "expected")


# -- a full disk


class Disk:
    """A place for files that can run out of space."""

    def __init__(self, root: Path, fill: Callable[[], object], free: Callable[[], object]) -> None:
        self.root = root
        self.fill = fill
        self.free = free


@pytest.fixture(params=["a small disk", "failing syncs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    if request.param == "failing syncs":
        real = os.fsync

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        yield Disk(root, lambda: monkeypatch.setattr(os, "fsync", full), lambda: monkeypatch.setattr(os, "fsync", real))
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(root)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small disk can be mounted by root only")
    try:
        ballast = root / "ballast"

        def fill() -> None:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017 - the disk is full, as it should be

        yield Disk(root, fill, ballast.unlink)
    finally:
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize("place", ["state", "output"])
def test_a_full_disk_is_an_error_that_says_so_and_nothing_is_lost(tmp_path: Path, disk: Disk, place: str) -> None:
    write_events(tmp_path / "in", 23)
    story = Story(tmp_path / "in", tmp_path / "state", tmp_path / "out", tmp_path / "expected")
    setattr(story, place, disk.root / place)
    story.first_life()
    with pytest.raises((StorageFullError, OSError), match=r"(?i)no space left"):
        story.run(CallingSource(story.source, STOP_AT + 100, disk.fill))
    disk.free()
    story.assert_the_output_is_right()


def test_a_disk_that_is_full_for_a_moment_does_not_end_the_job(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many checkpoints in a row as are tolerated may fail."""
    real, failures = os.fsync, [0]

    def full_for_a_moment(descriptor: int) -> None:
        failures[0] += 1
        if failures[0] <= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    source = CallingSource(story.source, STOP_AT + 100, lambda: monkeypatch.setattr(os, "fsync", full_for_a_moment))
    result = story.run(source)
    assert result.outcome == "finished"
    assert result.failed_checkpoints > 0
    build("both", source=story.source, state=None, output=story.expected).run()
    assert read_output(story.output) == read_output(story.expected)


# -- the state and the output of another job


def test_the_state_of_another_job_is_refused_and_left_as_it_is(story: Story, tmp_path: Path) -> None:
    with pytest.raises(JobMismatchError, match=r"(?s)'both'.*'tumbling'.*use another state directory"):
        build("tumbling", source=story.source, state=story.state, output=tmp_path / "other").run()
    story.assert_the_output_is_right()


def test_the_state_of_the_same_job_with_another_window_is_refused_with_the_difference(story: Story) -> None:
    context = StreamContext("both", state=story.state)
    stream = context.from_source(
        ParquetSource(story.source, batch_rows=BATCH_ROWS), event_time="t", max_disorder=DISORDER_MS + 1, name="events"
    )
    both(stream, str(story.output))
    with pytest.raises(JobMismatchError, match=rf"(?s)events.*max_disorder_ms: {DISORDER_MS} -> {DISORDER_MS + 1}"):
        context.run()
    story.assert_the_output_is_right()


def test_the_output_directory_of_another_job_is_refused_and_left_as_it_is(story: Story, tmp_path: Path) -> None:
    with pytest.raises(SinkOccupiedError, match="not this job's"):
        build("both", source=story.source, state=tmp_path / "other", output=story.output).run()
    story.assert_the_output_is_right()
