"""``python -m statebackend compact URL``: the command, its signals, its progress."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from statebackend.cli_options import options_of_others, positive, storage_options, store_parser
from statebackend.compaction import CompactionPlan
from statebackend.compaction_tool import CompactionSummary, compact
from statebackend.compactor import SUPERSEDED_EXIT_CODE
from statebackend.quantities import byte_size, counted
from statebackend.settings import StoreSettings

__all__ = ["add_compact"]

_INTERRUPTED = 130


def add_compact(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    command = commands.add_parser(
        "compact",
        parents=[store_parser(others=True)],
        help="merge flushed files into sorted runs, beside a running job",
        description="Merge flushed files into sorted runs. A running job goes on, and leaves the merging to this "
        "process until it ends. Exit codes: 0 done, or stopped by Ctrl-C or SIGTERM while following; 3 another "
        "compactor took over; 130 interrupted before everything was merged.",
    )
    command.add_argument("--follow", action="store_true", help="go on until stopped by Ctrl-C or SIGTERM")
    command.add_argument("--all", action="store_true", help="merge every table into one run, due or not")
    command.add_argument("--threads", type=positive, metavar="N", help="threads that merge (default 2)")
    # For the store that starts this process: settings and storage options come as one line of JSON on stdin, so that
    # no secret is on the command line; the process ends when stdin does, or its parent.
    command.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    command.set_defaults(run=_compact)


def _compact(args: argparse.Namespace) -> int:
    given: dict[str, Any] = {"storage_options": storage_options(args), "root_options": options_of_others(args)}
    until: Callable[[], object] | None = None
    if args.supervised:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which decides
        given, until = json.loads(sys.stdin.readline()), _parent_is_gone
    settings = given.get("settings", {}) | ({} if args.threads is None else {"cpu_threads": args.threads})
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _Bars() as bars:
            summary = compact(
                args.url,
                follow=args.follow,
                everything=args.all,
                settings=StoreSettings(**settings),
                storage_options=given.get("storage_options"),
                root_options=given.get("root_options"),
                on_rows=bars.advance if bars.shown else None,
                until=until,
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    print(_told(summary), flush=True)
    if summary.superseded:
        return SUPERSEDED_EXIT_CODE
    return _INTERRUPTED if summary.stopped and not args.follow else 0


def _told(summary: CompactionSummary) -> str:
    if not summary.claimed:
        return "nothing is due"
    stats = summary.stats
    text = (
        f"{counted(stats.runs, 'merge')} in {stats.seconds:.1f} s: {byte_size(stats.bytes_in)} into "
        f"{byte_size(stats.bytes_out)}, {stats.rows_dropped:,} of {stats.rows_in:,} rows dropped"
    )
    if stats.abandoned:
        text += f", {counted(stats.abandoned, 'merge')} abandoned"
    if summary.superseded:
        text += "; another compactor took over"
    return text + ("; stopped, the claim is released" if summary.stopped else "")


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def _parent_is_gone() -> None:
    """Return when stdin ends, or when the parent did while somebody else holds its end of the pipe."""
    parent, stdin = os.getppid(), sys.stdin.fileno()
    while os.getppid() == parent:
        ready, _, _ = select.select([stdin], [], [], 1.0)
        if ready and not os.read(stdin, 4096):
            return


class _Bars:
    """A bar per merge on stderr, when that is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.shown = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"),
            TimeRemainingColumn(), console=console, disable=not self.shown,
        )  # fmt: skip
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, plan: CompactionPlan, rows: int) -> None:
        """So many more rows of this merge are done."""
        if id(plan) not in self._tasks:
            total = sum(f.rows for f in plan.inputs)
            self._tasks[id(plan)] = self._progress.add_task(f"merging {plan.table}", total=total)
        self._progress.advance(self._tasks[id(plan)], rows)
