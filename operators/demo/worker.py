"""The process that is killed: runs the job and reports on its standard output, a JSON object a line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from operators.demo.pipeline import WINDOWS, FlightSource, build_job
from operators.report import JobOutcome, JobProgress

__all__ = ["Report", "WorkerSettings", "run_worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One run of the job. ``source``: the directory of the flights; ``rows_per_s``: None as fast as it can."""

    source: Path
    state: str
    output: str
    seed: int
    batch_rows: int
    checkpoint_interval_s: float
    rows_per_s: float | None = None

    def arguments(self) -> list[str]:
        """The command line of `python -m operators` that runs it."""
        pace = [] if self.rows_per_s is None else [f"--rows-per-second={self.rows_per_s}"]
        return [
            "demo-worker",
            f"--source={self.source}",
            f"--state={self.state}",
            f"--output={self.output}",
            f"--seed={self.seed}",
            f"--batch-rows={self.batch_rows}",
            f"--checkpoint-interval={self.checkpoint_interval_s}",
            *pace,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How far a worker is.

    ``rows``: position in the stream; ``start_rows``: where this life began; ``restored_from`` and
    ``checkpoint``: ids of the restored and of the last checkpoint committed in this life;
    ``windows``: result rows of this life. ``error``: the worker ends because of it.
    """

    rows: int = 0
    start_rows: int = 0
    restored_from: int | None = None
    checkpoint: int | None = None
    windows: int = 0
    finished: bool = False
    error: str | None = None

    def line(self) -> str:
        """For the pipe."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: str) -> Report:
        """From the pipe; ValueError or TypeError for a line that was torn."""
        return cls(**json.loads(line))


def run_worker(settings: WorkerSettings) -> None:
    """Run the job to its end; errors are reported, then raised."""
    latest = Report()

    def on_progress(progress: JobProgress) -> None:
        nonlocal latest
        operators = progress.operators
        latest = Report(
            rows=source.start_rows + progress.rows_read,
            start_rows=source.start_rows,
            restored_from=progress.restored_from,
            checkpoint=max((c.checkpoint_id for c in progress.checkpoints), default=None),
            windows=sum(operators[kind].rows_out for kind in WINDOWS),
        )
        _send(latest)

    try:
        source = FlightSource(
            settings.source, seed=settings.seed, batch_rows=settings.batch_rows, rows_per_s=settings.rows_per_s
        )
        context = build_job(
            source, state=settings.state, output=settings.output, checkpoint_interval_s=settings.checkpoint_interval_s
        )
        result = context.run(on_progress)
    except Exception as error:
        _send(Report(error=f"{type(error).__name__}: {error}"))
        raise
    if result.outcome is JobOutcome.FINISHED:
        _send(replace(latest, finished=True))


def _send(report: Report) -> None:
    sys.stdout.write(report.line() + "\n")
    sys.stdout.flush()
