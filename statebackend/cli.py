"""``python -m statebackend COMMAND``: look into a store, and look after it."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from statebackend.bench import run_bench
from statebackend.branches import clone, drop_branch, release_parent
from statebackend.cli_options import (
    OPTIONS_HELP,
    Redacted,
    options_of_others,
    positive,
    storage_options,
    store_parser,
)
from statebackend.compaction_cli import add_compact
from statebackend.errors import CorruptionError, StateStoreError
from statebackend.inspect import StoreView, read_store
from statebackend.inspect_metrics import inspect_metrics
from statebackend.maintenance import collect, create_savepoint, drop_savepoint, explain_object, rollback
from statebackend.manifest import Manifest
from statebackend.metrics import to_prometheus
from statebackend.quantities import byte_size, counted
from statebackend.render import (
    branches_table,
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
from statebackend.repair_cli import add_repair
from statebackend.sql_cli import add_sql
from statebackend.verification import verify

__all__ = ["main"]

_HOURS_MAX = 100 * 366 * 24

_EXIT_CODES = """\
exit codes: 0 done; 1 the store said no, or is damaged; 2 wrong usage; 3 another compactor took over (compact);
130 interrupted.
"""

# Wide enough for a line of any table but those with long names, which fold; a narrower terminal wraps them by itself.
_width = max(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else 200
console = Console(width=_width, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (1: the store said no, 2: wrong usage, others: see the command)."""
    args = _parser().parse_args(argv)
    redacted = Redacted(args)
    try:
        code: int | None = args.run(args)
    except StateStoreError as error:
        print(f"{type(error).__name__}: {redacted(error)}", file=sys.stderr)
        if isinstance(error, CorruptionError):
            print(f"python -m statebackend repair {args.url} tells what is whole", file=sys.stderr)
        return 1
    except (ValueError, ImportError) as error:  # an option that makes no sense; a filesystem that is not installed
        print(redacted(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: head, less
        sys.stderr.close()
        return 0
    return code or 0


def _say(text: str, style: str | None = None) -> None:
    """One line of prose, which is never broken by us."""
    console.print(text, style=style, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m statebackend",
        description="Look into a state store, and look after it.",
        epilog=f"{_EXIT_CODES}\n{OPTIONS_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_views(commands)
    _add_maintenance(commands)
    _add_branching(commands)
    add_compact(commands)
    add_sql(commands)
    add_repair(commands)
    return parser


def _add_views(commands: Any) -> None:
    one = [store_parser()]
    ls = commands.add_parser("ls", parents=one, help="checkpoints, tables and files of a store, at a glance")
    ls.add_argument("--manifests", type=positive, default=10, metavar="N", help="the newest N manifests (default 10)")
    ls.set_defaults(run=_ls)
    show = commands.add_parser("show", parents=one, help="one manifest in full: positions, watermarks, tables, files")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=int, metavar="ID", help="the manifest of this checkpoint (default: newest)")
    which.add_argument("--manifest", type=int, metavar="NUMBER", help="the manifest of this number")
    show.add_argument("--table", metavar="NAME", help="only this table")
    show.set_defaults(run=_show)
    metrics = commands.add_parser(
        "metrics", parents=one, help="sizes, amplification, files per level, what is kept, orphans"
    )
    metrics.add_argument("--prometheus", action="store_true", help="in Prometheus' text format")
    metrics.set_defaults(run=_metrics)
    bench = commands.add_parser(
        "bench", parents=one, help="prefill a store, flush from several threads, read back, print figures"
    )
    bench.add_argument("--prefill", type=positive, default=1_000_000, metavar="N", help="rows (default 1000000)")
    bench.add_argument("--batch-rows", type=positive, default=10_000, metavar="N", help="per batch (default 10000)")
    bench.add_argument("--threads", type=positive, default=4, metavar="N", help="that flush at once (default 4)")
    bench.add_argument("--value-bytes", type=positive, default=100, metavar="N", help="bytes per value (default 100)")
    bench.set_defaults(run=_bench)


def _add_maintenance(commands: Any) -> None:
    one, with_others = [store_parser()], [store_parser(others=True)]
    check = commands.add_parser(
        "verify", parents=with_others, help="read everything that kept checkpoints name and check it"
    )
    check.set_defaults(run=_verify)
    gc = commands.add_parser("gc", parents=with_others, help="delete what no kept checkpoint needs")
    how = gc.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would go")
    how.add_argument("--explain", metavar="OBJECT", help="why this object (sst/….arrow) is kept or goes")
    gc.set_defaults(run=_gc)
    save = commands.add_parser(
        "savepoint", parents=one, help="keep a checkpoint under a name; without --name: list savepoints"
    )
    save.add_argument("--name", metavar="NAME")
    save.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint (default: the newest)")
    save.add_argument("--expires-hours", type=float, metavar="H", help="drop it by itself after H hours")
    save.add_argument("--drop", action="store_true", help="drop the savepoint instead of making it")
    save.set_defaults(run=_savepoint)
    back = commands.add_parser(
        "rollback", parents=one, help="start the next run from an older checkpoint; fences a running job"
    )
    target = back.add_mutually_exclusive_group(required=True)
    target.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint")
    target.add_argument("--savepoint", metavar="NAME")
    back.set_defaults(run=_rollback)


def _add_branching(commands: Any) -> None:
    with_others = [store_parser(others=True)]
    new = commands.add_parser(
        "clone", parents=with_others, help="branch a new store off a checkpoint, without copying data"
    )
    new.add_argument("new_url", metavar="NEW_URL", help="where the new store shall be")
    of = new.add_mutually_exclusive_group()
    of.add_argument("--checkpoint", type=int, metavar="ID", help="a retained checkpoint (default: the newest)")
    of.add_argument("--savepoint", metavar="NAME")
    new.set_defaults(run=_clone)
    branches = commands.add_parser(
        "branches", parents=with_others, help="stores that were branched off this one and read its files"
    )
    branches.add_argument("--drop", metavar="ID", help="keep nothing for this branch any more")
    branches.add_argument("--force", action="store_true", help="drop it although it may still need files of this store")
    branches.set_defaults(run=_branches)


def _verify(args: argparse.Namespace) -> None:
    verdict = verify(args.url, storage_options=storage_options(args), root_options=options_of_others(args))
    for problem in verdict.problems:
        _say(f"damaged: {problem}", style="red")
    _say(
        f"{counted(verdict.manifests, 'kept manifest')}, {counted(verdict.files, 'file')}, "
        f"{counted(verdict.rows, 'row')} read"
    )
    if verdict.problems:
        raise CorruptionError(f"{args.url}: {counted(len(verdict.problems), 'problem')}")
    _say("sound: every reference resolves, every checksum agrees, everything is sorted", style="green")


def _gc(args: argparse.Namespace) -> None:
    if args.explain is not None:
        _say(explain_object(args.url, args.explain, storage_options=storage_options(args)))
        return
    plan = collect(args.url, dry_run=args.dry_run, storage_options=storage_options(args))
    for name in plan.objects:
        _say(f"{'would delete' if args.dry_run else 'deleted'} {name}")
    _say(
        f"{counted(len(plan.manifests), 'manifest')}, {counted(len(plan.sstables), 'SSTable')}, "
        f"{counted(len(plan.savepoints), 'copy', 'copies')} of old manifests "
        f"{'would go' if args.dry_run else 'deleted'}"
    )
    if not args.dry_run:
        try:
            released = release_parent(
                args.url, storage_options=storage_options(args), root_options=options_of_others(args)
            )
        except StateStoreError as error:  # what was to be collected here is collected all the same
            _say(f"the parent of this branch is needed no longer, but cannot be told: {error}")
        else:
            if released is not None:
                _say(f"nothing of {released} is needed any more; it keeps nothing for this branch from now on")


def _savepoint(args: argparse.Namespace) -> None:
    options, hours = storage_options(args), args.expires_hours
    if args.name is None:
        if args.drop or args.checkpoint is not None or hours is not None:
            raise ValueError("which savepoint? --drop, --checkpoint and --expires-hours need --name")
        console.print(savepoints_table(read_store(args.url, manifests_max=1, storage_options=options).latest))
    elif args.drop:
        if args.checkpoint is not None or hours is not None:
            raise ValueError("--drop needs --name alone")
        drop_savepoint(args.url, args.name, storage_options=options)
        _say(f"dropped savepoint {args.name}")
    else:
        if hours is not None and not 0 < hours <= _HOURS_MAX:
            raise ValueError(f"--expires-hours must be more than 0 and at most {_HOURS_MAX}, not {hours:g}")
        expires_ms = None if hours is None else time.time_ns() // 1_000_000 + int(hours * 3_600_000)
        made = create_savepoint(
            args.url, args.name, checkpoint_id=args.checkpoint, expires_ms=expires_ms, storage_options=options
        )
        _say(f"savepoint {args.name} keeps checkpoint {made.checkpoint_id} in {made.object_name}")


def _rollback(args: argparse.Namespace) -> None:
    manifest = rollback(
        args.url, checkpoint_id=args.checkpoint, savepoint=args.savepoint, storage_options=storage_options(args)
    )
    _say(f"checkpoint {manifest.checkpoint_id} on timeline {manifest.timeline} is the state of the next run")


def _clone(args: argparse.Namespace) -> None:
    manifest = clone(
        args.url, args.new_url, checkpoint_id=args.checkpoint, savepoint=args.savepoint,
        storage_options=storage_options(args), new_storage_options=options_of_others(args).get(args.new_url),
    )  # fmt: skip
    _say(
        f"{args.new_url} is the store {manifest.store_id}, which begins as checkpoint {manifest.checkpoint_id} of "
        f"{manifest.roots[1].url} and reads {counted(len(manifest.files), 'file')} there"
    )


def _branches(args: argparse.Namespace) -> None:
    options = storage_options(args)
    if args.drop is None:
        if args.force:
            raise ValueError("which branch? --force needs --drop")
        console.print(branches_table(read_store(args.url, manifests_max=1, storage_options=options).latest))
        return
    others = options_of_others(args)
    if len(others) > 1:
        raise ValueError("--storage-option-of: one branch is dropped, so options of one other store are of use")
    of_branch = next(iter(others.values()), None)
    drop_branch(args.url, args.drop, force=args.force, storage_options=options, branch_storage_options=of_branch)
    _say(f"dropped branch {args.drop}")


def _ls(args: argparse.Namespace) -> None:
    view = read_store(args.url, manifests_max=args.manifests, storage_options=storage_options(args))
    latest = view.latest
    _say(
        f"{view.url}  store {latest.store_id}  timeline {latest.timeline}  "
        f"writer epoch {latest.writer_epoch}  checkpoint {latest.checkpoint_id or 'none yet'}"
    )
    console.print(manifests_table(view))
    console.print(tables_table(latest))
    for root in latest.roots.values():
        _say(f"branched off {root.url} (store {root.store_id})")
    if latest.savepoints:
        console.print(savepoints_table(latest))
    if latest.branches:
        console.print(branches_table(latest))
    if latest.pins:
        console.print(pins_table(latest))
    named = sum(f.size for f in latest.files.values())
    _say(
        f"{counted(len(latest.files), 'live file')}, {byte_size(named)}; "
        f"{counted(len(view.sstables), 'SSTable')} in the store"
    )


def _show(args: argparse.Namespace) -> None:
    view = read_store(args.url, storage_options=storage_options(args))
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
    samples = inspect_metrics(args.url, storage_options=storage_options(args))
    if args.prometheus:
        print(to_prometheus(samples), end="")
    else:
        console.print(samples_table(samples))


def _bench(args: argparse.Namespace) -> None:
    figures = run_bench(
        args.url, rows=args.prefill, batch_rows=args.batch_rows, threads=args.threads, value_bytes=args.value_bytes,
        storage_options=storage_options(args),
    )  # fmt: skip
    console.print(figures_table(f"{args.prefill:,} rows of {args.value_bytes} bytes at {args.url}", figures))
