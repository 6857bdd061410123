"""``python -m statebackend COMMAND``: look into a store, and look after it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from statebackend.bench import run_bench
from statebackend.branches import clone, drop_branch, release_parent
from statebackend.compaction_cli import add_compact
from statebackend.errors import CorruptionError, StateStoreError
from statebackend.inspect import StoreView, read_store
from statebackend.inspect_metrics import inspect_metrics
from statebackend.maintenance import collect, create_savepoint, drop_savepoint, explain_object, rollback
from statebackend.manifest import Manifest
from statebackend.metrics import to_prometheus
from statebackend.render import (
    branches_table,
    byte_size,
    figures_table,
    files_table,
    identity_table,
    job_table,
    manifests_table,
    pins_table,
    samples_table,
    savepoints_table,
    schema_table,
    tables_table,
)
from statebackend.verification import verify

__all__ = ["main"]

# Into a pipe or a file, lines are as long as they need to be.
console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (1: the store said no, 2: wrong usage, others: see the command)."""
    args = _parser().parse_args(argv)
    try:
        code: int | None = args.run(args)
    except StateStoreError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: head, less
        sys.stderr.close()
        return 0
    return code or 0


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
    metrics = commands.add_parser("metrics", help="sizes, amplification, files per level, what is kept, orphans")
    metrics.add_argument("url", metavar="URL")
    metrics.add_argument("--prometheus", action="store_true", help="in Prometheus' text format")
    metrics.set_defaults(run=_metrics)
    bench = commands.add_parser("bench", help="prefill a store, flush from several threads, read back, print figures")
    bench.add_argument("url", metavar="URL")
    bench.add_argument("--prefill", type=int, default=1_000_000, metavar="N", help="rows to write (default 1000000)")
    bench.add_argument("--batch-rows", type=int, default=10_000, metavar="N", help="rows per batch (default 10000)")
    bench.add_argument("--threads", type=int, default=4, metavar="N", help="threads that flush at once (default 4)")
    bench.add_argument("--value-bytes", type=int, default=100, metavar="N", help="bytes per value (default 100)")
    bench.set_defaults(run=_bench)
    _add_maintenance(commands)
    add_compact(commands)
    return parser


def _add_maintenance(commands: Any) -> None:
    check = commands.add_parser("verify", help="read everything that kept checkpoints name and check it")
    check.add_argument("url", metavar="URL")
    check.set_defaults(run=_verify)
    gc = commands.add_parser("gc", help="delete what no kept checkpoint needs")
    gc.add_argument("url", metavar="URL")
    how = gc.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would go")
    how.add_argument("--explain", metavar="OBJECT", help="why this object (sst/….arrow) is kept or goes")
    gc.set_defaults(run=_gc)
    save = commands.add_parser("savepoint", help="keep a checkpoint under a name; without --name: list savepoints")
    save.add_argument("url", metavar="URL")
    save.add_argument("--name", metavar="NAME")
    save.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint (default: the newest)")
    save.add_argument("--expires-hours", type=float, metavar="H", help="drop it by itself after H hours")
    save.add_argument("--drop", action="store_true", help="drop the savepoint instead of making it")
    save.set_defaults(run=_savepoint)
    back = commands.add_parser("rollback", help="start the next run from an older checkpoint; fences a running job")
    back.add_argument("url", metavar="URL")
    target = back.add_mutually_exclusive_group(required=True)
    target.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint")
    target.add_argument("--savepoint", metavar="NAME")
    back.set_defaults(run=_rollback)
    new = commands.add_parser("clone", help="branch a new store off a checkpoint, without copying data")
    new.add_argument("url", metavar="URL")
    new.add_argument("new_url", metavar="NEW_URL", help="where the new store shall be")
    of = new.add_mutually_exclusive_group()
    of.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint (default: the newest)")
    of.add_argument("--savepoint", metavar="NAME")
    new.set_defaults(run=_clone)
    branches = commands.add_parser("branches", help="stores that were branched off this one and read its files")
    branches.add_argument("url", metavar="URL")
    branches.add_argument("--drop", metavar="ID", help="keep nothing for this branch any more")
    branches.add_argument("--force", action="store_true", help="drop it although it may still need files of this store")
    branches.set_defaults(run=_branches)


def _verify(args: argparse.Namespace) -> None:
    verdict = verify(args.url)
    for problem in verdict.problems:
        console.print(f"damaged: {problem}", style="red")
    console.print(f"{verdict.manifests} kept manifests, {verdict.files} files, {verdict.rows:,} rows read")
    if verdict.problems:
        raise CorruptionError(f"{args.url}: {len(verdict.problems)} problems")
    console.print("sound: every reference resolves, every checksum agrees, everything is sorted", style="green")


def _gc(args: argparse.Namespace) -> None:
    if args.explain is not None:
        console.print(explain_object(args.url, args.explain))
        return
    plan = collect(args.url, dry_run=args.dry_run)
    for name in plan.objects:
        console.print(f"{'would delete' if args.dry_run else 'deleted'} {name}")
    console.print(
        f"{len(plan.manifests)} manifests, {len(plan.sstables)} SSTables, {len(plan.savepoints)} savepoint copies"
        f"{' would go' if args.dry_run else ' deleted'}"
    )
    if not args.dry_run:
        try:
            released = release_parent(args.url)
        except StateStoreError as error:  # what was to be collected here is collected all the same
            console.print(f"the parent of this branch is needed no longer, but cannot be told: {error}")
        else:
            if released is not None:
                console.print(f"nothing of {released} is needed any more; it keeps nothing for this branch from now on")


def _savepoint(args: argparse.Namespace) -> None:
    if args.name is None:
        console.print(savepoints_table(read_store(args.url, manifests_max=1).latest))
    elif args.drop:
        drop_savepoint(args.url, args.name)
        console.print(f"dropped savepoint {args.name}")
    else:
        hours = args.expires_hours
        expires_ms = None if hours is None else time.time_ns() // 1_000_000 + int(hours * 3_600_000)
        made = create_savepoint(args.url, args.name, checkpoint_id=args.checkpoint, expires_ms=expires_ms)
        console.print(f"savepoint {args.name} keeps checkpoint {made.checkpoint_id} in {made.object_name}")


def _rollback(args: argparse.Namespace) -> None:
    manifest = rollback(args.url, checkpoint_id=args.checkpoint, savepoint=args.savepoint)
    console.print(f"checkpoint {manifest.checkpoint_id} on timeline {manifest.timeline} is the state of the next run")


def _clone(args: argparse.Namespace) -> None:
    manifest = clone(args.url, args.new_url, checkpoint_id=args.checkpoint, savepoint=args.savepoint)
    console.print(
        f"{args.new_url} is the store {manifest.store_id}, which begins as checkpoint {manifest.checkpoint_id} of "
        f"{manifest.roots[1].url} and reads {len(manifest.files)} files there"
    )


def _branches(args: argparse.Namespace) -> None:
    if args.drop is None:
        console.print(branches_table(read_store(args.url, manifests_max=1).latest))
    else:
        drop_branch(args.url, args.drop, force=args.force)
        console.print(f"dropped branch {args.drop}")


def _ls(args: argparse.Namespace) -> None:
    view = read_store(args.url, manifests_max=max(1, args.manifests))
    latest = view.latest
    console.print(
        f"{view.url}  store {latest.store_id}  timeline {latest.timeline}  "
        f"writer epoch {latest.writer_epoch}  checkpoint {latest.checkpoint_id or 'none yet'}"
    )
    console.print(manifests_table(view))
    console.print(tables_table(latest))
    for root in latest.roots.values():
        console.print(f"branched off {root.url} (store {root.store_id})")
    if latest.savepoints:
        console.print(savepoints_table(latest))
    if latest.branches:
        console.print(branches_table(latest))
    if latest.pins:
        console.print(pins_table(latest))
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


def _metrics(args: argparse.Namespace) -> None:
    samples = inspect_metrics(args.url)
    if args.prometheus:
        print(to_prometheus(samples), end="")
    else:
        console.print(samples_table(samples))


def _bench(args: argparse.Namespace) -> None:
    figures = run_bench(
        args.url, rows=args.prefill, batch_rows=args.batch_rows, threads=args.threads, value_bytes=args.value_bytes
    )
    console.print(figures_table(f"{args.prefill:,} rows of {args.value_bytes} bytes at {args.url}", figures))
