"""What a job of SQL tells of itself on standard error: progress, and figures at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from operators.job import ProgressCallback
from operators.report import JobProgress, JobResult

__all__ = ["figures", "progress_shown"]

_LINE_EVERY_S = 5.0


@contextmanager
def progress_shown(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[ProgressCallback]:
    """Show what the callback is told inside the block: a bar on a terminal, else a line now and then."""
    if not console.is_terminal:
        yield _lines(console, clock)
        return
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Rows that are printed meanwhile appear above the bar, if they go to a terminal; into a pipe they go as they are.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=None)

        def show(found: JobProgress) -> None:
            progress.update(task, total=found.rows_total, completed=found.rows_read, description=_progress(found))

        yield show


def figures(result: JobResult) -> str:
    """A finished or stopped job in one line."""
    rate = f", {result.rows_read / result.seconds:,.0f} rows/s" if result.seconds > 0 else ""
    begun = "" if result.restored_from is None else f", restored from checkpoint {result.restored_from}"
    late = f"; {result.late_rows:,} late rows" if result.late_rows else ""
    return f"{result.rows_read:,} rows read in {result.seconds:.1f} s{rate}{begun}{late}"


def _progress(found: JobProgress) -> str:
    of = "" if found.rows_total is None else f" of {found.rows_total:,}"
    return f"{found.rows_read:,}{of} rows, {len(found.checkpoints):,} checkpoints"


def _lines(console: Console, clock: Callable[[], float]) -> ProgressCallback:
    due = clock() + _LINE_EVERY_S

    def show(found: JobProgress) -> None:
        nonlocal due
        if clock() >= due:
            due = clock() + _LINE_EVERY_S
            console.print(_progress(found), soft_wrap=True)

    return show
