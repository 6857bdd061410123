"""``python -m operators``: streaming SQL, a job that survives kill -9 before your eyes, and the Nexmark benchmark."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from operators.console.command import add_sql
from operators.demo.command import DemoSettings, run_demo
from operators.demo.supervisor import WorkerFailedError
from operators.demo.worker import WorkerSettings, run_worker
from operators.errors import OperatorError
from operators.exit_codes import ExitCode, exit_code_of
from operators.flights import FLIGHTS_ROWS
from operators.nexmark.command import add_nexmark
from statebackend import Redacted, StateStoreError

__all__ = ["main"]

_EXIT_CODES = """\
exit codes:
  0    done; demo: and all outputs agree
  1    failed, or the outputs differ
  2    wrong usage
  3    fenced: another process has taken over the state; do not restart this one
  130  interrupted by Ctrl-C (SIGTERM: 0, after a last checkpoint)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its `ExitCode`."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except WorkerFailedError as error:
        print(f"error: the job failed: {error}", file=sys.stderr)
        return error.exit_code if error.exit_code in list(ExitCode) else ExitCode.FAILED
    except (OperatorError, StateStoreError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away: head, less
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            print(f"error: {type(error).__name__}: {Redacted(args)(error)}{notes}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m operators",
        description="Streaming operators whose state survives a crash.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    demo = commands.add_parser(
        "demo",
        help="flights through a windowed job that is killed; compares its output with two references",
        description="Stream 336,776 real flights through windowed aggregations in a process that is killed with "
        "SIGKILL at random moments and restarted; then compare the output with that of a run that was never killed "
        "and with one SQL query.",
    )
    demo.add_argument("--kills", type=_count(0), default=3, metavar="N", help="how often to kill the job (default 3)")
    demo.add_argument(
        "--rows", type=_count(1, FLIGHTS_ROWS), metavar="N", help="only the first N flights (default: all)"
    )
    demo.add_argument(
        "--checkpoint-interval",
        type=_seconds,
        default=0.5,
        metavar="S",
        help="seconds between checkpoints (default 0.5)",
    )
    demo.add_argument(
        "--state", metavar="URL", help="keep the state here: a directory or fsspec URL (default: temporary)"
    )
    demo.add_argument("--output", metavar="DIR", help="keep the Parquet output here (default: temporary)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the disorder and of the kills (default 0)")
    demo.set_defaults(run=_demo)
    _add_worker(commands)
    add_nexmark(commands)
    add_sql(commands)
    return parser


def _add_worker(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The process that the demo starts and kills; not for people, so without help."""
    worker = commands.add_parser("demo-worker")
    worker.add_argument("--source", type=Path, required=True)
    worker.add_argument("--state", required=True)
    worker.add_argument("--output", required=True)
    worker.add_argument("--seed", type=int, required=True)
    worker.add_argument("--batch-rows", type=int, required=True)
    worker.add_argument("--checkpoint-interval", type=_seconds, required=True)
    worker.add_argument("--rows-per-second", type=float)
    worker.set_defaults(run=_demo_worker)


def _demo(args: argparse.Namespace) -> ExitCode:
    settings = DemoSettings(
        kills=args.kills,
        rows=args.rows,
        checkpoint_interval_s=args.checkpoint_interval,
        state=args.state,
        output=args.output,
        seed=args.seed,
    )
    return ExitCode.DONE if run_demo(settings) else ExitCode.FAILED


def _demo_worker(args: argparse.Namespace) -> ExitCode:
    run_worker(
        WorkerSettings(
            source=args.source,
            state=args.state,
            output=args.output,
            seed=args.seed,
            batch_rows=args.batch_rows,
            checkpoint_interval_s=args.checkpoint_interval,
            rows_per_s=args.rows_per_second,
        )
    )
    return ExitCode.DONE


def _count(least: int, most: int = 1000) -> Callable[[str], int]:
    """An argument type: an integer within these bounds."""

    def parse(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text}")
        return number

    parse.__name__ = "integer"
    return parse


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return number
