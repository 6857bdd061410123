"""What a store knows of itself, as tables: checkpoints, tables, files, compactions, health, operators, sources.

Each is made from one `Moment`: the manifest of a checkpoint, or that of an open store with what it has in memory; only
``checkpoints``, ``compactions`` and ``health`` tell of the store as it is now, for merges go on after a checkpoint.
Positions and plans are values of the job's own shape, so they are given as JSON text (bytes in them as hexadecimal
digits). Times of rows are integers in the unit of their column, since a column of a system table has one type for the
tables of all operators. ``rows`` counts stored rows, superseded and dead ones among them.

*Cost in requests* is what reading takes when nothing is cached: all of a table (``scan_requests``: of every file its
index, and a request for every 8 MiB), and one key of it (``lookup_requests``: of every piece that may hold the key, its
index and a block). Write requests are one file per table and checkpoint with new rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from statebackend.catalog_states import Moment
from statebackend.compaction import plans_due
from statebackend.manifest import Manifest, TableState
from statebackend.metrics import METRICS_SCHEMA, to_arrow
from statebackend.retention import KeptCheckpoint
from statebackend.sstable import READ_BYTES, SSTableMeta

__all__ = ["SYSTEM_TABLES", "operators_of_one_table", "system_table"]

_TIME = pa.timestamp("ms", "UTC")

CHECKPOINTS = pa.schema(
    [
        ("checkpoint_id", pa.int64()),
        ("manifest", pa.int64()),
        ("time", _TIME),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("files", pa.int64()),
        ("written_rows", pa.int64()),
        ("written_bytes", pa.int64()),
        ("duration_ms", pa.int64()),
        ("retained", pa.bool_()),
        ("savepoints", pa.list_(pa.string())),
    ]
)
TABLES = pa.schema(
    [
        ("name", pa.string()),
        ("operator", pa.string()),
        ("kind", pa.string()),
        ("order", pa.string()),
        ("key", pa.list_(pa.string())),
        ("columns", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("files", pa.int64()),
        ("flushed_files", pa.int64()),
        ("sorted_runs", pa.int64()),
        ("memory_rows", pa.int64()),
        ("memory_bytes", pa.int64()),
        ("time_column", pa.string()),
        ("watermark", pa.int64()),
    ]
)
FILES = pa.schema(
    [
        ("table", pa.string()),
        ("file", pa.string()),
        ("level", pa.int64()),
        ("run", pa.string()),
        ("sequence", pa.int64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("hash_min", pa.uint64()),
        ("hash_max", pa.uint64()),
        ("time_min", pa.int64()),
        ("time_max", pa.int64()),
        ("schema_version", pa.int64()),
    ]
)
COMPACTIONS = pa.schema(
    [
        ("table", pa.string()),
        ("state", pa.string()),
        ("run", pa.string()),
        ("files", pa.int64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
OPERATORS = pa.schema(
    [
        ("operator", pa.string()),
        ("plan", pa.string()),
        ("watermark", pa.int64()),
        ("tables", pa.int64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("files", pa.int64()),
        ("memory_rows", pa.int64()),
        ("memory_bytes", pa.int64()),
        ("read_amplification", pa.int64()),
        ("scan_requests", pa.int64()),
        ("lookup_requests", pa.int64()),
        ("committables", pa.int64()),
    ]
)
SOURCES = pa.schema(
    [("source", pa.string()), ("split", pa.string()), ("position", pa.string()), ("watermark", pa.int64())]
)

SYSTEM_TABLES = {
    "checkpoints": CHECKPOINTS,
    "tables": TABLES,
    "files": FILES,
    "compactions": COMPACTIONS,
    "health": METRICS_SCHEMA,
    "operators": OPERATORS,
    "sources": SOURCES,
}
"""The columns of every system table."""

_Rows = list[dict[str, Any]]


def operators_of_one_table(manifest: Manifest) -> dict[str, str]:
    """The table of every operator that has exactly one, where no other table has the operator's name."""
    owned: dict[str, list[str]] = {}
    for table in manifest.tables:
        if (owner := _operator_of(table, manifest)) is not None:
            owned.setdefault(owner, []).append(table)
    return {owner: tables[0] for owner, tables in owned.items() if len(tables) == 1 and owner not in manifest.tables}


def system_table(name: str, shown: Moment) -> pa.Table:
    """A system table. Of a checkpoint, what tells of the store as it is now is read from the storage."""
    match name:
        case "health":
            return to_arrow(shown.samples())
        case "checkpoints":
            rows = _checkpoints(shown.kept())
        case "tables":
            rows = _tables(shown.manifest, shown.unflushed())
        case "operators":
            rows = _operators(shown.manifest, shown.unflushed())
        case "compactions":
            rows = list(_compactions(shown))
        case _:
            rows = {"files": _files, "sources": _sources}[name](shown.manifest)
    return pa.Table.from_pylist(rows, SYSTEM_TABLES[name])


def _checkpoints(kept: Sequence[KeptCheckpoint]) -> _Rows:
    """One row for every kept checkpoint, whether retained, named by savepoints, or both."""
    rows: dict[int, dict[str, Any]] = {}
    for one in kept:
        manifest = one.manifest
        checkpoint = manifest.checkpoint
        assert checkpoint is not None, "only checkpoints are kept"
        row = rows.setdefault(
            int(one.checkpoint_id),
            {
                "checkpoint_id": int(one.checkpoint_id),
                "manifest": int(checkpoint.manifest_number),
                "time": checkpoint.created_ms,
                **_sizes(list(manifest.tables.values())),
                "written_rows": checkpoint.rows_written,
                "written_bytes": checkpoint.bytes_written,
                "duration_ms": round(checkpoint.duration_s * 1000),
                "retained": False,
                "savepoints": [],
            },
        )
        if one.savepoint is None:
            row["retained"] = True
        else:
            row["savepoints"].append(one.savepoint)
    return [rows[checkpoint_id] for checkpoint_id in sorted(rows)]


def _tables(manifest: Manifest, unflushed: Mapping[str, tuple[int, int]]) -> _Rows:
    return [
        {
            "name": name,
            "operator": _operator_of(name, manifest),
            "kind": state.spec.kind.value,
            "order": state.spec.order.value,
            "key": list(state.spec.key),
            "columns": ", ".join(f"{field.name} {field.type}" for field in state.spec.schema),
            **_sizes([state]),
            "flushed_files": sum(f.run is None for f in state.files),
            "sorted_runs": len({f.run for f in state.files if f.run is not None}),
            **_in_memory([name], unflushed),
            "time_column": state.spec.expiry_field,
            "watermark": state.watermark,
        }
        for name, state in sorted(manifest.tables.items())
    ]


def _files(manifest: Manifest) -> _Rows:
    return [
        {
            "table": name,
            "file": file.name,
            "level": file.level,
            "run": file.run,
            "sequence": file.sequence,
            "rows": file.rows,
            "bytes": file.size,
            "hash_min": file.hash_min,
            "hash_max": file.hash_max,
            "time_min": file.time_min,
            "time_max": file.time_max,
            "schema_version": file.schema,
        }
        for name, state in sorted(manifest.tables.items())
        for file in state.files
    ]


def _compactions(shown: Moment) -> Iterator[dict[str, Any]]:
    """Merges that are due, those under way as far as they are known, and the runs that merges have left."""
    settings, running = shown.merges()
    manifest = shown.latest()
    busy = {f.name for plan in running for f in plan.inputs}
    for state, plans in (("due", plans_due(manifest, settings, busy)), ("running", running)):
        for plan in plans:
            yield {"table": plan.table, "state": state, "run": None, **_sizes_of(plan.inputs)}
    for name, table in sorted(manifest.tables.items()):
        runs: dict[str, list[SSTableMeta]] = {}
        for file in table.files:
            if file.run is not None:
                runs.setdefault(file.run, []).append(file)
        for run, files in runs.items():
            yield {"table": name, "state": "done", "run": run, **_sizes_of(files)}


def _operators(manifest: Manifest, unflushed: Mapping[str, tuple[int, int]]) -> _Rows:
    job = manifest.job
    owned: dict[str, dict[str, TableState]] = {}
    for name, state in manifest.tables.items():
        if (owner := _operator_of(name, manifest)) is not None:
            owned.setdefault(owner, {})[name] = state
    splits = {f"{source}/{split}" for source in job.sources for split in _splits(source, manifest)}
    names = {*job.plan, *job.watermarks, *job.committables} - set(job.sources) - splits
    rows = []
    for name in sorted(names):
        tables = owned.get(name, {})
        pieces = [_pieces(state) for state in tables.values()]
        rows.append(
            {
                "operator": name,
                "plan": _json(job.plan[name]) if name in job.plan else None,
                "watermark": job.watermarks.get(name),
                "tables": len(tables),
                **_sizes(list(tables.values())),
                **_in_memory(tables, unflushed),
                "read_amplification": max(pieces, default=0),
                "scan_requests": sum(1 - -f.size // READ_BYTES for s in tables.values() for f in s.files),
                "lookup_requests": 2 * sum(pieces),
                "committables": len(job.committables.get(name, ())),
            }
        )
    return rows


def _sources(manifest: Manifest) -> _Rows:
    """A row for every source as a whole, and one for each of its splits."""
    job = manifest.job
    rows: _Rows = []
    for name, position in sorted(job.sources.items()):
        rows.append({"source": name, "split": None, "position": _json(position), "watermark": job.watermarks.get(name)})
        of_splits = position.get("splits") if isinstance(position, Mapping) else None
        for split in _splits(name, manifest):
            there = of_splits.get(split) if isinstance(of_splits, Mapping) else None
            rows.append(
                {
                    "source": name,
                    "split": split,
                    "position": None if there is None else _json(there),
                    "watermark": job.watermarks[f"{name}/{split}"],
                }
            )
    return rows


def _splits(source: str, manifest: Manifest) -> list[str]:
    """The splits of a source that have a watermark of their own."""
    job, prefix = manifest.job, f"{source}/"
    return sorted(
        name.removeprefix(prefix)
        for name in job.watermarks
        if name.startswith(prefix) and name not in job.sources and name not in job.plan
    )


def _operator_of(table: str, manifest: Manifest) -> str | None:
    """The operator whose table this is: one of the plan whose id is the name, or its beginning up to a colon."""
    owners = [name for name in manifest.job.plan if table == name or table.startswith(f"{name}:")]
    return max(owners, key=len, default=None)


def _pieces(state: TableState) -> int:
    """In how many files one key may be: flushed ones, and one of each sorted run."""
    return len({f.run or f.name for f in state.files})


def _in_memory(tables: Iterable[str], unflushed: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    found = [unflushed.get(name, (0, 0)) for name in tables]
    return {"memory_rows": sum(rows for rows, _ in found), "memory_bytes": sum(nbytes for _, nbytes in found)}


def _sizes(states: Sequence[TableState]) -> dict[str, int]:
    return _sizes_of([file for state in states for file in state.files])


def _sizes_of(files: Sequence[SSTableMeta]) -> dict[str, int]:
    return {"rows": sum(f.rows for f in files), "bytes": sum(f.size for f in files), "files": len(files)}


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda data: bytes(data).hex(), ensure_ascii=False, sort_keys=True)
