"""Runs scripts of SQL as jobs, and shows what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.console import Console

from operators.console.output import RowFormat, Rows
from operators.console.screen import figures, progress_shown
from operators.context import StreamContext
from operators.errors import JobMismatchError
from operators.exit_codes import ExitCode, exit_code_of_result
from operators.plan_diff import Upgrade
from operators.report import JobOutcome
from operators.sql.script import Answer

__all__ = ["SqlSettings", "run_answers", "run_sql"]

_JOB = "sql"
"""The name of every job: a script that is moved finds its state again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlSettings:
    """What the user may choose; see the help of the command.

    ``state``: None to keep it in memory. ``rows``: to show of each batch in a table. ``upgrade``,
    ``stop_with_savepoint``: of jobs that keep their state.
    """

    state: str | None = None
    storage_options: Mapping[str, Any] | None = None
    checkpoint_interval_s: float = 1.0
    rows: int = 20
    format: RowFormat = RowFormat.TABLE
    upgrade: Upgrade | None = None
    stop_with_savepoint: str | None = None

    def context(self, state: str | None) -> StreamContext:
        """A job to be built, with its state here."""
        return StreamContext(
            _JOB,
            state=state,
            checkpoint_interval=self.checkpoint_interval_s,
            storage_options=self.storage_options,
            upgrade=None if state is None else self.upgrade,
            stop_with_savepoint=None if state is None else self.stop_with_savepoint,
        )


def run_sql(script: str, settings: SqlSettings) -> ExitCode:
    """Run a script as one job, to the end of its inputs or until it is interrupted."""
    context = settings.context(settings.state)
    try:
        return run_answers(context, context.execute(script), settings)
    except JobMismatchError as error:
        error.add_note("of a script that is --upgrade WHAT=ID for each: --upgrade add=ID --upgrade drop=ID")
        raise


def run_answers(context: StreamContext, answers: Sequence[Answer], settings: SqlSettings) -> ExitCode:
    """Show the answers that are there, and run the job that gives the others, if there is one."""
    output, console = Rows(settings.format, settings.rows), Console(stderr=True, highlight=False)
    if settings.state is None and context.graph.sinks:
        console.print("the state is in memory, and lost with this process; --state URL keeps it", soft_wrap=True)
    streams = 0  # numbered by themselves, so that an EXPLAIN before a SELECT does not give it another name
    for number, answer in enumerate(answers, 1):
        if isinstance(answer, str):
            output.text(answer)
        elif isinstance(answer, pa.Table):
            output.table(f"answer {number}", answer)
        else:
            streams += 1
            answer.sink(output.sink(), name=f"rows-{streams}")
    if not context.graph.sinks:
        return ExitCode.DONE
    with progress_shown(console) as on_progress:
        result = context.run(on_progress)
    console.print(figures(result), soft_wrap=True)
    if result.savepoint is not None:
        console.print(f"stopped; its state is kept as the savepoint {result.savepoint!r}", soft_wrap=True)
    elif result.outcome is JobOutcome.STOPPED:
        kept = "" if settings.state is None else "; the same command goes on from there"
        console.print(f"stopped{kept}", soft_wrap=True)
    return exit_code_of_result(result)
