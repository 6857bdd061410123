"""``python -m operators sql``: the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from operators.console.output import RowFormat
from operators.console.running import SqlSettings, run_sql
from operators.errors import BadInputError
from operators.exit_codes import ExitCode
from operators.plan_diff import Upgrade
from statebackend import add_storage_option, storage_options

__all__ = ["add_sql"]

_CHANGES = ("add", "drop", "change", "reset", "rename")

_EPILOG = """\
example:
  CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
  CREATE EXTERNAL TABLE busy (w TIMESTAMP(3), bidder BIGINT, bids BIGINT) STORED AS PARQUET LOCATION 'out/busy'
    OPTIONS ('mode' 'sink');
  INSERT INTO busy SELECT tumble("dateTime", INTERVAL '10 seconds'), bidder, count(*) FROM bid GROUP BY 1, 2;

  $ python -m operators nexmark generate --events 1000000 --output events
  $ python -m operators sql busy.sql --state state/busy     # kill it and run it again: it goes on

statements:
  CREATE EXTERNAL TABLE [(columns)] STORED AS … LOCATION '…' OPTIONS ('mode' '…', …), CREATE VIEW, DROP,
  INSERT INTO, COPY (SELECT …) TO '…' STORED AS PARQUET, SELECT, EXPLAIN, SHOW TABLES, DESCRIBE.
  Mode bounded (the default) is a stream of what is there, follow also of what comes later (PARQUET, CSV, JSON, ARROW,
  KAFKA), static a table to join streams with, sink what INSERT INTO writes to. The rows of a SELECT are printed. All
  INSERTs and SELECTs of a script are one job.

exit codes: 0 done, 1 failed, 2 wrong usage, 3 fenced by another process, 130 interrupted by Ctrl-C (the
  state is kept; after SIGTERM 0)
"""


def add_sql(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; it sets ``run``, a function of the arguments to an `ExitCode`."""
    sql = commands.add_parser(
        "sql",
        help="run a script of streaming SQL as one job, or a shell",
        description="Run a script of streaming SQL as one job. Without FILE: a shell, in which every statement is a\n"
        "job of its own, or the script on standard input if that is no terminal. Progress goes to\nstandard error.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sql.add_argument("file", nargs="?", metavar="FILE", help="the script, UTF-8; - is standard input")
    sql.add_argument(
        "--state",
        metavar="URL",
        help="where the state lives: a directory or fsspec URL (default: in memory); in the shell each sink has its "
        "own below it",
    )
    add_storage_option(sql)
    sql.add_argument(
        "--checkpoint-interval", type=_seconds, default=1.0, metavar="S", help="seconds between checkpoints (default 1)"
    )
    sql.add_argument(
        "--rows", type=_positive, default=20, metavar="N", help="rows of each batch to show in a table (default 20)"
    )
    sql.add_argument(
        "--stop-with-savepoint",
        metavar="NAME",
        help="when a signal (TERM, or Ctrl-C) stops the job, keep its last checkpoint under this name, and exit with 0",
    )
    sql.add_argument(
        "--format",
        choices=list(RowFormat),
        default=RowFormat.TABLE,
        help="of the rows of a SELECT: table (the default), or for programs json or csv, a line for each row",
    )
    sql.add_argument(
        "--upgrade",
        type=_change,
        action="append",
        default=[],
        metavar="WHAT=ID",
        help="what became of an operator of the state, after the script was changed: add=ID, drop=ID, change=ID, "
        "reset=ID, rename=OLD:NEW, any number of times; the error of a script that does not fit its state says which",
    )
    sql.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> ExitCode:
    try:
        options = storage_options(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return ExitCode.USAGE
    settings = SqlSettings(
        state=args.state,
        storage_options=options,
        checkpoint_interval_s=args.checkpoint_interval,
        rows=args.rows,
        stop_with_savepoint=args.stop_with_savepoint,
        format=RowFormat(args.format),
        upgrade=_upgrade(args.upgrade),
    )
    if settings.stop_with_savepoint is not None and settings.state is None:
        sys.stderr.write("error: --stop-with-savepoint needs --state URL\n")
        return ExitCode.USAGE
    if args.file is None and sys.stdin.isatty():
        return _shell(settings)
    return run_sql(_script(args.file), settings)


def _shell(settings: SqlSettings) -> ExitCode:
    try:
        from operators.console.shell import run_shell  # its library is an extra
    except ModuleNotFoundError as error:
        needed = f"the shell needs {error.name}: pip install 'datafusion-statebackend[sql]'"
        sys.stderr.write(f"error: {needed}; a script does without: give its FILE\n")
        return ExitCode.USAGE
    return run_shell(settings)


def _script(file: str | None) -> str:
    try:
        return sys.stdin.read() if file in (None, "-") else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{file or 'standard input'}: not UTF-8: {error}") from error


def _change(text: str) -> tuple[str, str]:
    what, _, name = text.partition("=")
    if what not in _CHANGES or not name or (what == "rename") != (":" in name):
        raise argparse.ArgumentTypeError(f"must be add=ID, drop=ID, change=ID, reset=ID or rename=OLD:NEW, not {text}")
    return what, name


def _upgrade(changes: list[tuple[str, str]]) -> Upgrade | None:
    found = {what: [name for word, name in changes if word == what] for what in _CHANGES}
    renamed = dict(name.split(":", 1) for name in found.pop("rename"))
    return Upgrade(rename=renamed, **found) if changes else None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, not {text}")
    return int(text)


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return number
