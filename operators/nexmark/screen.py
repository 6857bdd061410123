"""Progress on standard error: a bar of events; nothing into a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(console: Console, title: str, events: int) -> Iterator[Callable[[int], None]]:
    """A bar inside the block; call what it yields with the events so far."""
    columns = (
        TextColumn("[bold]{task.description}[/]"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("event {task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, expand=True) as progress:
        task = progress.add_task(title, total=events)
        yield lambda done: progress.update(task, completed=done)
