"""``python -m operators demo``: the whole story, from the flights to the verdict."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads

from operators.demo.compare import compare
from operators.demo.pipeline import EVENT_TIME, MAX_DISORDER, WINDOWS, sql_answer
from operators.demo.screen import Screen
from operators.demo.supervisor import plan_kills, run_killed, run_through
from operators.demo.worker import WorkerSettings
from operators.flights import write_flights

__all__ = ["DemoSettings", "run_demo"]

_BATCHES = 300
_RUN_S_MIN = 9.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What the user may choose. ``rows`` None: all; ``state``, ``output`` None: temporary, deleted at the end."""

    kills: int = 3
    rows: int | None = None
    checkpoint_interval_s: float = 0.5
    state: str | None = None
    output: str | None = None
    seed: int = 0


def run_demo(settings: DemoSettings) -> bool:
    """Run the demo; returns whether all outputs agree.

    Raises `BadInputError` if the flights are not installed and `WorkerFailedError` if the job fails.
    """
    directory = Path(tempfile.mkdtemp(prefix="flights-demo-"))
    try:
        return _Demo(settings, directory).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Demo:
    def __init__(self, settings: DemoSettings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._source = directory / "flights"
        rows = write_flights(self._source, settings.rows, settings.seed, MAX_DISORDER).rows
        self._rows = rows
        self._screen = Screen(rows=rows, kills=settings.kills)
        run_s = max(_RUN_S_MIN, (settings.kills + 1) * (2 * settings.checkpoint_interval_s + 1))
        self._worker = WorkerSettings(
            source=self._source,
            state=settings.state or str(directory / "state"),
            output=settings.output or str(directory / "output"),
            seed=settings.seed,
            batch_rows=max(1, rows // _BATCHES),
            checkpoint_interval_s=settings.checkpoint_interval_s,
            rows_per_s=rows / run_s if settings.kills else None,
        )

    def run(self) -> bool:
        """The killed job, the references, the comparison."""
        settings, screen, rows = self._settings, self._screen, self._rows
        minutes = MAX_DISORDER.total_seconds() / 60
        screen.line("stream", f"{rows:,} flights in event-time order, with up to {minutes:.0f} minutes of disorder")
        screen.line("job", "windows of 1 h, and of 6 h every hour, to Parquet, exactly once")
        for name, kept, place in (("state", settings.state, "state"), ("output", settings.output, "output")):
            screen.line(name, kept or f"{self._directory / place} (deleted at the end)")
        kills = plan_kills(settings.kills, rows, settings.checkpoint_interval_s, settings.seed)
        with screen.bar():
            run = run_killed(self._worker, kills, self._directory, screen)
        screen.finished(run)
        with screen.working("the same job, never killed, and one SQL query over all flights"):
            references = self._references()
        flights = pads.dataset(self._source).to_table([EVENT_TIME, "origin", "carrier", "dep_delay"])
        found = _read_output(self._worker.output)
        results = [
            (kind, {name: compare(found[kind], tables[kind], flights) for name, tables in references.items()})
            for kind in WINDOWS
        ]
        screen.comparison(results)
        equal = all(c.equal for _, by_reference in results for c in by_reference.values())
        screen.verdict(equal=equal)
        return equal

    def _references(self) -> Mapping[str, Mapping[str, pa.Table]]:
        """What both references say, by reference and kind of window."""
        settings = replace(
            self._worker,
            state=str(self._directory / "state-never-killed"),
            output=str(self._directory / "output-never-killed"),
            rows_per_s=None,
        )
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(sql_answer, self._source)
            run_through(settings, self._directory)
            return {"never killed": _read_output(settings.output), "one SQL query": answer.result()}


def _read_output(output: str) -> dict[str, pa.Table]:
    """All rows that any reader of Parquet directories would find, by kind of window."""
    partitions = pads.partitioning(pa.schema([("origin", pa.string())]), flavor="hive")
    tables = {}
    for kind in WINDOWS:
        filesystem, path = fsspec.core.url_to_fs(f"{output}/{kind}")
        tables[kind] = pads.dataset(path, filesystem=filesystem, format="parquet", partitioning=partitions).to_table()
    return tables
