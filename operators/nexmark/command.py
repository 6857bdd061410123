"""``python -m operators nexmark``: the command line."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from operators.exit_codes import ExitCode
from operators.nexmark.dataset import DatasetSettings, write_dataset
from operators.nexmark.model import NexmarkConfig
from operators.nexmark.screen import progress_bar

__all__ = ["add_nexmark"]


def add_nexmark(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and those below it; each sets ``run``, a function of the arguments to an `ExitCode`."""
    nexmark = commands.add_parser(
        "nexmark",
        help="the Nexmark benchmark: generate its stream of auctions",
        description="The Nexmark benchmark: a stream of persons, auctions and bids.",
    )
    below = nexmark.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_generate(below)


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
        "--disorder-events",
        type=positive,
        default=1,
        metavar="N",
        help="each N consecutive events change places; ten events come in a millisecond (default 1: in order)",
    )
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> ExitCode:
    config = NexmarkConfig(seed=args.seed, disorder_events=args.disorder_events)
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
