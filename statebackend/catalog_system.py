"""What a store's manifests know of it, as tables: checkpoints, tables, files, operators, sources.

Pure functions from manifests to Arrow tables. Positions and plans are values of the job's own shape, so they are
given as JSON text (bytes in them as hexadecimal digits). Times of rows are integers in the unit of their column, since
a column of a system table has one type for the tables of all operators.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from statebackend.manifest import Manifest, TableState
from statebackend.retention import KeptCheckpoint

__all__ = ["SYSTEM_TABLES", "checkpoints", "system_table"]

_TIME = pa.timestamp("ms", "UTC")

CHECKPOINTS = pa.schema(
    [
        ("checkpoint_id", pa.int64()),
        ("manifest", pa.int64()),
        ("time", _TIME),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("files", pa.int64()),
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
OPERATORS = pa.schema(
    [
        ("operator", pa.string()),
        ("plan", pa.string()),
        ("watermark", pa.int64()),
        ("tables", pa.int64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("committables", pa.int64()),
    ]
)
SOURCES = pa.schema([("source", pa.string()), ("position", pa.string()), ("watermark", pa.int64())])

SYSTEM_TABLES = {
    "checkpoints": CHECKPOINTS,
    "tables": TABLES,
    "files": FILES,
    "operators": OPERATORS,
    "sources": SOURCES,
}
"""The columns of every system table. ``rows`` counts stored rows, superseded and dead ones among them."""


def system_table(name: str, manifest: Manifest) -> pa.Table:
    """A system table that tells of one checkpoint: any but ``checkpoints``."""
    rows = {"tables": _tables, "files": _files, "operators": _operators, "sources": _sources}[name](manifest)
    return pa.Table.from_pylist(rows, SYSTEM_TABLES[name])


def checkpoints(kept: Sequence[KeptCheckpoint]) -> pa.Table:
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
                "retained": False,
                "savepoints": [],
            },
        )
        if one.savepoint is None:
            row["retained"] = True
        else:
            row["savepoints"].append(one.savepoint)
    return pa.Table.from_pylist([rows[checkpoint_id] for checkpoint_id in sorted(rows)], CHECKPOINTS)


def _tables(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "operator": _operator_of(name, manifest),
            "kind": state.spec.kind.value,
            "order": state.spec.order.value,
            "key": list(state.spec.key),
            "columns": ", ".join(f"{field.name} {field.type}" for field in state.spec.schema),
            **_sizes([state]),
            "time_column": state.spec.expiry_field,
            "watermark": state.watermark,
        }
        for name, state in sorted(manifest.tables.items())
    ]


def _files(manifest: Manifest) -> list[dict[str, Any]]:
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


def _operators(manifest: Manifest) -> list[dict[str, Any]]:
    job = manifest.job
    owned: dict[str, list[TableState]] = {}
    for name, state in manifest.tables.items():
        if (owner := _operator_of(name, manifest)) is not None:
            owned.setdefault(owner, []).append(state)
    names = {*job.plan, *job.watermarks, *job.committables} - set(job.sources)
    return [
        {
            "operator": name,
            "plan": _json(job.plan[name]) if name in job.plan else None,
            "watermark": job.watermarks.get(name),
            **_sizes(owned.get(name, [])),
            "tables": len(owned.get(name, [])),
            "committables": len(job.committables.get(name, ())),
        }
        for name in sorted(names)
    ]


def _sources(manifest: Manifest) -> list[dict[str, Any]]:
    job = manifest.job
    return [
        {"source": name, "position": _json(position), "watermark": job.watermarks.get(name)}
        for name, position in sorted(job.sources.items())
    ]


def _operator_of(table: str, manifest: Manifest) -> str | None:
    """The operator whose table this is: one of the plan whose id is the name, or its beginning up to a colon."""
    owners = [name for name in manifest.job.plan if table == name or table.startswith(f"{name}:")]
    return max(owners, key=len, default=None)


def _sizes(states: Sequence[TableState]) -> dict[str, int]:
    files = [file for state in states for file in state.files]
    return {"rows": sum(f.rows for f in files), "bytes": sum(f.size for f in files), "files": len(files)}


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda data: bytes(data).hex(), ensure_ascii=False, sort_keys=True)
