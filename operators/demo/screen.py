"""What the demo shows: a line for each kill and recovery above a progress bar, and a table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from operators.demo.compare import RANK, RULES, Comparison
from operators.demo.supervisor import Run
from operators.demo.worker import Report

__all__ = ["Screen"]

_PIPE_COLUMNS = 110


class Screen:
    """Writes to standard output; into a pipe, plain lines without a bar."""

    def __init__(self, *, rows: int, kills: int) -> None:
        self._rows = rows
        self._kills = kills
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console = Console(highlight=False, width=_PIPE_COLUMNS)
        self._progress: Progress | None = None
        self._killed_at = 0

    def line(self, mark: str, text: str, style: str = "bold") -> None:
        """One line of the story: a word in the margin, and what happened."""
        self._console.print(Text.assemble((f"{mark:>9}  ", style), text), soft_wrap=True)

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Show how far the stream is."""
        columns = (
            TextColumn("[bold]{task.description:>9}[/] "),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("row {task.completed:,.0f}  {task.fields[note]}"),
            TimeElapsedColumn(),
        )
        terminal = self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not terminal, expand=True) as progress:
            self._progress = progress
            self._task = progress.add_task("running", total=self._rows, note="")
            try:
                yield
            finally:
                self._progress = None

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show that something takes its time."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"  {text}"):
            yield

    # -- what the supervisor tells

    def progress(self, report: Report) -> None:
        """Move the bar; back, after a kill."""
        if self._progress is not None:
            note = "" if report.checkpoint is None else f"checkpoint {report.checkpoint}"
            self._progress.update(self._task, completed=report.rows, note=note)

    def killed(self, number: int, report: Report) -> None:
        """A kill."""
        self._killed_at = report.rows
        text = f"kill -9, {number} of {self._kills}, at row {report.rows:,} ({report.rows / self._rows:.0%})"
        self.line("killed", f"{text}, after checkpoint {report.checkpoint}", "bold red")

    def recovered(self, report: Report, first_output_s: float | None) -> None:
        """A recovery."""
        replayed = f" (replays {self._killed_at - report.start_rows:,})" if self._killed_at else ""
        text = f"from checkpoint {report.restored_from} at row {report.start_rows:,}{replayed}"
        first = "no output left" if first_output_s is None else f"first output after {first_output_s:.1f} s"
        self.line("recovered", f"{text}, {first}", "bold green")

    # -- the end

    def finished(self, run: Run) -> None:
        """The job has come to its end."""
        text = f"{self._rows:,} rows in {run.seconds:.1f} s, {run.checkpoints} checkpoints, {run.kills} kills"
        self.line("finished", text, "bold green")
        if run.kills < self._kills:
            self.line(
                "note", f"only {run.kills} of {self._kills} kills: the job was done before the next", "bold yellow"
            )

    def comparison(self, results: Sequence[tuple[str, Mapping[str, Comparison]]]) -> None:
        """For each kind of window, how its columns compare with each reference."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for header in ("windows", "columns", "compared"):
            table.add_column(header)
        for name in results[0][1]:
            table.add_column(name)
        for kind, by_reference in results:
            comparisons = list(by_reference.values())
            table.add_row(kind, "all rows", "as multisets", *(_rows(c) for c in comparisons))
            for rule in dict.fromkeys(RULES.values()):
                names = [name for name, r in RULES.items() if r == rule]
                table.add_row("", ", ".join(names), rule, *(_columns(c, names) for c in comparisons))
            table.add_section()
        self._console.print(table)
        if any(c.by_rank for _, by_reference in results for c in by_reference.values()):
            self.line("rank", "what an approximate percentile leaves below it is right to 1 % or one row")
        for kind, by_reference in results:
            for name, comparison in by_reference.items():
                for text in comparison.differences:
                    self.line("differs", f"{kind}, with {name}: {text}", "bold red")

    def verdict(self, *, equal: bool) -> None:
        """The last line."""
        if equal:
            self.line("equal", "the killed job, the one never killed and the SQL query agree", "bold green")
        else:
            self.line("DIFFERENT", "the outputs do not agree", "bold red")


def _rows(comparison: Comparison) -> Text:
    if comparison.same_rows:
        return Text(f"{comparison.rows_found:,} equal", style="green")
    return Text(f"differ: {comparison.rows_found:,}, not {comparison.rows_expected:,}", style="bold red")


def _columns(comparison: Comparison, names: Sequence[str]) -> Text:
    if not comparison.same_rows:
        return Text("not compared", style="red")
    results = [comparison.columns[name] for name in names]
    if differing := sum(r.differing for r in results):
        return Text(f"{differing:,} values differ", style="bold red")
    if RULES[names[0]] == RANK and comparison.by_rank:
        return Text(f"equal, {comparison.by_rank:,} by rank", style="green")
    return Text("equal", style="green")
