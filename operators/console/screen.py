"""What a job of SQL shows: progress and figures on standard error, rows on standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from operators.job import ProgressCallback
from operators.report import JobProgress, JobResult
from operators.sinks.console import rows_shown

__all__ = ["figures", "output_console", "progress_shown", "show_table"]

_LINE_EVERY_S = 5.0
_WIDTH = 200
"""Of tables that go into a file or a pipe, in characters."""


def output_console() -> Console:
    """Where rows go."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


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


def show_table(console: Console, title: str, rows: pa.Table, rows_max: int) -> None:
    """Print rows that are there."""
    if not rows.num_rows:
        console.print(f"{title}: no rows of {', '.join(rows.column_names)}", markup=False)
        return
    for batch in rows.combine_chunks().to_batches():
        console.print(rows_shown(title, batch, rows_max))


def _progress(found: JobProgress) -> str:
    of = "" if found.rows_total is None else f" of {found.rows_total:,}"
    return f"{found.rows_read:,}{of} rows, {len(found.checkpoints)} checkpoints"


def _lines(console: Console, clock: Callable[[], float]) -> ProgressCallback:
    due = clock() + _LINE_EVERY_S

    def show(found: JobProgress) -> None:
        nonlocal due
        if clock() >= due:
            due = clock() + _LINE_EVERY_S
            console.print(_progress(found), soft_wrap=True)

    return show
