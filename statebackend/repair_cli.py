"""``export``, ``import`` and ``repair`` of ``python -m statebackend``."""

from __future__ import annotations

import argparse
from typing import Any

from statebackend.cli_options import options_of_others, storage_options, store_parser
from statebackend.export import EXPORT_FORMATS, export_state
from statebackend.import_rows import NewTable, Rows, import_table, rows_of_file, rows_of_query
from statebackend.quantities import counted
from statebackend.repair import RepairReport, repair
from statebackend.tables import TableKind, TableOrder

__all__ = ["add_repair"]

_KINDS = [kind.value for kind in TableKind if kind is not TableKind.AGGREGATE]


def add_repair(commands: Any) -> None:
    """Add the commands to a parser's."""
    with_others = [store_parser(others=True)]
    export = commands.add_parser(
        "export",
        parents=with_others,
        help="write a checkpoint as Parquet or Arrow files that anything opens, with a manifest.json",
        description="Writes DIRECTORY/tables/NAME.parquet with the finalised rows of every table, and "
        "DIRECTORY/manifest.json. The store is only read, beside a running job.",
    )
    export.add_argument("directory", metavar="DIRECTORY", help="a local directory, which must not exist yet")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint (default: the newest)")
    which.add_argument("--savepoint", metavar="NAME")
    export.add_argument("--table", action="append", metavar="NAME", help="only this table; any number of times")
    export.add_argument("--raw", action="store_true", help="partial states as stored, which import takes back")
    export.add_argument("--format", choices=EXPORT_FORMATS, default="parquet")
    export.set_defaults(run=_export)
    _add_import(commands)
    mend = commands.add_parser(
        "repair",
        parents=with_others,
        help="a damaged newest manifest or file: go back to the newest state that is whole; by default only look",
        description="Says what is damaged and what is whole. With --commit the newest whole state becomes a new "
        "checkpoint; whoever owned the store is fenced. Rows since then come again from the sources; what sinks have "
        "published since then they publish again.",
    )
    mend.add_argument("--commit", action="store_true", help="go back to it")
    mend.add_argument("--deep", action="store_true", help="read every block, not only the index of every file")
    mend.set_defaults(run=_repair)


def _add_import(commands: Any) -> None:
    take = commands.add_parser(
        "import",
        parents=[store_parser(others=True)],
        help="new state from a file or a query, as a checkpoint; fences a running job",
        description="Writes rows into TABLE as one checkpoint; positions stay, whoever owned the store is fenced. "
        "Columns are found by name. An aggregate table takes partial states, as export --raw writes them.",
    )
    take.add_argument("table", metavar="TABLE")
    take.add_argument(
        "source", metavar="FILE|SQL",
        help="a .parquet, .csv, .json or .arrow file, a directory of Parquet files, or a query (SELECT …, WITH …) "
        'over the state itself (state."TABLE") and the files of --with',
    )  # fmt: skip
    take.add_argument(
        "--with", action="append", default=[], metavar="NAME=FILE", dest="files", help="a file by name, for the query"
    )
    take.add_argument("--replace", action="store_true", help="what the table held goes")
    take.add_argument("--at-checkpoint", type=int, metavar="ID", help="refuse unless this is the newest checkpoint")
    new = take.add_argument_group("a table that is not there yet")
    new.add_argument("--key", metavar="COLUMN[,COLUMN…]")
    new.add_argument("--kind", choices=_KINDS, default=TableKind.UPSERT.value)
    new.add_argument("--order", choices=[order.value for order in TableOrder], default=TableOrder.HASH.value)
    new.add_argument("--time-field", metavar="COLUMN", help="the key column by which rows expire")
    new.add_argument("--ttl-field", metavar="COLUMN", help="another column by which they do")
    take.set_defaults(run=_import)


def _export(args: argparse.Namespace) -> None:
    try:
        done = export_state(
            args.url, args.directory, args.checkpoint, savepoint=args.savepoint, tables=args.table, raw=args.raw,
            file_format=args.format, storage_options=storage_options(args), root_options=options_of_others(args),
        )  # fmt: skip
    except (FileExistsError, KeyError) as error:
        raise ValueError(str(error.args[0])) from error
    for table in done:
        print(f"{args.directory}/{table.file}: {counted(table.rows, 'row')}, {table.bytes:,} bytes")
    print(f"{args.directory}/manifest.json tells what they are")


def _import(args: argparse.Namespace) -> None:
    new = None
    if args.key is not None:
        new = NewTable(
            key=args.key.split(","), kind=TableKind(args.kind), order=TableOrder(args.order),
            time_field=args.time_field, ttl_field=args.ttl_field,
        )  # fmt: skip
    elif args.time_field is not None or args.ttl_field is not None:
        raise ValueError("--time-field and --ttl-field declare a new table, which needs --key")
    try:
        done = import_table(
            args.url, args.table, _rows(args), new=new, replace=args.replace, at_checkpoint=args.at_checkpoint,
            storage_options=storage_options(args), root_options=options_of_others(args),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    print(
        f"{counted(done.rows, 'row')} into {done.table!r}: checkpoint {done.checkpoint_id} on timeline "
        f"{done.timeline}; a job that was running is fenced, start it again"
    )


def _rows(args: argparse.Namespace) -> Rows:
    if args.source.lstrip()[:6].upper() == "SELECT" or args.source.lstrip()[:5].upper() == "WITH ":
        return rows_of_query(
            args.source, args.url, dict(_named_file(one) for one in args.files),
            storage_options=storage_options(args), root_options=options_of_others(args),
        )  # fmt: skip
    if args.files:
        raise ValueError("--with names files for a query, and there is none")
    return rows_of_file(args.source)


def _named_file(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--with {text!r}: expected NAME=FILE")
    return name, path


def _repair(args: argparse.Namespace) -> int:
    report = repair(
        args.url, commit=args.commit, deep=args.deep,
        storage_options=storage_options(args), root_options=options_of_others(args),
    )  # fmt: skip
    for name, problem in report.damaged.items():
        print(f"damaged: {problem}" if name in problem else f"damaged: {name}: {problem}")
    if report.sound:
        print(f"manifest {report.newest}, the newest, is whole: nothing to repair")
        return 0
    if report.manifest is None:
        print("nothing is whole, neither a manifest nor a copy of one")
        return 1
    print(f"whole: {report.found}, the state of checkpoint {report.manifest.checkpoint_id}")
    return _tell(args.url, report)


def _tell(url: str, report: RepairReport) -> int:
    if report.committed is None:
        for name in report.recovered:
            print(f"to be kept as a savepoint: {name}, of which only what is damaged can tell")
        print(
            f"python -m statebackend repair {url} --commit goes back to it: rows since then come again from the "
            "sources, and what sinks have published since then is published again"
        )
        return 1
    for name in report.recovered:
        print(f"kept as the savepoint {name}: drop it when nobody needs it")
    print(f"checkpoint {report.committed} is the state of the next run; a job that was running is fenced")
    return 0
