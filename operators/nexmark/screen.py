"""Progress on standard error: a bar of events, or into a pipe a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["progress_bar"]

_LINE_EVERY_S = 5.0


@contextmanager
def progress_bar(
    console: Console, title: str, events: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Show progress inside the block; call what it yields with the events so far. ``clock``: seconds."""
    if not console.is_terminal:
        yield _lines(console, title, events, clock)
        return
    columns = (
        TextColumn("[bold]{task.description}[/]"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("event {task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task(title, total=events)
        yield lambda done: progress.update(task, completed=done)


def _lines(console: Console, title: str, events: int, clock: Callable[[], float]) -> Callable[[int], None]:
    due = clock() + _LINE_EVERY_S

    def show(done: int) -> None:
        nonlocal due
        if clock() >= due:
            due = clock() + _LINE_EVERY_S
            console.print(f"{title}: event {done:,} of {events:,}", soft_wrap=True)

    return show
