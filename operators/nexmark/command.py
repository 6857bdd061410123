"""``python -m operators nexmark``: the command line."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from operators.exit_codes import ExitCode, exit_code_of_result
from operators.nexmark.dataset import DatasetSettings, write_dataset
from operators.nexmark.model import NexmarkConfig
from operators.nexmark.queries import QUERIES
from operators.nexmark.run import QueryRun, RunSettings
from operators.nexmark.screen import progress_bar
from operators.nexmark.scripts import script
from operators.report import JobOutcome

__all__ = ["add_nexmark"]


def add_nexmark(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and those below it; each sets ``run``, a function of the arguments to an `ExitCode`."""
    nexmark = commands.add_parser(
        "nexmark",
        help="the Nexmark benchmark: generate its stream of auctions, run its queries",
        description="The Nexmark benchmark: a stream of persons, auctions and bids.",
    )
    below = nexmark.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_generate(below)
    _add_run(below)
    listing = below.add_parser("list", help="the queries", description="The queries, one a line.")
    listing.set_defaults(run=_list)
    sql = below.add_parser(
        "sql",
        help="print one query as a script of SQL",
        description="Print one query as a script for python -m operators sql. It reads events/ and writes out/QUERY, "
        "both below the working directory.",
        epilog="python -m operators nexmark generate --events 1000000 --output events; "
        "python -m operators nexmark sql q5 | python -m operators sql --state state/q5",
    )
    sql.add_argument("query", choices=list(QUERIES), metavar="QUERY", help="see: nexmark list")
    sql.add_argument("--output", type=Path, metavar="FILE", help="write it there (default: standard output)")
    sql.set_defaults(run=_sql)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="write the events as Parquet",
        description="Write person/, auction/ and bid/ below DIR, Parquet files in event order. Of each 50 events one "
        "is a person, 3 are auctions and 46 bids; event n is a function of the seed and n alone.",
    )
    generate.add_argument("--events", type=positive, required=True, metavar="N", help="events of all three kinds")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    generate.add_argument("--output", type=Path, required=True, metavar="DIR", help="made if it does not exist")
    generate.add_argument(
        "--events-per-second",
        type=positive,
        default=NexmarkConfig().events_per_second,
        metavar="N",
        help="of event time (default 10000)",
    )
    generate.add_argument(
        "--disorder-events",
        type=positive,
        default=1,
        metavar="N",
        help="each N consecutive events change places, so that times go back (default 1: they do not)",
    )
    generate.set_defaults(run=_generate)


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="run one query",
        description="Run one query over person/, auction/ and bid/ below DIR, Parquet files whose rows are in the "
        "order of seq, whoever wrote them. If the state holds a checkpoint, the run goes on from there. The result is "
        "written as Parquet, exactly once: files below the output with no path component that starts with _ or a dot. "
        "The last line on standard output is a JSON object with the figures of the run.",
        epilog="Events are counted by seq, all three kinds together, whatever the query reads, and through restarts.",
    )
    run.add_argument("query", choices=list(QUERIES), metavar="QUERY", help="see: nexmark list")
    run.add_argument("--input", required=True, metavar="DIR", help="with person/, auction/ and bid/; a path or URL")
    run.add_argument("--state", required=True, metavar="URL", help="where the state lives: a directory or fsspec URL")
    run.add_argument("--output", required=True, metavar="DIR", help="for the result; a path or URL")
    run.add_argument(
        "--checkpoint-interval", type=seconds, default=1.0, metavar="S", help="seconds between checkpoints (default 1)"
    )
    run.add_argument(
        "--checkpoint-events", type=positive, metavar="N", help="take a checkpoint every N events besides the interval"
    )
    run.add_argument(
        "--watermark-delay",
        type=not_negative,
        default=4000,
        metavar="MS",
        help="how far an event may lag behind the latest one by its time, and still count (default 4000)",
    )
    run.add_argument(
        "--batch-rows", type=positive, default=65_536, metavar="N", help="rows of a batch, at most (default 65536)"
    )
    run.add_argument(
        "--parallelism", type=positive, metavar="N", help="threads that work beside the one that reads (default: cores)"
    )
    run.add_argument(
        "--kill-after-events",
        type=positive,
        metavar="N",
        help="send SIGKILL to this process when N events have passed (a run that is restored beyond them goes on)",
    )
    run.add_argument(
        "--stop-with-savepoint",
        metavar="NAME",
        help="when a signal (TERM, or Ctrl-C) stops the run, keep its last checkpoint under this name, and exit with 0",
    )
    run.add_argument(
        "--events-per-second",
        type=positive,
        metavar="N",
        help="read no more than so many events of all kinds a second (default: as fast as it goes)",
    )
    run.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> ExitCode:
    run = QueryRun(
        QUERIES[args.query],
        RunSettings(
            input=args.input,
            state=args.state,
            output=args.output,
            checkpoint_interval_s=args.checkpoint_interval,
            checkpoint_events=args.checkpoint_events,
            watermark_delay_ms=args.watermark_delay,
            batch_rows=args.batch_rows,
            parallelism=args.parallelism,
            kill_after_events=args.kill_after_events,
            stop_with_savepoint=args.stop_with_savepoint,
            events_per_second=args.events_per_second,
        ),
    )
    console = Console(stderr=True, highlight=False)
    with progress_bar(console, args.query, run.counter.total) as advance:
        result, report = run.run(advance)
    begun = "" if report.restored_from is None else f", restored from checkpoint {report.restored_from}"
    figures = f"event {report.events:,} after {report.seconds:.1f} s, {report.events_per_second:,.0f} events/s{begun}"
    console.print(f"{args.query}: {figures}; {report.rows_out:,} rows published", soft_wrap=True)
    if result.outcome is JobOutcome.STOPPED:
        kept = "" if args.stop_with_savepoint is None else f" its state is the savepoint {args.stop_with_savepoint!r};"
        console.print(f"stopped;{kept} the same command goes on from there", soft_wrap=True)
    sys.stdout.write(report.line() + "\n")
    sys.stdout.flush()
    return exit_code_of_result(result)


def _list(_: argparse.Namespace) -> ExitCode:
    width = max(len(name) for name in QUERIES)
    for query in QUERIES.values():
        sys.stdout.write(f"{query.name:{width}}  {query.title} ({', '.join(query.inputs)})\n")
    return ExitCode.DONE


def _sql(args: argparse.Namespace) -> ExitCode:
    if args.output is None:
        sys.stdout.write(script(args.query))
    else:
        args.output.write_text(script(args.query), encoding="utf-8")
    return ExitCode.DONE


def _generate(args: argparse.Namespace) -> ExitCode:
    config = NexmarkConfig(
        seed=args.seed, events_per_second=args.events_per_second, disorder_events=args.disorder_events
    )
    console = Console(stderr=True, highlight=False)
    begin = time.perf_counter()
    with progress_bar(console, "generate", args.events) as advance:
        write_dataset(args.output, config, DatasetSettings(events=args.events), advance)
    seconds = time.perf_counter() - begin
    console.print(f"{args.events:,} events in {seconds:.1f} s to {args.output}", soft_wrap=True)
    return ExitCode.DONE


def positive(text: str) -> int:
    """An argument type: a positive integer; underscores may group its digits."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def not_negative(text: str) -> int:
    """An argument type: an integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, as {text} is")
    return number


def seconds(text: str) -> float:
    """An argument type: a positive number of seconds."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return number
