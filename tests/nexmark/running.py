"""Runs queries in this process, with and without crashes, and compares what they wrote with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from operators.nexmark.merge import MergedFiles
from operators.nexmark.queries import QUERIES
from operators.nexmark.run import QueryRun, RunReport, RunSettings
from operators.report import JobOutcome
from operators.sources import SourceBatch
from tests.nexmark.reference import expected

__all__ = ["CrashError", "assert_equals_reference", "drain", "output_of", "run", "run_with_crashes"]


class CrashError(Exception):
    """Ends a run in the middle of its input, where the real one is killed."""


@dataclass(frozen=True)
class Place:
    """Where a run keeps things."""

    directory: Path

    def settings(self, events: Path, **options: object) -> RunSettings:
        return RunSettings(
            input=str(events),
            state=str(self.directory / "state"),
            output=str(self.directory / "out"),
            **options,  # type: ignore[arg-type]
        )


def _crash() -> None:
    raise CrashError


def run(query: str, events: Path, directory: Path, **options: object) -> RunReport:
    """To the end; ``options`` as in `RunSettings`."""
    result, report = QueryRun(QUERIES[query], Place(directory).settings(events, **options), kill=_crash).run()
    assert result.outcome is JobOutcome.FINISHED
    return report


def run_with_crashes(query: str, events: Path, directory: Path, crashes: list[int], **options: object) -> RunReport:
    """The same with a crash after each of these numbers of events; each run must go on where a checkpoint was."""
    restored: int | None = None
    for number, at in enumerate(crashes):
        attempt = QueryRun(
            QUERIES[query], Place(directory).settings(events, kill_after_events=at, **options), kill=_crash
        )
        try:
            attempt.run()
        except CrashError:
            assert attempt.counter.passed >= at
            assert attempt.counter.first < at
            assert (attempt.counter.first > 0) == (number > 0)
        else:
            raise AssertionError(f"{query} was not stopped at event {at}")
    report = run(query, events, directory, **options)
    restored = report.restored_from
    assert restored is not None
    return report


def drain(source: MergedFiles, position: object = None) -> list[SourceBatch]:
    """All batches after a position."""
    source.open(position)
    try:
        return list(iter(source.poll, None))
    finally:
        source.close()


def output_of(directory: Path) -> pa.Table:
    """What any reader of Parquet directories finds."""
    root = directory / "out"
    files = [
        str(path)
        for path in sorted(root.rglob("*.parquet"))
        if not any(part.startswith(("_", ".")) for part in path.relative_to(root).parts)
    ]
    assert files, "nothing was published"
    return pads.dataset(files, partitioning=pads.partitioning(flavor="hive"), partition_base_dir=str(root)).to_table()


def assert_equals_reference(query: str, events: Path, directory: Path) -> None:
    """Same columns, and the same rows as multisets; floats to 1e-9."""
    assert_same_rows(output_of(directory), expected(query, events))


def assert_same_rows(found: pa.Table, wanted: pa.Table) -> None:
    assert found.column_names == wanted.column_names
    assert found.num_rows == wanted.num_rows
    assert found.num_rows > 0
    wanted = wanted.cast(found.schema)
    floats = [f.name for f in found.schema if pa.types.is_floating(f.type)]
    order = [(name, "ascending") for name in found.column_names if name not in floats]
    found, wanted = found.sort_by(order), wanted.sort_by(order)
    for name in found.column_names:
        left, right = found[name], wanted[name]
        if name in floats:
            close = pc.less_equal(pc.abs(pc.subtract(left, right)), pc.multiply(pc.abs(right), 1e-9))
            assert pc.all(close).as_py(), name
        else:
            assert left.equals(right) or left.combine_chunks().equals(right.combine_chunks()), name
