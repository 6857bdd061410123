"""Starts the worker, kills it at random moments, starts it again, until it has finished.

Each kill has a target row, drawn at random from its own share of the stream, and a random delay of up
to one checkpoint interval, so that it may meet any step of a checkpoint. It comes when the worker
has passed the row, this life of it has committed a checkpoint, and the delay is over.
"""

from __future__ import annotations

import contextlib
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from operators.demo.worker import Report, WorkerSettings
from operators.errors import OperatorError

__all__ = ["Kill", "Listener", "Run", "WorkerFailedError", "plan_kills", "run_killed", "run_through"]

_POLL_S = 0.02
_ERROR_LINES = 15


class WorkerFailedError(OperatorError):
    """The worker ended by itself, without having finished; ``exit_code`` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """When to kill: at this row of the stream at the earliest, and so much later."""

    row: int
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of a job. ``start_row``: where its first life began."""

    report: Report
    seconds: float
    start_row: int
    kills: int
    checkpoints: int


class Listener(Protocol):
    """Is told what happens, to show it."""

    def progress(self, report: Report) -> None:
        """The worker has come further."""

    def killed(self, number: int, report: Report) -> None:
        """The worker was killed; ``report`` is its last."""

    def recovered(self, report: Report, first_output_s: float | None) -> None:
        """The next life gave its first window so long after it was started; None: it ended before that."""


def plan_kills(kills: int, rows: int, checkpoint_interval_s: float, seed: int) -> list[Kill]:
    """One kill in each of as many equal shares of the stream."""
    chance = random.Random(seed)  # noqa: S311 - to choose moments, not secrets
    share = rows / (kills + 0.5)
    return [
        Kill(row=int((i + chance.uniform(0.2, 1.0)) * share), delay_s=chance.uniform(0.0, checkpoint_interval_s))
        for i in range(kills)
    ]


def run_through(settings: WorkerSettings, directory: Path) -> Run:
    """A run that is never killed; ``directory`` is for its messages."""
    return _run(settings, [], directory, None)


def run_killed(settings: WorkerSettings, kills: Sequence[Kill], directory: Path, listener: Listener) -> Run:
    """Kill and restart the worker until it has finished.

    Raises `WorkerFailedError` when it ends by itself with an error. Does not leave it running.
    """
    return _run(settings, kills, directory, listener)


def _run(settings: WorkerSettings, kills: Sequence[Kill], directory: Path, listener: Listener | None) -> Run:
    waiting = list(kills)
    began = time.monotonic()
    start_row = -1
    checkpoints: set[int] = set()
    while True:
        with _Worker(settings, directory / "worker.log") as worker:
            told = False
            for report in worker.reports():
                start_row = report.start_rows if start_row < 0 else start_row
                checkpoints |= set() if report.checkpoint is None else {report.checkpoint}
                if listener is not None:
                    listener.progress(report)
                    if report.windows and not told:
                        told = _tell_recovery(listener, report, worker.age_s)
                if waiting and _is_due(waiting[0], worker, report):
                    worker.kill()
            if listener is not None and not told:
                _tell_recovery(listener, worker.last, None)
            if not worker.was_killed:
                worker.check()
                return Run(
                    report=worker.last,
                    seconds=time.monotonic() - began,
                    start_row=start_row,
                    kills=len(kills) - len(waiting),
                    checkpoints=len(checkpoints),
                )
            waiting.pop(0)
            if listener is not None:
                listener.killed(len(kills) - len(waiting), worker.last)


def _tell_recovery(listener: Listener, report: Report, first_output_s: float | None) -> bool:
    if report.restored_from is not None:
        listener.recovered(report, first_output_s)
    return True


def _is_due(kill: Kill, worker: _Worker, report: Report) -> bool:
    if report.checkpoint is None or report.rows < kill.row or report.finished:
        return False
    return worker.wait_before_kill(kill.delay_s)


class _Worker:
    """One life of the worker process."""

    def __init__(self, settings: WorkerSettings, log: Path) -> None:
        self._settings = settings
        self._log = log
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._kill_at: float | None = None
        self.was_killed = False
        self.last = Report()

    def __enter__(self) -> _Worker:
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C is for the supervisor, which then kills the worker.
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, "-m", "operators", *self._settings.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name="worker-reports")
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

    @property
    def age_s(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._started

    def reports(self) -> Iterator[Report]:
        """What the worker reports; while nothing new comes the last report again; ends with the process."""
        while True:
            try:
                line = self._lines.get(timeout=_POLL_S)
            except queue.Empty:
                if self.last.rows:
                    yield self.last
                continue
            if line is None:
                self._process.wait()
                return
            with contextlib.suppress(ValueError, TypeError):  # torn by the kill
                self.last = Report.parse(line)
                yield self.last

    def wait_before_kill(self, delay_s: float) -> bool:
        """Whether so much time went by since this was first asked."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + delay_s
        return time.monotonic() >= self._kill_at

    def kill(self) -> None:
        """SIGKILL, unless it has just ended by itself."""
        self._process.kill()
        self.was_killed = self._process.wait() == -signal.SIGKILL

    def check(self) -> None:
        """Raise `WorkerFailedError` unless the job has finished."""
        code = self._process.returncode
        if code == 0 and self.last.finished:
            return
        said = self._log.read_text(errors="replace").strip().splitlines()[-_ERROR_LINES:]
        reason = self.last.error or "\n".join(said) or f"it ended with code {code} and said nothing"
        raise WorkerFailedError(reason, code)

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._lines.put(line)
        self._lines.put(None)
