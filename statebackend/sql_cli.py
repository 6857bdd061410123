"""``python -m statebackend sql``: ask a store a question from the shell.

``csv`` and ``json`` are written batch by batch, so that an answer of any size goes through; ``table`` is for the eye
and shows the first rows only. ``json`` is one object per line.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from statebackend.catalog import ReadMetrics, StateCatalog, open_state
from statebackend.cli_options import options_of_others, positive, storage_options, store_parser
from statebackend.objectstore_roots import options_of_root
from statebackend.quantities import byte_size, counted

__all__ = ["add_sql"]

_EXAMPLE = "SELECT * FROM system.tables"


def add_sql(commands: Any) -> None:
    """Add the command to a parser's."""
    sql = commands.add_parser(
        "sql",
        parents=[store_parser(others=True)],
        help='ask a checkpoint with SQL: state."TABLE", state_at(...), state_diff(...), system.tables',
        description='Tables: state."TABLE" (finalised), raw."TABLE" (partial states), state_at(\'TABLE\', CHECKPOINT), '
        "state_diff('TABLE', CHECKPOINT, CHECKPOINT), system.checkpoints, .tables, .files, .compactions, "
        ".health, .operators, .sources",
    )
    sql.add_argument("query", metavar="QUERY", nargs="?", default=_EXAMPLE, help=f"default: {_EXAMPLE}")
    which = sql.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint (default: the newest)")
    which.add_argument("--savepoint", metavar="NAME")
    sql.add_argument(
        "--attach", action="append", default=[], metavar="NAME[@ID]=URL",
        help="another store, such as a branch of this one, as the schema NAME and as a checkpoint for state_diff "
        "(ID: a retained checkpoint of it)",
    )  # fmt: skip
    sql.add_argument("--format", choices=("table", "csv", "json"), default="table", help="json: one object per line")
    sql.add_argument("--rows", type=positive, default=100, metavar="N", help="rows of a table to show (default 100)")
    sql.add_argument("--no-pin", action="store_true", help="write nothing to the store, not even a lease")
    sql.add_argument("--stats", action="store_true", help="say on standard error how much was read of how much")
    sql.set_defaults(run=_sql)


def _sql(args: argparse.Namespace) -> None:
    with open_state(
        args.url,
        args.checkpoint,
        savepoint=args.savepoint,
        pin=not args.no_pin,
        storage_options=storage_options(args),
        root_options=options_of_others(args),
    ) as catalog:
        for text in args.attach:
            _attach(catalog, args, text)
        answer = catalog.query(args.query)
        if args.format == "table":
            _show(answer, args.rows)
        elif args.format == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(answer.schema.names)
            for row in _rows(answer):
                writer.writerow([_text(value) for value in row])
        else:
            names = answer.schema.names
            for row in _rows(answer):
                print(json.dumps(dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False))
        if args.stats:
            print(_told(catalog.reads), file=sys.stderr)


def _told(reads: ReadMetrics) -> str:
    chosen = f"{counted(reads.blocks_read, 'block')} ({byte_size(reads.read_bytes)})"
    there = f"{reads.files_read} of {counted(reads.files, 'file')} ({byte_size(reads.stored_bytes)})"
    fetched = f"{counted(reads.requests, 'request')} to the storage brought {byte_size(reads.fetched_bytes)}"
    return f"read {chosen} in {there}; {fetched}"


def _attach(catalog: StateCatalog, args: argparse.Namespace, text: str) -> None:
    which, equals, url = text.partition("=")
    name, at, checkpoint = which.partition("@")
    if not (name and equals and url) or (at and not checkpoint.isdigit()):
        raise ValueError(f"--attach {text!r}: expected NAME=URL or NAME@ID=URL")
    others = options_of_others(args)
    options = options_of_root(url, args.url, storage_options(args), others)
    catalog.attach(name, url, int(checkpoint) if at else None, storage_options=options, root_options=others)


def _show(answer: pa.RecordBatchReader, rows_max: int) -> None:
    table = Table(header_style="bold")
    for name in answer.schema.names:
        table.add_column(Text(name))  # a Text: brackets in it are no markup
    rows = _rows(answer)
    for _, row in zip(range(rows_max), rows, strict=False):
        table.add_row(*(Text(_text(value)) for value in row))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(table)
    if next(rows, None) is not None:
        console.print(f"the first {rows_max} rows; --rows N shows more, --format csv all of them")


def _rows(answer: pa.RecordBatchReader) -> Iterator[tuple[Any, ...]]:
    for batch in answer:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _text(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False) if isinstance(value, list | dict) else _plain_text(value)


def _plain_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _plain(value: Any) -> Any:
    """As a value of JSON; what it has no type for becomes text, also numbers that it does not have."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and value - value == 0:
        return value
    return _plain_text(value)
