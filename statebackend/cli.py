"""``python -m statebackend ls|show|bench``: look into a store, and measure one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from statebackend.bench import run_bench
from statebackend.errors import StateStoreError
from statebackend.inspect import StoreView, read_store
from statebackend.manifest import Manifest
from statebackend.render import (
    byte_size,
    figures_table,
    files_table,
    identity_table,
    job_table,
    manifests_table,
    schema_table,
    tables_table,
)

__all__ = ["main"]

# Into a pipe or a file, lines are as long as they need to be.
console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (1: the store said no, 2: wrong usage)."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except StateStoreError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: head, less
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m statebackend", description=__doc__.partition(":")[2].strip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", help="checkpoints, tables and files of a store, at a glance")
    ls.add_argument("url", metavar="URL", help="the store: a directory or an fsspec URL")
    ls.add_argument("--manifests", type=int, default=10, metavar="N", help="show the newest N manifests (default 10)")
    ls.set_defaults(run=_ls)
    show = commands.add_parser("show", help="one manifest in full: positions, watermarks, tables, files")
    show.add_argument("url", metavar="URL")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=int, metavar="ID", help="the manifest of this checkpoint (default: newest)")
    which.add_argument("--manifest", type=int, metavar="NUMBER", help="the manifest of this number")
    show.add_argument("--table", metavar="NAME", help="only this table")
    show.set_defaults(run=_show)
    bench = commands.add_parser("bench", help="prefill a store, flush from several threads, read back, print figures")
    bench.add_argument("url", metavar="URL")
    bench.add_argument("--prefill", type=int, default=1_000_000, metavar="N", help="rows to write (default 1000000)")
    bench.add_argument("--batch-rows", type=int, default=10_000, metavar="N", help="rows per batch (default 10000)")
    bench.add_argument("--threads", type=int, default=4, metavar="N", help="threads that flush at once (default 4)")
    bench.add_argument("--value-bytes", type=int, default=100, metavar="N", help="bytes per value (default 100)")
    bench.set_defaults(run=_bench)
    return parser


def _ls(args: argparse.Namespace) -> None:
    view = read_store(args.url, manifests_max=max(1, args.manifests))
    latest = view.latest
    console.print(
        f"[bold]{view.url}[/]  store {latest.store_id}  timeline {latest.timeline}  "
        f"writer epoch {latest.writer_epoch}  checkpoint {latest.checkpoint_id or 'none yet'}"
    )
    console.print(manifests_table(view))
    console.print(tables_table(latest))
    named = sum(f.size for f in latest.files.values())
    console.print(f"{len(latest.files)} live files, {byte_size(named)}; {len(view.sstables)} SSTables in the store")


def _show(args: argparse.Namespace) -> None:
    view = read_store(args.url)
    manifest = view.latest
    if args.checkpoint is not None:
        manifest = view.manifest_of(args.checkpoint)
    elif args.manifest is not None:
        if args.manifest in view.unreadable:
            raise view.unreadable[args.manifest]
        manifest = next((m for m in view.manifests if m.number == args.manifest), None) or _no_manifest(view, args)
    if args.table is not None and args.table not in manifest.tables:
        raise StateStoreError(f"{view.url}: no table {args.table!r}; there are {sorted(manifest.tables)}")
    if args.table is None:
        console.print(identity_table(manifest))
        console.print(job_table(manifest))
    for name, state in sorted(manifest.tables.items()):
        if args.table in (None, name):
            console.print(schema_table(state.spec))
            console.print(files_table(state))


def _no_manifest(view: StoreView, args: argparse.Namespace) -> Manifest:
    raise StateStoreError(f"{view.url}: no manifest {args.manifest}; there are {view.numbers[-1]} to {view.numbers[0]}")


def _bench(args: argparse.Namespace) -> None:
    figures = run_bench(
        args.url, rows=args.prefill, batch_rows=args.batch_rows, threads=args.threads, value_bytes=args.value_bytes
    )
    console.print(figures_table(f"{args.prefill:,} rows of {args.value_bytes} bytes at {args.url}", figures))
